"""The summary of the data set."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from kl.records import Sampling
from kl.statistics.dataset import summarise_dataset
from kl.statistics.summary import RunFacts, Summary
from kl.tables.responses import ResponseInfo
from kl.tables.totals import TokenTableError

Build = Callable[..., pl.DataFrame]
PLAIN = Sampling(temperature=1.0, top_p=1.0, top_k=0)


def facts(**changes: object) -> RunFacts:
    values = {"model_p": "p", "model_q": "q", "estimator": "censored", "top_logprobs": 20, "prior_var": 0.5}
    return RunFacts(**{**values, "samplings": (PLAIN,), "alignment": {"overlap": 0.9}, **changes})


def summarise(tokens: pl.DataFrame, info: tuple[ResponseInfo, ...] = (), **changes: object) -> Summary:
    return summarise_dataset(tokens.lazy(), info, facts(**changes))


FIVE = [
    ("a", "p0", 0, [1.0, 1.0]),
    ("b", "p1", 0, [2.0, 2.0]),
    ("c", "p2", 0, [1.0, 2.0]),
    ("d", "p3", 0, [2.0, 3.0]),
    ("e", "p4", 0, [3.0, 3.0]),
]


def test_means_and_intervals_of_five_prompts_by_hand(token_table: Build):
    summary = summarise(token_table(FIVE))
    per_token, per_response = summary.kl_per_token.estimate, summary.kl_per_response.estimate
    # N = 2, 4, 3, 5, 6 over 2 positions each: θ = 20/10; Σe² = 10; SE = sqrt(5/4 · 10)/10; t(.975, 4) = 2.77645
    assert per_token.value == 2
    assert per_token.se == pytest.approx(0.353553, abs=1e-6)
    assert per_token.ci_low == pytest.approx(1.018380, abs=1e-5)
    assert (per_token.n, per_token.n_clusters) == (10, 5)
    # the mean of 2, 4, 3, 5, 6 is 4, its standard error sqrt(2.5/5) = .70711
    assert (per_response.value, per_response.n) == (4, 5)
    assert per_response.se == pytest.approx(0.707107, abs=1e-6)
    assert per_response.design_effect == pytest.approx(1)


def test_design_effect_by_hand(token_table: Build):
    # Σ(v-2)² over 1 1 2 2 1 2 2 3 3 3 is 6; independent tokens: 10/9 · 6/100 = .066667; clusters: .125; ratio 1.875
    assert summarise(token_table(FIVE)).kl_per_token.estimate.design_effect == pytest.approx(1.875)


def test_bounds_and_comparisons_have_their_own_intervals(token_table: Build):
    per_token = summarise(token_table(FIVE)).kl_per_token
    assert (per_token.lower.value, per_token.plausible_upper.value) == (1, 4)
    assert per_token.lower.ci_low == pytest.approx(1.018380 / 2, abs=1e-5)
    assert (per_token.floor.value, per_token.bucket.value) == (0.5, 1)
    assert per_token.exact.value is None
    assert per_token.exact.no_interval == "not known at 10 of 10 measured positions"


def test_exact_is_reported_where_the_vocabulary_was_whole(token_table: Build):
    tokens = token_table(FIVE).with_columns(kl_exact=pl.col("kl_estimate"))
    assert summarise(tokens).kl_per_token.exact.value == 2


def test_identification_is_the_certain_part_of_the_upper_limit(token_table: Build):
    identification = summarise(token_table(FIVE)).identification
    assert (identification.value, identification.n_unidentified) == (0.25, 0)  # 1 - (4 - 1)/4


def test_one_position_without_upper_limit_leaves_the_limit_of_the_data_set_unknown(token_table: Build):
    tokens = token_table(FIVE).with_columns(
        kl_upper_plausible=pl.Series([None, *(2 * v for v in [1.0, 2, 2, 1, 2, 2, 3, 3, 3])])
    )
    summary = summarise(tokens)
    assert summary.kl_per_token.plausible_upper.value is None
    assert summary.kl_per_response.plausible_upper.value is None
    assert summary.identification.n_unidentified == 1
    # over the 9 others: lower 19/2/9, upper 38/9
    assert summary.identification.value == pytest.approx(0.25)
    assert summary.identification.kl_estimate == pytest.approx(19 / 9)
    assert any("1 measured positions have no plausible upper limit" in warning for warning in summary.warnings)


def test_missing_positions_are_left_out_of_means_and_extrapolated_in_sums(token_table: Build):
    tokens = token_table([("a", "p0", 0, [1.0, None]), ("b", "p1", 0, [2.0, 2.0])])
    summary = summarise(tokens)
    assert summary.kl_per_token.estimate.value == pytest.approx(5 / 3)
    assert summary.kl_per_response.estimate.value == 3  # (1 · 2/1 + 4) / 2
    assert summary.kl_per_response.lower.value == 1.25  # certified, as measured: (.5 + 2) / 2
    assert (summary.counts.missing, summary.counts.missing_by_reason) == (1, {"blocked": 1})
    assert (summary.counts.responses_complete, summary.counts.responses_partial) == (1, 1)
    assert any("1 of 4 positions asked were not measured (blocked 1)" in warning for warning in summary.warnings)


def test_fewer_than_five_prompts_warn_that_there_is_no_interval(token_table: Build):
    summary = summarise(token_table(FIVE[:3]))
    assert summary.kl_per_token.estimate.ci_low is None
    assert "KL per token: no interval: 3 prompts, at least 5 are needed." in summary.warnings


def test_several_responses_of_a_prompt_are_one_cluster(token_table: Build):
    tokens = token_table([(f"f{i}", "same", i, [1.0, 2.0]) for i in range(9)])
    assert summarise(tokens).kl_per_token.estimate.n_clusters == 1


@pytest.mark.parametrize(
    "answers", [pytest.param([], id="no response"), pytest.param([("a", "p", 0, [None, None])], id="all missing")]
)
def test_nothing_measured_is_a_valid_summary(token_table: Build, answers: list):
    summary = summarise(token_table(answers))
    text = json.dumps(summary.to_json(), allow_nan=False)
    assert json.loads(text)["kl_per_token"]["estimate"]["value"] is None
    assert summary.kl_per_token.estimate.no_interval == "nothing was measured"
    assert summary.kl_per_response.lower.value is None
    assert set(summary.token_kl.values()) == {None}
    assert (summary.by_token, summary.by_position, summary.by_prompt) == ([], [], [])
    assert summary.identification.value is None
    assert summary.counts.measured == 0


def test_nan_is_refused(token_table: Build):
    tokens = token_table(FIVE).with_columns(js_estimate=pl.lit(float("nan")))
    with pytest.raises(TokenTableError, match="js_estimate = nan"):
        summarise(tokens)


def test_counts_cover_files_and_responses_that_could_not_be_read(token_table: Build):
    info = (
        ResponseInfo("a", 0, "p0"),
        ResponseInfo("a", 1, "p0", reason="no-logprobs", error="has no logprobs"),
        ResponseInfo("z", None, reason="not-json", error="line 1"),
    )
    counts = summarise(token_table([("a", "p0", 0, [1.0]), ("b", "p1", 0, [None])]), info).counts
    assert (counts.files, counts.files_unreadable, counts.prompts) == (3, 1, 2)
    assert (counts.responses, counts.responses_complete, counts.responses_not_scored) == (3, 1, 2)
    assert counts.responses_not_scored_by_reason == {"blocked": 1, "no-logprobs": 1}
    assert (counts.positions, counts.selected, counts.measured, counts.missing) == (2, 2, 1, 1)


def test_responses_that_sampling_left_out_count_with_a_sum_of_zero(token_table: Build):
    """The Horvitz-Thompson estimate of a response without a sampled position is 0; leaving it out would be biased."""
    tokens = token_table([("a", "p0", 0, [1.0, 3.0]), ("b", "p1", 0, [None, None])]).with_columns(
        pi=pl.lit(0.5), selected=pl.col("source_file") == "a", error=pl.lit(None, dtype=pl.String)
    )
    summary = summarise(tokens)
    assert summary.kl_per_token.estimate.value == 2  # (1 + 3)/.5 over 4 positions
    assert summary.counts.responses_not_scored == 0


def test_same_top_token_and_delta_p(token_table: Build):
    tokens = token_table([("a", "p0", 0, [0.5, 2.0, 0.5, 0.5])]).with_columns(delta_p=pl.Series([0.1, -0.3, None, 0.2]))
    summary = summarise(tokens)
    assert summary.same_top_p.value == 0.75
    # (.1 - .3 + .2)/3 and sqrt((.01 + .09 + .04)/3)
    assert summary.delta_p.mean.value == pytest.approx(0, abs=1e-15)
    assert summary.delta_p.rms == pytest.approx((0.14 / 3) ** 0.5)
    assert (summary.delta_p.mean.n, summary.delta_p.mean.n_unknown) == (3, 1)


def test_k1_and_k3_are_means_when_sampling_is_as_scored(token_table: Build):
    sampled = summarise(token_table(FIVE)).sampled_token
    assert sampled.k1_per_token is not None
    assert (sampled.k1_per_token.value, sampled.k1_is_lower_bound, sampled.censored_share) == (2, False, 0)


def test_censored_k1_makes_its_mean_a_lower_bound_and_k3_unknown(token_table: Build):
    tokens = token_table([("a", "p0", 0, [1.0, 3.0])]).with_columns(
        k1_censored=pl.Series([False, True]), k3=pl.Series([1.0, None])
    )
    sampled = summarise(tokens).sampled_token
    assert (sampled.k1_is_lower_bound, sampled.n_censored, sampled.censored_share) == (True, 1, 0.5)
    assert sampled.k1_per_token is not None
    assert sampled.k1_per_token.value == 2
    assert sampled.k3_per_token is not None
    assert sampled.k3_per_token.value is None


@pytest.mark.parametrize(
    ("samplings", "why"),
    [
        pytest.param((Sampling(0.7, 1.0, 0),), "temperature 0.7", id="temperature"),
        pytest.param((PLAIN, Sampling(1.0, 0.9, 0)), "top_p 0.9", id="nucleus in one of two"),
        pytest.param((Sampling(1.0, 1.0, 40),), "top_k 40", id="top_k"),
        pytest.param((Sampling(),), "not all stated", id="not stated"),
        pytest.param((), "not all stated", id="no settings"),
    ],
)
def test_k1_and_k3_are_not_computed_for_other_sampling(token_table: Build, samplings: tuple, why: str):
    summary = summarise(token_table(FIVE), samplings=samplings)
    assert summary.sampled_token.k1_per_token is None
    assert why in (summary.sampled_token.not_computed or "")
    assert any(why in warning for warning in summary.warnings)


def test_top_k_that_is_not_stated_is_assumed_off_with_a_warning(token_table: Build):
    summary = summarise(token_table(FIVE), samplings=(Sampling(1.0, 1.0, None),))
    assert summary.sampled_token.k1_per_token is not None
    assert "top_k is not stated for the responses; k1 and k3 assume that it was off." in summary.warnings


def test_clean_data_have_no_warning(token_table: Build):
    assert summarise(token_table(FIVE)).warnings == []


@pytest.mark.parametrize(
    ("columns", "changes", "text"),
    [
        pytest.param({}, {"top_logprobs": 3}, "top_logprobs = 3", id="short lists"),
        pytest.param({"ambiguous_mass_q": 0.05}, {}, "5.0% of Q's mass", id="ambiguous tokens"),
        pytest.param({"flags": "mass-above-1-p"}, {}, "P's listed probabilities add up to more than 1 at", id="mass"),
        pytest.param({"flags": "rounded-q"}, {}, "Q's log-probabilities are rounded to a few decimals", id="rounded"),
    ],
)
def test_warnings(token_table: Build, columns: dict, changes: dict, text: str):
    tokens = token_table(FIVE).with_columns(pl.lit(value).alias(name) for name, value in columns.items())
    assert [text in warning for warning in summarise(tokens, **changes).warnings] == [True]


def test_a_position_without_estimate_is_left_out_with_a_warning(token_table: Build):
    tokens = token_table([("a", "p0", 0, [1.0, 1.0]), ("b", "p1", 0, [2.0, 4.0])]).with_columns(
        kl_estimate=pl.Series([None, 1.0, 2.0, 4.0]),
        reason=pl.Series(["short-list", None, None, None]),
        error=pl.Series(["P lists 3 tokens", None, None, None]),
    )
    summary = summarise(tokens)
    assert summary.kl_per_token.estimate.value == pytest.approx(7 / 3)
    assert summary.kl_per_response.estimate.value == 4  # (1 · 2/1 + 6) / 2
    assert summary.kl_per_token.lower.value == 1  # (.5 + .5 + 1 + 2) / 4
    assert (summary.counts.measured, summary.counts.missing, summary.counts.bounds_only) == (4, 0, 1)
    assert any("have bounds and no point estimate (short-list 1)" in warning for warning in summary.warnings)


def test_one_infinite_position_makes_the_mean_infinite_and_that_is_never_a_number(token_table: Build):
    tokens = token_table(FIVE).with_columns(
        kl_estimate=pl.Series([None, 1.0, 2, 2, 1, 2, 2, 3, 3, 3]),
        reason=pl.Series(["infinite", *[None] * 9]),
        error=pl.Series(["P allows a token that Q excludes", *[None] * 9]),
    )
    summary = summarise(tokens)
    for estimate in (summary.kl_per_token.estimate, summary.kl_per_response.estimate, summary.kl_per_token.exact):
        assert (estimate.value, estimate.no_interval) == (None, "infinite at 1 of 10 measured positions")
    assert summary.kl_per_token.lower.value == 1
    assert (summary.token_kl["Maximum KLD"], summary.token_kl["Median KLD"]) == (None, 2)
    assert summary.kl_share_of_top_1_percent is None
    assert (summary.by_prompt[0]["prompt_id"], summary.by_prompt[0]["kl_per_token"]) == ("p0", None)
    assert summary.prompts_for_10_percent is None
    assert summary.counts.bounds_only_by_reason == {"infinite": 1}
    json.dumps(summary.to_json(), allow_nan=False)


def test_bounds_stand_where_lists_are_too_short_for_an_estimate(token_table: Build):
    tokens = token_table(FIVE).with_columns(
        kl_estimate=pl.lit(None, dtype=pl.Float64), reason=pl.lit("short-list"), error=pl.lit("P lists 3 tokens")
    )
    summary = summarise(tokens)
    assert summary.kl_per_token.estimate.value is None
    assert summary.kl_per_token.lower.value == 1
    assert summary.counts.measured == 10


def test_facts_of_the_run_are_repeated(token_table: Build):
    document = summarise(token_table(FIVE)).to_json()
    assert (document["model_q"], document["estimator"], document["prior_var"]) == ("q", "censored", 0.5)
    assert document["sampling"] == [{"temperature": 1.0, "top_p": 1.0, "top_k": 0}]
    assert document["alignment"] == {"overlap": 0.9}
    assert (document["prompts_for_10_percent"], document["prompts_for_5_percent"]) == (61, 241)


SCRIPT = """
import sys, polars as pl
from pathlib import Path
from kl.output.files import write_summary, write_tokens
from kl.statistics.dataset import summarise_dataset
from kl.statistics.summary import RunFacts
parts, out = sorted(Path(sys.argv[1]).glob("*.parquet")), Path(sys.argv[2])
write_tokens(parts, out / "tokens.parquet")
facts = RunFacts(None, "q", "censored", 20, None, (), None)
write_summary(summarise_dataset(pl.scan_parquet(out / "tokens.parquet"), (), facts), out / "summary.json")
"""


def test_any_number_of_threads_gives_the_same_bytes(token_table: Build, tmp_path: Path):
    rng = np.random.default_rng(9)
    parts = tmp_path / "parts"
    parts.mkdir()
    for i in range(12):
        answers = [(f"f{i}", f"p{i}", j, rng.gamma(0.5, 1.0, 2000).tolist()) for j in range(7)]
        token_table(answers).write_parquet(parts / f"{i:06}.parquet")
    outputs = []
    for run, threads in enumerate(("1", "4", "4")):
        out = tmp_path / str(run)
        out.mkdir()
        environment = {**os.environ, "POLARS_MAX_THREADS": threads}
        subprocess.run([sys.executable, "-c", SCRIPT, parts, out], check=True, env=environment, timeout=120)
        outputs.append([(out / name).read_bytes() for name in ("tokens.parquet", "summary.json")])
    assert outputs[0] == outputs[1] == outputs[2]
