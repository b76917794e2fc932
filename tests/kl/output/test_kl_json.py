"""The result of one input file: its contract, and what is said of what is missing."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kl.output.kl_json import DETAIL_NAMES, ResponseText, scored_responses, write_kl_json
from kl.records import Prompt, Turn
from kl.statistics.breakdowns import weighted_quantiles
from kl.tables.responses import summarise_responses
from kl.tables.schemas import TOKENS
from kl.tables.totals import TokenTableError, token_batches
from tests.kl.conftest import Answer, build_tokens

Build = Callable[..., pl.DataFrame]
PROMPT = Prompt((Turn("user", "Grüße?"),))


def written(tokens: pl.DataFrame, responses: Sequence[ResponseText], **others: Any) -> bytes:
    rows = summarise_responses(tokens.lazy())
    about = {"prompt": PROMPT, "model_p": "model-p", "model_q": "model-q"} | others
    with TemporaryDirectory() as folder:
        path = Path(folder) / "a_kl.json"
        batches = token_batches(tokens.lazy(), TOKENS.names())
        write_kl_json(path, responses=responses, scored=scored_responses(batches, rows), **about)
        return path.read_bytes()


def payload_of(tokens: pl.DataFrame, *responses: ResponseText) -> dict:
    return json.loads(written(tokens, responses))


def test_result_of_a_file_follows_the_contract(token_table: Build):
    tokens = token_table([("a.json", "p", 0, [1.0, 2.0, None, 6.0])])
    payload = payload_of(tokens, ResponseText(0, "t0t1t2t3"))
    assert list(payload) == ["prompt", "model1", "model2", "num_responses", "responses"]
    assert (payload["prompt"], payload["model1"], payload["num_responses"]) == ("Grüße?", "model-p", 1)
    response = payload["responses"][0]
    assert list(response) == ["response_idx", "text", "num_tokens", "kl_per_token", "token_details", "statistics"]
    assert (response["num_tokens"], response["kl_per_token"]) == (4, [1.0, 2.0, None, 6.0])
    assert response["statistics"] == {
        "mean_kl": 3.0,
        "median_kl": 2.0,
        "std_kl": pytest.approx(math.sqrt(14 / 2)),  # deviations -2, -1, 3 over n - 1
        "min_kl": 1.0,
        "max_kl": 6.0,
        "total_kl": 9.0,
        "n_measured": 3,
        "n_missing": 1,
        "n_without_estimate": 0,
    }


def test_token_details_have_the_names_of_the_contract_and_all_other_columns(token_table: Build):
    details = payload_of(token_table([("a", "p", 0, [1.0])]), ResponseText(0, "t0"))["responses"][0]["token_details"]
    contract = ["position", "token", "kl_divergence", "model1_chosen_logprob", "model2_chosen_logprob"]
    assert list(details[0])[:7] == [*contract, "entropy1", "entropy2"]
    renamed = {"kl_estimate", "logprob_p", "logprob_q", "entropy_p", "entropy_q"}
    of_the_response = {"source_file", "prompt_id", "response_idx"}
    assert set(TOKENS) - renamed - of_the_response <= set(details[0])
    assert (details[0]["kl_lower"], details[0]["model1_chosen_logprob"]) == (0.5, -1.0)


def test_unmeasured_position_is_null_with_its_error(token_table: Build):
    response = payload_of(token_table([("a", "p", 0, [None, 1.0])]), ResponseText(0, "t0t1"))["responses"][0]
    assert response["kl_per_token"] == [None, 1.0]
    assert response["token_details"][0]["kl_divergence"] is None
    assert response["token_details"][0]["reason"] == "blocked"
    assert [detail["error"] for detail in response["token_details"]] == ["the service blocked this prefix", None]


def test_position_left_out_by_sampling_says_so_and_the_sums_are_weighted(token_table: Build):
    tokens = token_table([("a", "p", 0, [1.0, None, 3.0, None])]).with_columns(
        pi=pl.lit(0.5), selected=pl.Series([True, False, True, False]), error=pl.lit(None, pl.String)
    )
    response = payload_of(tokens, ResponseText(0, "…"))["responses"][0]
    assert response["token_details"][1]["error"] == "left out by position sampling"
    statistics = response["statistics"]
    assert (statistics["total_kl"], statistics["mean_kl"], statistics["n_missing"]) == (8.0, 2.0, 0)


def test_unreadable_response_keeps_its_place(token_table: Build):
    tokens = token_table([("a", "p", 1, [1.0])])
    payload = payload_of(tokens, ResponseText(0, "hi", "no-logprobs", "has no logprobs"), ResponseText(1, "t0"))
    assert payload["num_responses"] == 2
    first = payload["responses"][0]
    assert (first["response_idx"], first["text"], first["num_tokens"]) == (0, "hi", 0)
    assert (first["kl_per_token"], first["token_details"], first["error"]) == ([], [], "has no logprobs")
    assert first["statistics"]["mean_kl"] is None
    assert first["statistics"]["n_measured"] == 0


def test_response_whose_positions_all_failed_has_their_error_and_length(token_table: Build):
    response = payload_of(token_table([("a", "p", 0, [None, None])]), ResponseText(0, "t0t1"))["responses"][0]
    assert (response["num_tokens"], response["error"]) == (2, "the service blocked this prefix")
    assert response["statistics"]["total_kl"] is None


def test_one_measured_position_has_no_standard_deviation(token_table: Build):
    response = payload_of(token_table([("a", "p", 0, [2.0])]), ResponseText(0, "t0"))["responses"][0]
    assert (response["statistics"]["std_kl"], response["statistics"]["mean_kl"]) == (None, 2.0)


def test_positions_with_bounds_only_are_counted(token_table: Build):
    tokens = token_table([("a", "p", 0, [1.0, 2.0, 4.0])]).with_columns(
        kl_estimate=pl.Series([None, 2.0, 4.0]), error=pl.Series(["3 tokens", None, None])
    )
    response = payload_of(tokens, ResponseText(0, "t0t1t2"))["responses"][0]
    assert response["kl_per_token"] == [None, 2.0, 4.0]
    statistics = response["statistics"]
    assert (statistics["n_measured"], statistics["n_without_estimate"], statistics["mean_kl"]) == (3, 1, 3.0)


def test_infinite_position_leaves_no_finite_statistics(token_table: Build):
    tokens = token_table([("a", "p", 0, [1.0, 2.0])]).with_columns(
        kl_estimate=pl.Series([None, 2.0]), reason=pl.Series(["infinite", None]), error=pl.Series(["KL is ∞", None])
    )
    statistics = payload_of(tokens, ResponseText(0, "t0t1"))["responses"][0]["statistics"]
    assert {name: statistics[name] for name in ("mean_kl", "total_kl", "median_kl", "max_kl")} == dict.fromkeys(
        ("mean_kl", "total_kl", "median_kl", "max_kl")
    )


def test_prompt_of_several_turns_and_a_system_text_are_kept(token_table: Build):
    prompt = Prompt((Turn("user", "a"), Turn("model", "b"), Turn("user", "c")), system="s")
    payload = json.loads(written(token_table([]), [], prompt=prompt, model_p=None))
    assert payload["prompt"][1] == {"role": "model", "content": "b"}
    assert (payload["system"], payload["model1"], payload["responses"]) == ("s", None, [])


def test_unreadable_file_has_a_result_with_its_error(token_table: Build):
    document = json.loads(written(token_table([]), [], prompt=None, error="not JSON"))
    assert (document["prompt"], document["error"], document["responses"]) == (None, "not JSON", [])


@pytest.mark.parametrize(
    ("answers", "responses", "message"),
    [
        pytest.param([("a", "p", 1, [1.0])], [ResponseText(0, "")], "tokens of response 1", id="unknown response"),
        pytest.param(
            [("a", "p", 0, [1.0]), ("a", "p", 1, [1.0])],
            [ResponseText(1, ""), ResponseText(0, "")],
            "tokens of response 1, which is not among the 2 of the file, or not in their order",
            id="another order",
        ),
        pytest.param([], [ResponseText(0, ""), ResponseText(0, "")], "response 0 is named 2 times", id="named twice"),
    ],
)
def test_tokens_that_do_not_belong_are_refused(token_table: Build, answers: list, responses: list, message: str):
    with pytest.raises(ValueError, match=message):
        payload_of(token_table(answers), *responses)


def test_tokens_of_a_response_that_do_not_follow_each_other_are_refused(token_table: Build):
    tokens = token_table([("a", "p", 0, [1.0, 2.0]), ("a", "p", 1, [1.0])])[[0, 2, 1]]
    with pytest.raises(ValueError, match="not in their order"):
        payload_of(tokens, ResponseText(0, ""), ResponseText(1, ""))


def test_nan_in_the_tokens_is_refused(token_table: Build):
    tokens = token_table([("a", "p", 0, [1.0])]).with_columns(js_estimate=pl.lit(math.nan))
    with pytest.raises(TokenTableError, match="js_estimate = nan"):
        payload_of(tokens, ResponseText(0, ""))


@pytest.mark.parametrize("n", [4095, 4096, 4097, 10_000])
def test_response_is_whole_wherever_the_rows_are_cut(token_table: Build, n: int):
    values = [np.random.default_rng(n).gamma(0.5, 1.0, size).tolist() for size in (7, n, 3)]
    tokens = token_table([("a", "p", index, of_response) for index, of_response in enumerate(values)])
    responses = payload_of(tokens, *(ResponseText(index, "") for index in range(3)))["responses"]
    assert [response["kl_per_token"] for response in responses] == values
    for response, of_response in zip(responses, values, strict=True):
        assert [detail["position"] for detail in response["token_details"]] == list(range(len(of_response)))


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
NUMBERS = st.floats(0, 1e300, allow_subnormal=True) | st.sampled_from([0.0, 5e-324, 1e16, 123456789.0, 1e-7])


@st.composite
def tables(draw: st.DrawFn) -> pl.DataFrame:
    lengths = draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    kls = [draw(st.lists(st.none() | st.floats(0, 1e100), min_size=n, max_size=n)) for n in lengths]
    tokens = build_tokens([Answer("a", "p", index, kl) for index, kl in enumerate(kls)])
    n = tokens.height
    drawn = draw(st.lists(st.booleans(), min_size=n, max_size=n)) if draw(st.booleans()) else [True] * n
    shares = st.sampled_from([1.0]) if all(drawn) else st.sampled_from([0.25, 0.5, 1 / 3])
    left_out = pl.Series(drawn).not_()
    tokens_of = st.lists(TEXTS, min_size=n, max_size=n)
    unknown = [pl.when(left_out).then(None).otherwise(name).alias(name) for name in ("kl_estimate", "kl_lower")]
    return tokens.with_columns(
        *unknown,
        pl.Series("token", draw(tokens_of)),
        pl.Series("flags", draw(st.lists(st.none() | TEXTS, min_size=n, max_size=n)), dtype=pl.String),
        pl.Series("reverse_kl_lower", draw(st.lists(st.none() | NUMBERS, min_size=n, max_size=n)), dtype=pl.Float64),
        pl.Series("token_id", draw(st.lists(st.none() | st.integers(-1, 2**60), min_size=n, max_size=n))),
        pl.Series("pi", draw(st.lists(shares, min_size=n, max_size=n))),
        pl.Series("selected", drawn),
        error=pl.when(~left_out).then("error"),
        reason=pl.when(~left_out).then("reason"),
    ).with_columns(error=pl.when(pl.col("selected") & (pl.col("kl_estimate").is_null())).then(pl.lit("…")))


def plain_statistics(tokens: pl.DataFrame, row: dict) -> dict:
    """The statistics again, written plainly."""
    known = tokens.filter(pl.col("kl_estimate").is_not_null())
    values, weights = known["kl_estimate"].to_numpy(), 1 / known["pi"].to_numpy()
    n_measured = tokens.filter("selected", pl.col("error").is_null() | pl.col("kl_lower").is_not_null()).height
    counts = {"n_measured": n_measured, "n_missing": row["n_missing"], "n_without_estimate": n_measured - len(values)}
    if not len(values):
        return dict.fromkeys(("mean_kl", "median_kl", "std_kl", "min_kl", "max_kl", "total_kl")) | counts
    mean, n = np.average(values, weights=weights), len(values)
    variance = float(np.average((values - mean) ** 2, weights=weights))
    return {
        "mean_kl": row["kl_mean_per_token"],
        "median_kl": float(weighted_quantiles(values, 0.5, weights)[0]),
        "std_kl": math.sqrt(variance * n / (n - 1)) if n > 1 else None,
        "min_kl": values.min(),
        "max_kl": values.max(),
        "total_kl": row["kl_sum"],
    } | counts


@settings(deadline=None)
@given(tables())
def test_written_values_are_those_of_the_table_to_the_last_bit(tokens: pl.DataFrame):
    rows = {row["response_idx"]: row for row in summarise_responses(tokens.lazy()).iter_rows(named=True)}
    texts = [ResponseText(index, f"half \ud83d {index}") for index in rows]
    for response in payload_of(tokens, *texts)["responses"]:
        index = response["response_idx"]
        of_response = tokens.filter(pl.col("response_idx") == index)
        assert (response["text"], response["num_tokens"]) == (f"half \ud83d {index}", of_response.height)
        assert response["kl_per_token"] == of_response["kl_estimate"].to_list()
        details = [
            {DETAIL_NAMES.get(name, name): value for name, value in row.items()} for row in of_response.to_dicts()
        ]
        for detail in details:
            for name in ("source_file", "prompt_id", "response_idx"):
                del detail[name]
            if not detail["selected"]:
                detail["error"] = "left out by position sampling"
        assert response["token_details"] == details
        assert response["statistics"] == plain_statistics(of_response, rows[index])


def test_response_of_8000_tokens_is_written_quickly(token_table: Build):
    tokens = token_table([("a", "p", 0, np.random.default_rng(0).gamma(0.5, 1.0, 8000).tolist())])
    start = time.perf_counter()
    document = payload_of(tokens, ResponseText(0, ""))
    assert time.perf_counter() - start < 10
    assert document["responses"][0]["kl_per_token"] == tokens["kl_estimate"].to_list()
