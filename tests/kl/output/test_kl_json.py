"""The result of one input file: its contract, and what is said of what is missing."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from kl.output.kl_json import ResponseText, kl_payload, write_kl_json
from kl.records import Prompt, Turn
from kl.tables.schemas import TOKENS
from kl.tables.totals import TokenTableError

Build = Callable[..., pl.DataFrame]
PROMPT = Prompt((Turn("user", "Grüße?"),))


def payload_of(tokens: pl.DataFrame, *responses: ResponseText) -> dict:
    return kl_payload(PROMPT, "model-p", "model-q", responses, tokens)


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
    payload = kl_payload(prompt, None, "q", [], token_table([]))
    assert payload["prompt"][1] == {"role": "model", "content": "b"}
    assert (payload["system"], payload["model1"], payload["responses"]) == ("s", None, [])


def test_unreadable_file_has_a_result_with_its_error(token_table: Build, tmp_path: Path):
    target = tmp_path / "a_kl.json"
    write_kl_json(
        target, prompt=None, model_p=None, model_q="q", responses=[], tokens=token_table([]), error="not JSON"
    )
    document = json.loads(target.read_text("utf-8"))
    assert (document["prompt"], document["error"], document["responses"]) == (None, "not JSON", [])


@pytest.mark.parametrize(
    ("answers", "responses", "message"),
    [
        pytest.param([("a", "p", 1, [1.0])], [ResponseText(0, "")], "tokens of response 1", id="unknown response"),
        pytest.param(
            [("a", "p", 0, [1.0]), ("b", "p", 0, [1.0])], [ResponseText(0, "")], "tokens of 2 files", id="two files"
        ),
        pytest.param([], [ResponseText(0, ""), ResponseText(0, "")], "response 0 is named 2 times", id="named twice"),
    ],
)
def test_tokens_that_do_not_belong_are_refused(token_table: Build, answers: list, responses: list, message: str):
    with pytest.raises(ValueError, match=message):
        payload_of(token_table(answers), *responses)


def test_nan_in_the_tokens_is_refused(token_table: Build):
    tokens = token_table([("a", "p", 0, [1.0])]).with_columns(js_estimate=pl.lit(math.nan))
    with pytest.raises(TokenTableError, match="js_estimate = nan"):
        payload_of(tokens, ResponseText(0, ""))


def test_response_of_8000_tokens_is_written_quickly(token_table: Build, tmp_path: Path):
    tokens = token_table([("a", "p", 0, np.random.default_rng(0).gamma(0.5, 1.0, 8000).tolist())])
    start = time.perf_counter()
    write_kl_json(
        tmp_path / "a_kl.json", prompt=PROMPT, model_p="p", model_q="q", responses=[ResponseText(0, "")], tokens=tokens
    )
    assert time.perf_counter() - start < 10
    document = json.loads((tmp_path / "a_kl.json").read_bytes())
    assert document["responses"][0]["kl_per_token"] == tokens["kl_estimate"].to_list()
