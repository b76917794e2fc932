"""Estimates over responses and prompts from the sums per response (`kl.token_table.response_totals`).

Two means are reported, and they differ: per token, ``Σ S_r / Σ T_r`` (long responses weigh more; llama.cpp prints this
one), and per response, the mean of ``S_r``, in nats per response.
"""

from __future__ import annotations

import polars as pl

from kl.intervals import Estimate, clusters_needed, ratio_estimate, unknown_estimate


def usable(totals: pl.DataFrame) -> pl.DataFrame:
    """The responses that carry information: something was measured, or sampling left out every position by design."""
    known = (pl.col("n_missing") == 0) | (pl.col("n_measured") > 0)
    return totals.filter((pl.col("n_positions") > 0) & known)


def per_token(totals: pl.DataFrame, metric: str, *, partial: bool = False) -> Estimate:
    """Mean of ``metric`` per measured position, with its interval.

    Parameters
    ----------
    totals : pl.DataFrame
        From `response_totals`.
    metric : str
        A name of `kl.token_table.METRICS`.
    partial : bool
        Whether the mean may be over the positions where the metric is known, if it is not known at all of them.
        Without it the mean is then unknown: a divergence averaged over the convenient positions is biased.
    """
    rows = usable(totals)
    n, n_measured = _total(rows, f"{metric}.n"), _total(rows, "n_measured")
    if n < n_measured and not partial:
        return _not_everywhere(n, n_measured, "positions")
    if n == 0:
        return unknown_estimate("nothing was measured", n_unknown=n_measured)
    denominator = "denominator" if n == n_measured else f"{metric}.weight"
    above, below = _by_prompt(rows, pl.col(f"{metric}.sum"), pl.col(denominator))
    variance = _iid_token_variance(rows) if metric == "kl_estimate" else None
    return ratio_estimate(above, below, n=n, n_unknown=n_measured - n, iid_variance=variance)


def per_response(totals: pl.DataFrame, metric: str, *, extrapolate: bool = True) -> Estimate:
    """Mean over the responses of the sum of ``metric``, with its interval.

    A response with missing positions counts with its measured sum times positions / measured positions: that assumes
    the missing ones to be like the others of their response. With ``extrapolate=False`` the measured sum stands as it
    is, which for a lower bound needs no assumption, as every term left out is at least 0.
    """
    rows = usable(totals)
    n_measured, n = _total(rows, "n_measured"), _total(rows, f"{metric}.n")
    if n < n_measured:
        return _not_everywhere(n, n_measured, "positions")
    if n == 0:
        return unknown_estimate("nothing was measured")
    sums = response_sums(rows, metric, extrapolate=extrapolate)
    above, below = _by_prompt(rows.with_columns(sums), pl.col("sum"), pl.lit(1.0))
    variance = sums.var() if rows.height > 1 else None
    iid = float(variance) / rows.height if isinstance(variance, float) else None
    return ratio_estimate(above, below, n=rows.height, iid_variance=iid)


def response_sums(rows: pl.DataFrame, metric: str, *, extrapolate: bool) -> pl.Series:
    """Sum of ``metric`` of each response, in nats; extrapolated over its missing positions if asked."""
    complete = (pl.col("n_missing") == 0) | (not extrapolate)
    factor = pl.when(complete).then(1.0).otherwise(pl.col("n_positions") / pl.col("denominator"))
    return rows.select((pl.col(f"{metric}.sum") * factor).alias("sum")).to_series()


def prompts_needed(totals: pl.DataFrame, relative: float) -> int | None:
    """How many prompts like these give the mean KL per token to ``± relative``; ``None`` if not known."""
    rows = usable(totals)
    if _total(rows, "kl_estimate.n") < _total(rows, "n_measured"):
        return None
    return clusters_needed(*_by_prompt(rows, pl.col("kl_estimate.sum"), pl.col("denominator")), relative)


def _by_prompt(rows: pl.DataFrame, above: pl.Expr, below: pl.Expr) -> tuple[pl.Series, pl.Series]:
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


def _not_everywhere(n: int, n_measured: int, units: str) -> Estimate:
    why = f"not known at {n_measured - n:,} of {n_measured:,} measured {units}"
    return unknown_estimate(why, n=n, n_unknown=n_measured - n)


def _total(rows: pl.DataFrame, column: str) -> int:
    return int(rows[column].sum())
