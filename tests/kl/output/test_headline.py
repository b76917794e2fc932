"""The rows of the terminal table."""

from __future__ import annotations

from collections.abc import Callable

import polars as pl

from kl.output.headline import headline
from kl.records import Sampling
from kl.statistics.dataset import summarise_dataset
from kl.statistics.summary import RunFacts
from kl.tables.responses import ResponseInfo

Build = Callable[..., pl.DataFrame]
FIVE = [
    ("a", "p0", 0, [1.0, 1.0]),
    ("b", "p1", 0, [2.0, 2.0]),
    ("c", "p2", 0, [1.0, 2.0]),
    ("d", "p3", 0, [2.0, 3.0]),
    ("e", "p4", 0, [3.0, 3.0]),
]


def rows(tokens: pl.DataFrame, *info: ResponseInfo, sampling: Sampling = Sampling(1.0, 1.0, 0)) -> dict[str, str]:  # noqa: B008
    facts = RunFacts("p", "q", "censored", 20, 0.5, (sampling,), None)
    return dict(headline(summarise_dataset(tokens.lazy(), info, facts)))


def test_headline_of_a_complete_run(token_table: Build):
    assert rows(token_table(FIVE)) == {
        "KL(P‖Q) per token": "2.00 nats (95 % CI 1.02 to 2.98, 5 prompts); truncation: lower 1, plausible upper 4",
        "KL(P‖Q) per response": "4.00 nats (95 % CI 2.04 to 5.96, 5 prompts); truncation: lower 2, plausible upper 8",
        "  floor, for comparison": "0.5 nats per token",
        "  bucket, for comparison": "1 nats per token",
        "Identified": "25.0% of the plausible upper limit is certain",
        "Median KLD": "2 nats",
        "99.0% KLD": "3 nats",
        "99.9% KLD": "3 nats",
        "Maximum KLD": "3 nats",
        "Top 1 % of positions": "1.5% of the KL",  # a tenth of one position of 3 out of 20
        "Largest position": "15.0% of the KL (d#0 position 1)",
        "Reverse KL(Q‖P) per token": "6.0 nats (95 % CI 3.1 to 8.9, 5 prompts)",
        "Jensen-Shannon per token": "0.250 nats (95 % CI 0.127 to 0.373, 5 prompts)",
        "Same top p": "0 % (95 % CI 0 to 0, 5 prompts)",
        "Flip rate of the top token": "100 % (95 % CI 100 to 100, 5 prompts); first at position 0 "
        "(median, 95 % CI 0 to 0), 0 of 5 responses never",
        "Mean Δp": "-50.000 %",
        "RMS Δp": "50.000 %",
        "Perplexity of the text": "2.718 under P, 7.389 under Q; "
        "ln of the ratio 2.00 (95 % CI 1.02 to 2.98, 5 prompts)",
        "|Δ log p| of the sampled token": "2.00 nats (95 % CI 1.02 to 2.98, 5 prompts); 95 % below 3, largest 3",
        "q/p outside 0.9 to 1.1": "100 % (95 % CI 100 to 100, 5 prompts)",
        "k1 per token (sampled tokens only)": "2.00 nats (95 % CI 1.02 to 2.98, 5 prompts)",
        "k3 per token (sampled tokens only)": "2.00 nats (95 % CI 1.02 to 2.98, 5 prompts)",
        "Positions measured": "10 of 10",
        "Responses": "5 (5 prompts): 5 complete",
        "Prompts needed": "about 61 like these for ±10 %, 241 for ±5 %",
    }


def test_too_few_prompts_have_no_interval_in_words(token_table: Build):
    text = rows(token_table(FIVE[:3]))["KL(P‖Q) per token"]
    assert "(no interval: 3 prompts, at least 5 are needed)" in text


def test_nothing_measured_is_said_so(token_table: Build):
    found = rows(token_table([("a", "p", 0, [None])]), ResponseInfo("a", 1, "p", reason="no-logprobs", error="none"))
    assert found["KL(P‖Q) per token"] == "not known: nothing was measured"
    assert found["RMS Δp"] == "not known: no position with a known Δp"
    assert found["Positions measured"] == "0 of 1; 1 missing: blocked 1"
    assert found["Responses"] == "2 (1 prompts): 0 complete, 2 not scored (blocked 1, no-logprobs 1)"


def test_upper_limit_that_is_not_identified_is_said_so(token_table: Build):
    tokens = token_table(FIVE).with_columns(
        kl_upper_plausible=pl.Series([None, *(2 * v for v in [1.0, 2, 2, 1, 2, 2, 3, 3, 3])])
    )
    found = rows(tokens)
    assert found["KL(P‖Q) per token"].endswith("truncation: lower 1, plausible upper not identified")
    assert "over 9 positions; 1 are without an upper limit" in found["Identified"]


def test_positions_with_bounds_only_are_said_to_be_left_out(token_table: Build):
    tokens = token_table(FIVE).with_columns(kl_estimate=pl.Series([None, 1.0, 2, 2, 1, 2, 2, 3, 3, 3]))
    assert "5 prompts); 1 positions without an estimate are left out; truncation" in rows(tokens)["KL(P‖Q) per token"]


def test_partial_delta_p_names_its_share(token_table: Build):
    tokens = token_table(FIVE).with_columns(delta_p=pl.Series([0.1] * 9 + [None]))
    assert rows(tokens)["RMS Δp"] == "10.000 % (over the 90.0% of positions where Q lists the sampled token)"


def test_censored_tokens_make_the_figures_bounds(token_table: Build):
    found = rows(token_table(FIVE).with_columns(k1_censored=pl.col("kl_estimate") == 3))
    assert found["Perplexity of the text"].endswith(
        "; without 3 positions where log q is not known, with them the logarithm is at least 2.00"
    )
    for label in ("|Δ log p| of the sampled token", "q/p outside 0.9 to 1.1"):
        assert found[label].endswith("; at least, as 3 tokens are outside Q's list")


def test_responses_that_never_flip_leave_no_median(token_table: Build):
    found = rows(token_table(FIVE).with_columns(same_top_token=True))["Flip rate of the top token"]
    assert found == "0 % (95 % CI 0 to 0, 5 prompts); 5 of 5 responses never, the median response does not"


def test_k1_under_another_sampling_is_not_shown(token_table: Build):
    found = rows(token_table(FIVE), sampling=Sampling(0.7, 1.0, 0))
    assert found["k1, k3"] == "not computed: the responses were sampled at temperature 0.7, not 1"


def test_sampled_positions_are_a_sample(token_table: Build):
    tokens = token_table([("a", "p", 0, [1.0, None])]).with_columns(
        pi=pl.lit(0.5), selected=pl.Series([True, False]), error=pl.lit(None, pl.String)
    )
    assert rows(tokens)["Positions measured"] == "1 of 1, a sample of 2"
