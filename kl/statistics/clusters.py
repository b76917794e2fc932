"""Estimates over responses and prompts from the sums per response (`kl.tables.totals.response_totals`).

Two means are reported, and they differ: per token, ``Σ S_r / Σ T_r`` (long responses weigh more; llama.cpp prints this
one), and per response, the mean of ``S_r``, in nats per response.
"""

from __future__ import annotations

import polars as pl

from kl.statistics.intervals import Estimate, clusters_needed, ratio_estimate, unknown_estimate
from kl.tables.totals import denominator

# A bound with a hole in it bounds nothing, and k1 and k3 over the convenient tokens are biased: unknown at one measured
# position, unknown in the mean. Everything else is a mean over the positions where it is known, with their number.
EVERYWHERE = frozenset(
    ("kl_lower", "kl_upper_plausible", "reverse_kl_lower", "js_lower", "tv_lower", "logratio_k1", "k3")
)

# A mean with one infinite term is infinite, and so is its upper limit, whatever the lists alone would leave plausible;
# the mean of the others would look like a small divergence.
INFINITE_WITH_ONE = frozenset(("kl_estimate", "kl_exact", "kl_upper_plausible"))


def usable(totals: pl.DataFrame, metric: str) -> pl.DataFrame:
    """The responses that inform on ``metric``: it is known somewhere, or sampling left out every position by design."""
    return totals.filter((pl.col(f"{metric}.n") > 0) | (pl.col("n_selected") == 0))


def per_token(totals: pl.DataFrame, metric: str) -> Estimate:
    """Mean of ``metric`` per position, with its interval.

    Parameters
    ----------
    totals : pl.DataFrame
        From `response_totals`.
    metric : str
        A name of `kl.tables.totals.METRICS`. Without a value if it is one of ``EVERYWHERE`` and lacks a position,
        or if it is infinite at one.
    """
    rows = usable(totals, metric)
    unknown = _unknown(totals, metric)
    if unknown is not None:
        return unknown
    above, below = by_prompt(rows, pl.col(f"{metric}.sum"), denominator(metric))
    n, n_measured = _total(totals, f"{metric}.n"), _total(totals, "n_measured")
    variance = _iid_token_variance(rows) if metric == "kl_estimate" else None
    return ratio_estimate(above, below, n=n, n_unknown=n_measured - n, iid_variance=variance)


def per_response(totals: pl.DataFrame, metric: str, *, extrapolate: bool = True) -> Estimate:
    """Mean over the responses of the sum of ``metric``, with its interval; as for `per_token`, it may have no value.

    A response that lacks positions counts with its sum times all positions / positions known: that assumes the missing
    ones to be like the others of their response. With ``extrapolate=False`` the sum stands as it is, which for a lower
    bound needs no assumption, as every term left out is at least 0.
    """
    rows = usable(totals, metric)
    unknown = _unknown(totals, metric)
    if unknown is not None:
        return unknown
    sums = response_sums(rows, metric, extrapolate=extrapolate)
    above, below = by_prompt(rows.with_columns(sums), pl.col("sum"), pl.lit(1.0))
    variance = sums.var() if rows.height > 1 else None
    iid = float(variance) / rows.height if isinstance(variance, float) else None
    return ratio_estimate(above, below, n=rows.height, iid_variance=iid)


def response_sums(rows: pl.DataFrame, metric: str, *, extrapolate: bool) -> pl.Series:
    """Sum of ``metric`` of each response, in nats; extrapolated over the positions that lack it if asked."""
    complete = (pl.col(f"{metric}.n") == pl.col("n_selected")) | (not extrapolate)
    factor = pl.when(complete).then(1.0).otherwise(pl.col("n_positions") / denominator(metric))
    return rows.select((pl.col(f"{metric}.sum") * factor).alias("sum")).to_series()


def prompts_needed(totals: pl.DataFrame, relative: float) -> int | None:
    """How many prompts like these give the mean KL per token to ``± relative``; ``None`` if not known."""
    rows = usable(totals, "kl_estimate")
    if _unknown(totals, "kl_estimate") is not None:
        return None
    return clusters_needed(*by_prompt(rows, pl.col("kl_estimate.sum"), denominator("kl_estimate")), relative)


def _unknown(totals: pl.DataFrame, metric: str) -> Estimate | None:
    n, n_measured = _total(totals, f"{metric}.n"), _total(totals, "n_measured")
    n_infinite = _total(totals, "n_infinite")
    if n_infinite and metric in INFINITE_WITH_ONE:
        why = f"infinite at {n_infinite:,} of {n_measured:,} measured positions"
        return unknown_estimate(why, n=n, n_unknown=n_measured - n)
    if n_measured == 0:
        return unknown_estimate("nothing was measured")
    if n == 0 or (n < n_measured and metric in EVERYWHERE):
        why = f"not known at {n_measured - n:,} of {n_measured:,} measured positions"
        return unknown_estimate(why, n=n, n_unknown=n_measured - n)
    return None


def by_prompt(rows: pl.DataFrame, above: pl.Expr, below: pl.Expr) -> tuple[pl.Series, pl.Series]:
    """Two sums over the responses of each prompt, shape (prompts,), in the order in which the prompts appear."""
    keyed = rows.select("prompt_id", above=above, below=below)
    sums = keyed.group_by("prompt_id", maintain_order=True).agg(pl.col("above", "below").sum())
    return sums["above"], sums["below"]


def _iid_token_variance(rows: pl.DataFrame) -> float | None:
    """Variance of the mean if positions were independent: ``n/(n-1) Σ w²(v-θ)² / (Σw)²`` with ``w = 1/π``."""
    n = _total(rows, "kl_estimate.n")
    weight = float(rows["kl_estimate.weight"].sum())
    if n < 2:
        return None
    mean = float(rows["kl_estimate.sum"].sum()) / weight
    squares, products, weights = (float(rows[f"kl_estimate.w2v{power}"].sum()) for power in (2, 1, 0))
    centred = squares - 2 * mean * products + mean**2 * weights
    # Differences of large sums: what is left of equal values is rounding, not variance.
    return n / (n - 1) * centred / weight**2 if centred > 1e-12 * squares else None


def _total(rows: pl.DataFrame, column: str) -> int:
    return int(rows[column].sum())
