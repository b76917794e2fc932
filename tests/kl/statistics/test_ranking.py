"""Many models against one P: their order, the paired differences, and how far intervals are widened."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import polars as pl
import pytest
from scipy.stats import t

from kl.statistics.paired import IncomparableRunsError, paired_difference
from kl.statistics.ranking import Ranking, rank_runs

Build = Callable[..., pl.DataFrame]
N_PROMPTS = 8


def table(build: Build, kl: Sequence[Sequence[float | None]]) -> pl.LazyFrame:
    """One response per prompt."""
    return build([(f"f{i}", f"p{i}", 0, values) for i, values in enumerate(kl)]).lazy()


def ranked(*tables: pl.LazyFrame) -> Ranking:
    return rank_runs(tables, [f"run {number}" for number in range(len(tables))])


def gamma(seed: int, scale: float) -> list[list[float]]:
    return np.random.default_rng(seed).gamma(1.0, scale, (N_PROMPTS, 5)).tolist()


def test_the_nearest_is_first_and_the_others_have_the_paired_difference_at_a_wider_level(token_table: Build):
    tables = [table(token_table, gamma(seed, scale)) for seed, scale in ((1, 3.0), (2, 1.0), (3, 1.1))]
    found = ranked(*tables)
    assert [run.number for run in found.runs] == [1, 2, 0]
    assert (found.n_positions, found.n_left_out, found.n_comparisons) == (40, 0, 3)
    nearest, *others = found.runs
    assert (nearest.above_nearest, nearest.apart) == (None, None)
    for run in others:
        pair = paired_difference(tables[run.number], tables[1]).per_token
        above = run.above_nearest
        assert above is not None
        assert (above.value, above.se) == pytest.approx((pair.value, pair.se))
        # Three differences at 95 % together: each at 1 - .05/3.
        half = t.ppf(1 - 0.05 / 6, N_PROMPTS - 1) * pair.se
        assert (above.ci_low, above.ci_high) == pytest.approx((pair.value - half, pair.value + half))
        assert run.apart == (above.ci_low > 0)
    assert [run.apart for run in others] == [False, True]


def test_two_runs_have_the_usual_interval(token_table: Build):
    a, b = (table(token_table, gamma(seed, 1.0)) for seed in (1, 2))
    found = ranked(a, b)
    pair = paired_difference(*((a, b) if found.runs[1].number == 0 else (b, a))).per_token
    above = found.runs[1].above_nearest
    assert above is not None
    assert (above.ci_low, above.ci_high) == pytest.approx((pair.ci_low, pair.ci_high))


def test_only_positions_that_all_runs_measured_take_part(token_table: Build):
    whole = [[1.0, 5.0]] * 6
    found = ranked(*(table(token_table, kl) for kl in (whole, [[2.0, None]] * 6, whole)))
    assert [run.per_token.value for run in found.runs] == [1.0, 1.0, 2.0]
    assert (found.n_positions, found.n_left_out) == (6, 6)
    assert found.runs[1].apart is False  # a difference of 0 at every prompt


def test_an_infinite_run_is_last_and_takes_nothing_from_the_others(token_table: Build):
    at = (pl.col("source_file") == "f0") & (pl.col("position") == 1)
    endless = table(token_table, gamma(1, 0.1)).with_columns(
        kl_estimate=pl.when(~at).then("kl_estimate"),
        reason=pl.when(at).then(pl.lit("infinite")),
        error=pl.when(at).then(pl.lit("P allows a token that Q excludes")),
    )
    found = ranked(endless, table(token_table, gamma(2, 1.0)), table(token_table, gamma(3, 3.0)))
    assert [run.number for run in found.runs] == [1, 2, 0]
    assert found.n_positions == 40
    last = found.runs[-1]
    assert "infinite at 1 of" in (last.per_token.no_interval or "")
    assert last.apart is None


def test_a_sampled_run_beside_full_ones_weighs_what_it_sampled(token_table: Build):
    def sampled(frame: pl.LazyFrame) -> pl.LazyFrame:
        return frame.with_columns(
            pi=pl.lit(0.5), selected=pl.col("kl_estimate").is_not_null(), error=pl.lit(None, pl.String)
        )

    full, part = table(token_table, [[2.0, 4.0, 6.0, 8.0]]), sampled(table(token_table, [[1.0, None, 2.0, None]]))
    found = ranked(full, part, full)
    # (2 + 6)/.5 and (1 + 2)/.5 over the 4 positions of the response
    assert [run.per_token.value for run in found.runs] == [1.5, 4.0, 4.0]
    other = sampled(table(token_table, [[None, 1.0, None, 2.0]]))
    with pytest.raises(IncomparableRunsError, match="f0#0: run 1 and run 2 sampled different positions"):
        ranked(full, part, other)


def test_runs_over_other_responses_are_named(token_table: Build):
    a = table(token_table, [[1.0]])
    with pytest.raises(IncomparableRunsError, match="token is 't0' in run 0 and 'other' in run 2"):
        ranked(a, a, a.with_columns(token=pl.lit("other")))
    with pytest.raises(IncomparableRunsError, match="no response is in all runs"):
        ranked(a, a, a.with_columns(source_file=pl.lit("elsewhere")))
