"""Paired differences of two runs against one P."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import polars as pl
import pytest

import kl.statistics.paired
from kl.statistics.paired import IncomparableRunsError, paired_difference

Build = Callable[..., pl.DataFrame]


def runs(token_table: Build, a: list[list[float | None]], b: list[list[float | None]]) -> tuple[pl.LazyFrame, ...]:
    return tuple(token_table([(f"f{i}", f"p{i}", 0, kl) for i, kl in enumerate(values)]).lazy() for values in (a, b))


def test_difference_by_hand(token_table: Build):
    a = [[1.0, 1.0], [2.0, 2.0], [1.0, 2.0], [2.0, 3.0], [3.0, 3.0]]
    b = [[0.5, 0.5], [1.5, 1.5], [0.0, 0.0], [2.0, 3.0], [1.0, 2.0]]
    difference = paired_difference(*runs(token_table, a, b))
    # per prompt 1, 1, 3, 0, 3 = 8 over 10 positions: θ = .8; e = -.6, -.6, 1.4, -1.6, 1.4; Σe² = 7.2
    # SE = sqrt(5/4 · 7.2)/10 = .3; t(.975, 4) = 2.776445
    assert difference.per_token.value == pytest.approx(0.8)
    assert difference.per_token.se == pytest.approx(0.3)
    assert difference.per_token.ci_low == pytest.approx(0.8 - 2.776445 * 0.3, abs=1e-6)
    assert difference.per_response.value == pytest.approx(1.6)
    assert difference.a_per_token.value == pytest.approx(2.0)
    assert difference.b_per_token.value == pytest.approx(1.2)
    assert (difference.n_positions, difference.n_only_a, difference.n_only_b) == (10, 0, 0)


def test_pairing_is_sharper_than_two_means(token_table: Build):
    rng = np.random.default_rng(2)
    a = [(rng.gamma(2.0, 0.5) * rng.gamma(2.0, 0.5, 20)).tolist() for _ in range(20)]
    b = [[value + 0.01 * rng.standard_normal() ** 2 for value in values] for values in a]
    difference = paired_difference(*runs(token_table, a, b))
    assert difference.per_token.ci_high is not None
    assert difference.per_token.ci_high < 0
    assert difference.per_token.se < difference.a_per_token.se / 50


def test_a_run_against_itself_differs_by_exactly_zero(token_table: Build):
    tokens, _ = runs(token_table, [[1.0, 2.0]] * 6, [])
    difference = paired_difference(tokens, tokens)
    assert (difference.per_token.value, difference.per_token.ci_low, difference.per_token.ci_high) == (0, 0, 0)


def test_only_positions_measured_in_both_count(token_table: Build):
    difference = paired_difference(*runs(token_table, [[3.0, None, 1.0]], [[1.0, 5.0, None]]))
    assert (difference.per_token.value, difference.n_positions) == (2.0, 1)
    assert (difference.n_only_a, difference.n_only_b) == (1, 1)


def test_infinite_kl_of_one_run_leaves_no_finite_difference(token_table: Build):
    a, b = runs(token_table, [[3.0, 1.0]], [[1.0, None]])
    b = b.with_columns(reason=pl.Series([None, "infinite"]))
    difference = paired_difference(a, b)
    assert difference.per_token.value is None
    assert "infinite at 1" in (difference.per_token.no_interval or "")


def test_responses_of_one_run_only_are_left_out(token_table: Build):
    difference = paired_difference(*runs(token_table, [[1.0], [9.0]], [[0.5]]))
    assert (difference.per_token.value, difference.per_token.n_clusters) == (0.5, 1)


def test_files_joined_in_batches_give_the_same(token_table: Build, monkeypatch: pytest.MonkeyPatch):
    rng = np.random.default_rng(4)
    a, b = (rng.gamma(1.0, 1.0, (8, 5)).tolist() for _ in range(2))
    whole = paired_difference(*runs(token_table, a, b))
    monkeypatch.setattr(kl.statistics.paired, "BATCH_ROWS", 6)
    assert paired_difference(*runs(token_table, a, b)) == whole


def test_one_sampled_and_one_full_run_are_weighted_by_the_sample(token_table: Build):
    a, b = runs(token_table, [[2.0, 4.0, 6.0, 8.0]], [[1.0, None, 2.0, None]])
    sampled = b.with_columns(
        pi=pl.lit(0.5), selected=pl.col("kl_estimate").is_not_null(), error=pl.lit(None, dtype=pl.String)
    )
    difference = paired_difference(a, sampled)
    # ((2 - 1) + (6 - 2)) / .5 over the 4 positions of the response
    assert (difference.per_token.value, difference.per_response.value) == (2.5, 10.0)


@pytest.mark.parametrize("changed", ["which positions", "how many"])
def test_runs_that_sampled_differently_are_refused(token_table: Build, changed: str):
    a, b = runs(token_table, [[2.0, None]], [[None, 2.0]] if changed == "which positions" else [[2.0, None]])
    sampled = [
        run.with_columns(pi=pl.lit(pi), selected=pl.col("kl_estimate").is_not_null(), error=pl.lit(None, pl.String))
        for run, pi in ((a, 0.5), (b, 0.5 if changed == "which positions" else 0.25))
    ]
    with pytest.raises(IncomparableRunsError, match="f0#0: the first run and the second sampled different positions"):
        paired_difference(*sampled)


@pytest.mark.parametrize(
    ("column", "value"),
    [
        pytest.param("token", pl.lit("other"), id="other token"),
        pytest.param("token_id", pl.lit(99, pl.Int64), id="other token id"),
        pytest.param("prompt_id", pl.lit("other"), id="other prompt"),
        pytest.param("logprob_p", pl.lit(-1.01), id="other log-probability of P"),
    ],
)
def test_another_p_is_refused(token_table: Build, column: str, value: pl.Expr):
    a, b = runs(token_table, [[1.0]], [[1.0]])
    with pytest.raises(IncomparableRunsError, match=f"f0#0 position 0: {column} is .* in the first run"):
        paired_difference(a, b.with_columns(value.alias(column)))


def test_a_response_of_another_length_is_refused(token_table: Build):
    with pytest.raises(IncomparableRunsError, match="f0#0 has 2 positions in the first run and 1"):
        paired_difference(*runs(token_table, [[1.0, 1.0]], [[1.0]]))


def test_runs_that_share_nothing_are_refused(token_table: Build):
    a, _ = runs(token_table, [[1.0]], [])
    with pytest.raises(ValueError, match="share no response"):
        paired_difference(a, a.with_columns(source_file=pl.lit("elsewhere")))
