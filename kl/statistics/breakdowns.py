"""Where the divergence sits: percentiles of the token KL, the worst tokens, positions and prompts.

All tables are bounded, whatever the size of the data set. Positions are weighted by 1/π, so that a random subset of
them estimates what all would give.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import polars as pl
from numpy.typing import ArrayLike, NDArray

from kl.statistics.clusters import response_sums, usable
from kl.tables.pairs import LONE_VALUE
from kl.tables.totals import IS_INFINITE, MEASURED, WEIGHT, denominator, token_batches

TOP_ROWS = 50
LARGE_SHARE, LARGE_TIMES = 0.05, 10  # of all KL, and of the share that a position has on average: at least both
SINGLE_POSITIONS = 32  # positions below stand alone, from there bins double in width

# As `llama-perplexity --kl-divergence` prints them.
QUANTILES = {
    "Maximum KLD": 1.0,
    "99.9% KLD": 0.999,
    "99.0% KLD": 0.99,
    "95.0% KLD": 0.95,
    "90.0% KLD": 0.90,
    "Median KLD": 0.50,
    "10.0% KLD": 0.10,
    "5.0% KLD": 0.05,
    "1.0% KLD": 0.01,
    "0.1% KLD": 0.001,
    "Minimum KLD": 0.0,
}

FloatArray = NDArray[np.float64]
Row = dict[str, Any]

_COLUMNS = (
    *("source_file", "response_idx", "prompt_id", "position", "token"),
    *("selected", "pi", "reason", "error", "kl_estimate", "kl_lower"),
)


def weighted_quantiles(values: ArrayLike, probabilities: ArrayLike, weights: ArrayLike | None = None) -> FloatArray:
    """Quantiles with linear interpolation; with equal weights NumPy's default, bit for bit.

    The i-th smallest value stands at ``Σ_{j<i} (w_j + w_{j+1})/2``, scaled to [0, 1]: for equal weights i/(n-1).

    Parameters
    ----------
    values : float64, shape (n,), n at least 1
    probabilities : float64, shape (m,), in [0, 1]
    weights : float64, shape (n,), optional
        Positive.

    Returns
    -------
    float64, shape (m,)
    """
    data, wanted = np.asarray(values, dtype=np.float64), np.atleast_1d(np.asarray(probabilities, dtype=np.float64))
    heavy = None if weights is None else np.asarray(weights, dtype=np.float64)
    if heavy is None or heavy.min() == heavy.max():
        return np.quantile(data, wanted)
    order = np.argsort(data, kind="stable")
    sizes = heavy[order]
    places = np.concatenate(([0.0], np.cumsum((sizes[:-1] + sizes[1:]) / 2)))
    return np.interp(wanted, places / places[-1], data[order])


def top_share(values: FloatArray, weights: FloatArray | None, fraction: float) -> float | None:
    """Share of the total that the largest ``fraction`` of the positions hold; ``None`` where the total is not above 0.

    A boundary inside a position takes the part of it that is above the boundary.
    """
    heavy = np.ones_like(values) if weights is None else weights
    order = np.argsort(-values, kind="stable")
    data, sizes = values[order], heavy[order]
    total = float(data @ sizes)
    if total <= 0:
        return None
    before = np.cumsum(sizes) - sizes
    taken = np.clip(fraction * float(sizes.sum()) - before, 0.0, sizes)
    return float(data @ taken) / total


def kl_distribution(tokens: pl.LazyFrame) -> tuple[dict[str, float | None], float | None]:
    """Percentiles of the token KL under llama.cpp's names, and the share of the KL in the top 1 % of positions.

    Holds one float64 per measured position, and a second one if positions were sampled unequally. ``None`` where an
    infinite KL makes a percentile, or the total, infinite.
    """
    rows = tokens.filter(IS_INFINITE | (MEASURED & pl.col("kl_estimate").is_not_null()))
    values = pl.when(IS_INFINITE).then(float("inf")).otherwise("kl_estimate")
    column = rows.select(kl=values).collect()["kl"].to_numpy()
    if len(column) == 0:
        return dict.fromkeys(QUANTILES), None
    low, high = rows.select(low=WEIGHT.min(), high=WEIGHT.max()).collect().row(0)
    weights = None if low == high else rows.select(WEIGHT).collect().to_series().to_numpy()
    with np.errstate(invalid="ignore"):
        quantiles = weighted_quantiles(column, list(QUANTILES.values()), weights).tolist()
    known = {name: value if math.isfinite(value) else None for name, value in zip(QUANTILES, quantiles, strict=True)}
    return known, top_share(column, weights, 0.01) if np.isfinite(column).all() else None


def missing_by_reason(tokens: pl.LazyFrame) -> dict[str, int]:
    """Positions that were asked and not measured, by reason, the most frequent first."""
    return _by_reason(tokens.filter(pl.col("selected") & ~MEASURED))


def bounds_only_by_reason(tokens: pl.LazyFrame) -> dict[str, int]:
    """Measured positions without a point estimate, by reason, the most frequent first."""
    return _by_reason(tokens.filter(MEASURED & pl.col("kl_estimate").is_null()))


def flagged(tokens: pl.LazyFrame) -> dict[str, int]:
    """Measured positions by the codes of what to know of their lists, the most frequent first."""
    if "flags" not in tokens.collect_schema():  # written by an earlier version
        return {}
    codes = tokens.filter(MEASURED).select(pl.col("flags").drop_nulls().str.split(",").explode()).collect()
    counts = codes.group_by("flags").len().sort(["len", "flags"], descending=[True, False])
    return dict(counts.iter_rows())


class Outlying(NamedTuple):
    """The position with the largest KL, ``None`` where there is none, and those that stand out, by falling KL."""

    largest: Row | None
    rows: list[Row]


def outlying(tokens: pl.LazyFrame, totals: pl.DataFrame) -> Outlying:
    """Positions by name: those set aside as a value is wrong, those where one may be, and those that hold much.

    Each has ``source_file, response_idx, position, token, kind, kl, share``: the ``kind`` is ``set-aside`` (``kl`` is
    what it would have counted), ``lone-value`` (a token is far off all others, which may be real) or ``large``; the
    ``share`` is of all KL, ``None`` where that is 0 or infinite. Kinds stand in the order ``set-aside``, ``large``,
    ``lone-value``, each with its 50 largest at most. ``totals`` are `response_totals`.
    """
    known = tokens.collect_schema()  # of an earlier version without the two columns
    aside = pl.col("kl_set_aside") if "kl_set_aside" in known else pl.lit(None, dtype=pl.Float64)
    lone = pl.col("flags").str.split(",").list.contains(LONE_VALUE) if "flags" in known else pl.lit(value=False)
    counts = MEASURED & pl.col("kl_estimate").is_not_null()
    held = pl.col("kl_estimate") * WEIGHT
    most = tokens.select(held.filter(counts).max().fill_null(-1.0)).collect().item()
    total, weight = float(totals["kl_estimate.sum"].sum()), float(totals["kl_estimate.weight"].sum())
    is_known = total > 0 and not totals["n_infinite"].sum()
    large = (
        counts & is_known & (held >= LARGE_SHARE * total) & (held >= LARGE_TIMES * total * WEIGHT / max(weight, 1.0))
    )
    share = pl.when(counts).then(held / total).otherwise(aside * WEIGHT / (total + aside * WEIGHT))
    named = tokens.select(
        *("source_file", "response_idx", "position", "token"),
        kind=pl.when(aside.is_not_null()).then(pl.lit("set-aside")).when(large).then(pl.lit("large"))
        .when(counts & lone).then(pl.lit("lone-value")),
        kl=pl.when(counts).then("kl_estimate").otherwise(aside),
        share=share if is_known else pl.lit(None, dtype=pl.Float64),
        is_most=(counts & (held == most)).fill_null(value=False),
    ).filter(pl.col("is_most") | pl.col("kind").is_not_null())  # fmt: skip
    found = named.collect().sort(
        ["kl", "source_file", "response_idx", "position"], descending=[True, False, False, False]
    )
    largest = found.filter("is_most").drop("is_most").head(1).to_dicts()
    rows = [
        row
        for kind in ("set-aside", "large", "lone-value")
        for row in found.filter(pl.col("kind") == kind).drop("is_most").head(TOP_ROWS).to_dicts()
    ]
    return Outlying(largest[0] if largest else None, rows)


def stops(tokens: pl.LazyFrame) -> pl.DataFrame:
    """``source_file``, ``response_idx``, ``has_stop`` of each response: whether the end of the turn is a position.

    Responses of which a table of an earlier version does not say so are left out.
    """
    found = pl.col("is_stop") if "is_stop" in tokens.collect_schema() else pl.lit(None, dtype=pl.Boolean)
    rows = tokens.select("source_file", "response_idx", has_stop=found).drop_nulls("has_stop")
    return rows.group_by("source_file", "response_idx").agg(pl.col("has_stop").any()).collect()


def _by_reason(rows: pl.LazyFrame) -> dict[str, int]:
    counts = rows.group_by(pl.col("reason").fill_null("unknown")).len().collect()
    return dict(counts.sort(["len", "reason"], descending=[True, False]).iter_rows())


def by_token_and_position(tokens: pl.LazyFrame) -> tuple[list[Row], list[Row]]:
    """The tokens with the largest total KL, and the mean KL along the response.

    Returns
    -------
    by_token : list of dict
        ``token, n_measured, kl_sum, kl_mean, kl_share``; at most 50, by falling ``kl_sum``.
    by_position : list of dict
        ``first, last, n_measured, kl_mean, kl_lower_mean``; ``last`` is inclusive. The first 32 positions stand alone.
    """
    token_sums = position_sums = None
    for batch in token_batches(tokens, _COLUMNS):
        rows = batch.filter(MEASURED & pl.col("kl_estimate").is_not_null())
        # Merged at once, so that the tables never grow beyond the vocabulary and the bins.
        token_sums = _add(token_sums, rows, "token")
        position_sums = _add(position_sums, rows.with_columns(_first_of_bin(rows["position"])), "first")
    assert token_sums is not None
    assert position_sums is not None
    return _rank_tokens(token_sums), _along_positions(position_sums)


def by_prompt(totals: pl.DataFrame) -> list[Row]:
    """The prompts with the largest mean KL per token, at most 50.

    Each with ``prompt_id, source_file`` (the first), ``n_responses, n_measured, kl_per_token, kl_per_response``. Those
    with an infinite KL come first, their means are ``None``.
    """
    rows = usable(totals, "kl_estimate").filter(pl.col("n_selected") > 0)
    sums = rows.with_columns(response_sums(rows, "kl_estimate", extrapolate=True).alias("kl_response"))
    grouped = sums.group_by("prompt_id", maintain_order=True).agg(
        pl.col("source_file").first(),
        pl.len().alias("n_responses"),
        pl.col("n_measured").sum(),
        _unless_infinite(pl.col("kl_estimate.sum").sum() / denominator("kl_estimate").sum()).alias("kl_per_token"),
        _unless_infinite(pl.col("kl_response").mean()).alias("kl_per_response"),
    )
    return (
        grouped.sort(["kl_per_token", "prompt_id"], descending=[True, False], nulls_last=False)
        .head(TOP_ROWS)
        .to_dicts()
    )


def _unless_infinite(mean: pl.Expr) -> pl.Expr:
    return pl.when(pl.col("n_infinite").sum() == 0).then(mean)


def _add(before: pl.DataFrame | None, rows: pl.DataFrame, key: str) -> pl.DataFrame:
    sums = rows.group_by(key, maintain_order=True).agg(
        pl.len().cast(pl.Int64).alias("n_measured"),
        pl.col("kl_lower").is_not_null().sum().cast(pl.Int64).alias("n_lower"),
        (pl.col("kl_estimate") * WEIGHT).sum().alias("kl_sum"),
        (pl.col("kl_lower") * WEIGHT).sum().alias("lower_sum"),
        WEIGHT.sum().alias("weight"),
    )
    if before is None:
        return sums
    return pl.concat([before, sums]).group_by(key, maintain_order=True).agg(pl.exclude(key).sum())


def _rank_tokens(sums: pl.DataFrame) -> list[Row]:
    total = float(sums["kl_sum"].sum())
    share = pl.col("kl_sum") / total if total > 0 else pl.lit(None, dtype=pl.Float64)
    ranked = sums.sort(["kl_sum", "token"], descending=[True, False]).head(TOP_ROWS)
    mean = pl.col("kl_sum") / pl.col("weight")
    return ranked.select("token", "n_measured", "kl_sum", kl_mean=mean, kl_share=share).to_dicts()


def _along_positions(sums: pl.DataFrame) -> list[Row]:
    last = pl.when(pl.col("first") < SINGLE_POSITIONS).then("first").otherwise(2 * pl.col("first") - 1)
    mean = pl.col("kl_sum") / pl.col("weight")
    lower = pl.when(pl.col("n_lower") == pl.col("n_measured")).then(pl.col("lower_sum") / pl.col("weight"))
    binned = sums.sort("first").select("first", "n_measured", last=last, kl_mean=mean, kl_lower_mean=lower)
    return binned.select("first", "last", "n_measured", "kl_mean", "kl_lower_mean").to_dicts()


def _first_of_bin(positions: pl.Series) -> pl.Series:
    doubling = [SINGLE_POSITIONS << step for step in range(26)]
    edges = np.array([*range(SINGLE_POSITIONS), *doubling], dtype=np.int64)
    return pl.Series("first", edges[np.searchsorted(edges, positions.to_numpy(), side="right") - 1], dtype=pl.Int64)
