"""Many models against one P: which is nearest, and whether the others can be told apart from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import polars as pl
from scipy.special import stdtrit

from kl.statistics.clusters import by_prompt, per_token, usable
from kl.statistics.intervals import CONFIDENCE, Estimate, ratio_estimate, unknown_estimate
from kl.statistics.paired import POSITION_KEYS, IncomparableRunsError, shared_batches
from kl.tables.totals import INFINITE, IS_INFINITE, batch_totals, denominator, empty_columns, merge_totals

_METRIC = "kl_estimate"


@dataclass(frozen=True, slots=True)
class RankedRun:
    """One run of a `Ranking`; ``number`` counts the runs as they were given, from 0.

    ``per_token`` is its KL over the positions that all runs measured, in nats. ``above_nearest`` is that less the KL of
    the nearest run, with an interval at the ranking's ``level``; ``None`` of the nearest itself. ``apart`` says whether
    this interval excludes 0; ``None`` where there is none.
    """

    number: int
    per_token: Estimate
    above_nearest: Estimate | None
    apart: bool | None


@dataclass(frozen=True, slots=True)
class Ranking:
    """Runs by their KL per token, the nearest to P first; those without a value last.

    ``level`` is that of each interval of a difference, such that all ``n_comparisons`` differences between two of the
    runs are covered together with 95 %. Of the shared responses ``n_positions`` were measured by all runs, and
    ``n_left_out`` by some.
    """

    runs: list[RankedRun]
    n_positions: int
    n_left_out: int
    n_comparisons: int
    level: float


def rank_runs(tables: Sequence[pl.LazyFrame], names: Sequence[str]) -> Ranking:
    """Rank runs over the responses and positions that all of them measured, with paired differences from the nearest.

    The nearest is chosen by the same data that it is then compared on. The intervals are therefore widened to all
    ``N (N - 1) / 2`` differences between two runs (Bonferroni), whichever of them turns out to be looked at; with two
    runs the level is the usual 95 %. One pass, some files at a time.

    Parameters
    ----------
    tables : sequence of pl.LazyFrame
        Token tables (`kl.tables.schemas.TOKENS`) of two or more runs against one P.
    names : sequence of str
        What they are called in errors.

    Raises
    ------
    IncomparableRunsError
        If no response is in all tables, or as `kl.statistics.paired.shared_batches`.
    TokenTableError
        If a table contradicts itself.
    """
    parts: list[list[pl.DataFrame]] = [[] for _ in tables]
    n_left_out = 0
    for shared in shared_batches(tables, names):
        joint = _joint(shared)
        n_left_out += int((joint["by_some"] & ~joint["by_all"]).sum())
        for run_parts, rows in zip(parts, shared, strict=True):
            run_parts.append(_totals_of(rows, joint))
    if not parts[0]:
        raise IncomparableRunsError("no response is in all runs; compare runs over the same input files.")
    totals = [merge_totals(run_parts) for run_parts in parts]
    values = [per_token(run_totals, _METRIC) for run_totals in totals]
    order = sorted(range(len(tables)), key=lambda number: _rank(values[number]))
    n_comparisons = len(tables) * (len(tables) - 1) // 2
    level = 1 - (1 - CONFIDENCE) / n_comparisons
    nearest = order[0]
    runs = [RankedRun(nearest, values[nearest], None, None)]
    for number in order[1:]:
        unknown = next((value for value in (values[number], values[nearest]) if value.value is None), None)
        if unknown is None:
            above = _at_level(_difference(totals[number], totals[nearest]), level)
        else:
            above = unknown_estimate(unknown.no_interval or "it has no value")
        runs.append(RankedRun(number, values[number], above, _excludes_zero(above)))
    n_positions = max(int(run_totals[f"{_METRIC}.n"].sum()) for run_totals in totals)
    return Ranking(runs, n_positions, n_left_out, n_comparisons, level)


def _rank(estimate: Estimate) -> tuple[bool, float]:
    return estimate.value is None, 0.0 if estimate.value is None else estimate.value


def _joint(shared: Sequence[pl.DataFrame]) -> pl.DataFrame:
    """Of each position: whether all runs sampled it, how likely that was, and whether all, or some, measured it.

    An infinite KL is measured.
    """
    measured = [rows.select(m=pl.col(_METRIC).is_not_null() | IS_INFINITE)["m"] for rows in shared]
    columns = {
        "selected": [rows["selected"] for rows in shared],
        "pi": [rows["pi"] for rows in shared],
        "measured": measured,
    }
    wide = pl.DataFrame(
        [series.alias(f"{name}{i}") for name, found in columns.items() for i, series in enumerate(found)]
    )
    return wide.select(
        selected=pl.all_horizontal("^selected.*$"),
        pi=pl.min_horizontal("^pi.*$"),
        by_all=pl.all_horizontal("^measured.*$"),
        by_some=pl.any_horizontal("^measured.*$"),
    )


def _totals_of(rows: pl.DataFrame, joint: pl.DataFrame) -> pl.DataFrame:
    """Sums per response of one run over the positions that all measured."""
    by_all = pl.col("by_all")
    both = pl.concat([rows.drop("selected", "pi"), joint], how="horizontal")
    infinite = by_all & (pl.col("reason") == INFINITE).fill_null(False)
    kept = both.select(
        *POSITION_KEYS,
        "prompt_id",
        "selected",
        "pi",
        reason=pl.when(infinite).then(pl.lit(INFINITE)),
        error=pl.when(infinite | ~by_all).then(pl.lit("infinite, or not measured in all runs")),
        kl_estimate=pl.when(by_all).then(_METRIC),
    )
    return batch_totals(empty_columns(kept))


def _difference(totals: pl.DataFrame, nearest: pl.DataFrame) -> Estimate:
    """Paired difference per token; both tables have the same responses, and in each the same positions."""
    (above, below), (above_nearest, _) = (
        by_prompt(usable(part, _METRIC), pl.col(f"{_METRIC}.sum"), denominator(_METRIC)) for part in (totals, nearest)
    )
    return ratio_estimate(above - above_nearest, below, n=int(totals[f"{_METRIC}.n"].sum()))


def _at_level(estimate: Estimate, level: float) -> Estimate:
    """The same with an interval at another level; without one where there is none."""
    if estimate.value is None or estimate.se is None or estimate.ci_low is None:
        return estimate
    half = float(stdtrit(estimate.n_clusters - 1, (1 + level) / 2)) * estimate.se
    return replace(estimate, ci_low=estimate.value - half, ci_high=estimate.value + half)


def _excludes_zero(estimate: Estimate) -> bool | None:
    if estimate.ci_low is None or estimate.ci_high is None:
        return None
    return not estimate.ci_low <= 0 <= estimate.ci_high
