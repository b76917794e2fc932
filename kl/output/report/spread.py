"""How the token KL is spread: over sizes, over positions, over entropies. One pass, tables of bounded size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import polars as pl

from kl.statistics.breakdowns import SINGLE_POSITIONS
from kl.statistics.intervals import ratio_estimate
from kl.tables.totals import IS_INFINITE, MEASURED, WEIGHT, token_batches

SMALLEST = 1e-6  # nats; what is below stands in one bin, with what is 0 or negative
BINS_PER_DECADE = 8
N_BINS = 8 * BINS_PER_DECADE  # to 100 nats, which no vocabulary exceeds by much
ENTROPY_STEP = 0.05  # nats
_LAST_ENTROPY_BIN = 400

_COLUMNS = (
    *("source_file", "response_idx", "prompt_id", "position", "selected", "pi", "reason", "error"),
    *("kl_estimate", "kl_lower", "entropy_p"),
)


class Spread(NamedTuple):
    """Tables of the measured positions, each weighted by 1/π.

    Attributes
    ----------
    sizes : pl.DataFrame
        ``bin, n, weight``: bin b ≥ 0 holds `edge` (b) to `edge` (b + 1) nats, -1 what is below `SMALLEST`.
    n_infinite, infinite_weight : int, float
        Positions with an infinite KL, which are in no table, and the sum of their weights.
    positions : pl.DataFrame
        ``first, last, n, mean, lower, ci_low, ci_high``: the mean KL of the positions ``first`` to ``last`` of the
        responses, its certified lower bound (null if one is unknown) and its 95 % interval, clustered by prompt (null
        below five prompts).
    entropies : pl.DataFrame
        ``column, bin, n, weight``: column c holds c to c + 1 times `ENTROPY_STEP` nats of P's entropy.
    """

    sizes: pl.DataFrame
    n_infinite: int
    infinite_weight: float
    positions: pl.DataFrame
    entropies: pl.DataFrame


def edge(number: int) -> float:
    """Where a bin of the token KL begins, in nats."""
    return SMALLEST * 10.0 ** (number / BINS_PER_DECADE)


def spread_of(tokens: pl.LazyFrame) -> Spread:
    """Of a token table (`kl.tables.schemas.TOKENS`).

    Holds one batch of rows and a row for each prompt and bin of positions (some 40 bins).

    Raises
    ------
    TokenTableError
        If the table contradicts itself.
    """
    sizes: list[pl.DataFrame] = []
    places: list[pl.DataFrame] = []
    entropies: list[pl.DataFrame] = []
    n_infinite, infinite_weight = 0, 0.0
    for batch in token_batches(tokens, _COLUMNS):
        infinite = batch.filter(IS_INFINITE).select(WEIGHT)
        n_infinite += infinite.height
        infinite_weight += float(infinite.to_series().sum())
        rows = batch.filter(MEASURED & pl.col("kl_estimate").is_not_null()).select(
            "prompt_id", _bin(), _first(), _column(), "kl_estimate", "kl_lower", weight=WEIGHT
        )
        sizes.append(_counted(rows, ["bin"]))
        entropies.append(_counted(rows.drop_nulls("column"), ["column", "bin"]))
        places.append(_place_sums(rows))
    counted = _merged(sizes, ["bin"]), n_infinite, infinite_weight
    return Spread(*counted, _along(places), _merged(entropies, ["column", "bin"]))


def _bin() -> pl.Expr:
    kl = pl.col("kl_estimate")
    # A value on an edge is in the bin that begins there, whatever the logarithm's last digit.
    number = ((kl / SMALLEST).log10() * BINS_PER_DECADE + 1e-9).floor().clip(0, N_BINS - 1)
    return pl.when(kl >= SMALLEST).then(number).otherwise(-1).cast(pl.Int64).alias("bin")


def _column() -> pl.Expr:
    return (pl.col("entropy_p") / ENTROPY_STEP).floor().clip(0, _LAST_ENTROPY_BIN).cast(pl.Int64).alias("column")


def _first() -> pl.Expr:
    """The first position of the bin, as in ``by_position`` of the summary: 0 to 31 alone, then doubling in width."""
    place = pl.col("position").cast(pl.Int64)
    doubling = pl.lit(2).pow(place.clip(1).cast(pl.Float64).log(2.0).add(1e-12).floor()).cast(pl.Int64)
    return pl.when(place < SINGLE_POSITIONS).then(place).otherwise(doubling).alias("first")


def _counted(rows: pl.DataFrame, by: Sequence[str]) -> pl.DataFrame:
    return rows.group_by(by, maintain_order=True).agg(n=pl.len().cast(pl.Int64), weight=pl.col("weight").sum())


def _merged(parts: Sequence[pl.DataFrame], by: Sequence[str]) -> pl.DataFrame:
    return pl.concat(parts).group_by(by, maintain_order=True).agg(pl.col("n", "weight").sum()).sort(by)


def _place_sums(rows: pl.DataFrame) -> pl.DataFrame:
    return rows.group_by("first", "prompt_id", maintain_order=True).agg(
        n=pl.len().cast(pl.Int64),
        n_lower=pl.col("kl_lower").is_not_null().sum().cast(pl.Int64),
        kl=(pl.col("kl_estimate") * pl.col("weight")).sum(),
        lower=(pl.col("kl_lower") * pl.col("weight")).sum(),
        weight=pl.col("weight").sum(),
    )


def _along(parts: Sequence[pl.DataFrame]) -> pl.DataFrame:
    sums = pl.concat(parts).group_by("first", "prompt_id", maintain_order=True).agg(pl.exclude("first").sum())
    rows: list[tuple[int, int, int, float, float | None, float | None, float | None]] = []
    for (first,), group in sums.sort("first").group_by(["first"], maintain_order=True):
        assert isinstance(first, int)
        kl, weight = group["kl"].to_numpy(), group["weight"].to_numpy()
        n = int(group["n"].sum())
        found = ratio_estimate(kl, weight, n=n)
        assert found.value is not None
        lower = float(group["lower"].sum() / np.sum(weight)) if group["n_lower"].sum() == n else None
        last = first if first < SINGLE_POSITIONS else 2 * first - 1
        rows.append((first, last, n, found.value, lower, found.ci_low, found.ci_high))
    schema = {"first": pl.Int64, "last": pl.Int64, "n": pl.Int64} | dict.fromkeys(
        ("mean", "lower", "ci_low", "ci_high"), pl.Float64
    )
    return pl.DataFrame(rows, schema=schema, orient="row")
