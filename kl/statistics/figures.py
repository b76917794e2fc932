"""Figures that the field prints beside a KL: perplexity, |Δ log p| of the sampled token, flips of the top token.

Where Q does not list the sampled token, log q is known only to be at most Q's smallest listed value. What is said of
such a token is the least that it can be, and a figure with one of them is a lower bound.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import polars as pl
from numpy.typing import ArrayLike
from scipy.special import expit, logit, stdtrit

from kl.statistics.clusters import per_token
from kl.statistics.intervals import CONFIDENCE, Estimate, FloatArray, ratio_estimate, unknown_estimate
from kl.tables.totals import ABS_LOGRATIO, MEASURED, WEIGHT

_LARGEST_LOG = 700.0  # exp of more overflows float64
_ROUNDING = 1e-12  # of a cumulated share


@dataclass(frozen=True, slots=True)
class Perplexity:
    """Perplexity of P's text under P and under Q, as ``llama-perplexity --kl-divergence`` prints them.

    ``exp`` of the mean of −log p and of −log q of the sampled tokens, over the positions where both are known.
    ``log_ratio`` is the logarithm of ``ratio = q / p``: the mean of log p/q, with the error of the paired difference,
    which is far smaller than those of ``p`` and ``q`` suggest where they are correlated (``correlation`` is that of the
    two logarithms over prompts). ``log_ratio_lower`` is over all positions, with the ``n_censored`` tokens that Q does
    not list at their smallest log p/q: the log-ratio of the whole text is at least this.
    """

    p: Estimate
    q: Estimate
    ratio: Estimate
    log_ratio: Estimate
    log_ratio_lower: Estimate
    correlation: float | None
    n_censored: int


@dataclass(frozen=True, slots=True)
class LogprobDifference:
    """|log p − log q| of the sampled token, in nats, and ``ratio_outside``: the share with q/p outside 0.9 to 1.1.

    ``n_censored`` tokens that Q does not list count with their smallest possible difference: with one, all figures are
    lower bounds. ``largest`` is that of the measured positions.
    """

    mean: Estimate
    percentile_95: Estimate
    largest: float | None
    ratio_outside: Estimate
    n_censored: int


@dataclass(frozen=True, slots=True)
class TopToken:
    """Where the most probable token of P is not one of Q's. Equal candidates at the top are no flip.

    ``flip_rate`` is the share of positions; ``first_flip`` the position of the first one, the median over responses,
    where those that never flip (``n_never``) come after all others. Responses in which a position before the first flip
    was not measured take no part.
    """

    flip_rate: Estimate
    first_flip: Estimate
    n_never: int


def perplexity(totals: pl.DataFrame) -> Perplexity:
    """From the sums per response (`kl.tables.totals.response_totals`)."""
    under_p, under_q, ratio = (per_token(totals, name) for name in ("nll_p", "nll_q", "logratio"))
    return Perplexity(
        p=_exp(under_p),
        q=_exp(under_q),
        ratio=_exp(ratio),
        log_ratio=ratio,
        log_ratio_lower=per_token(totals, "logratio_k1"),
        correlation=_correlation(under_p.se, under_q.se, ratio.se),
        n_censored=int(totals["n_k1_censored"].sum()),
    )


def _exp(estimate: Estimate) -> Estimate:
    """``exp`` of a mean: the ends of the interval are those of the mean, the standard error is linearised."""
    mean, low, high = estimate.value, estimate.ci_low, estimate.ci_high
    if mean is None:
        return estimate
    if max(mean, high or mean) > _LARGEST_LOG:
        return unknown_estimate("too large for a number", n=estimate.n, n_unknown=estimate.n_unknown)
    value = math.exp(mean)
    se = None if estimate.se is None else value * estimate.se
    ends = {} if low is None or high is None else {"ci_low": math.exp(low), "ci_high": math.exp(high)}
    return replace(estimate, value=value, se=se, design_effect=None, **ends)


def _correlation(se_p: float | None, se_q: float | None, se_difference: float | None) -> float | None:
    if not se_p or not se_q or se_difference is None:
        return None
    return min(max((se_p**2 + se_q**2 - se_difference**2) / (2.0 * se_p * se_q), -1.0), 1.0)


def logprob_difference(tokens: pl.LazyFrame, totals: pl.DataFrame) -> LogprobDifference:
    """From the token table and its sums per response; holds three numbers for each measured position."""
    rows = tokens.filter(MEASURED).select(value=ABS_LOGRATIO, weight=WEIGHT, prompt=pl.col("prompt_id").rank("dense"))
    known = rows.drop_nulls("value").collect()
    mean = per_token(totals, "abs_logratio")
    percentile = quantile_estimate(known["value"], known["weight"], known["prompt"], 0.95, n_unknown=mean.n_unknown)
    return LogprobDifference(
        mean=mean,
        percentile_95=percentile,
        largest=float(known["value"].to_numpy().max()) if known.height else None,
        ratio_outside=per_token(totals, "ratio_outside"),
        n_censored=int(totals["n_k1_censored"].sum()),
    )


def top_token(totals: pl.DataFrame) -> TopToken:
    """From the sums per response."""
    same = per_token(totals, "same_top_token")
    flips = {
        "value": _complement(same.value),
        "ci_low": _complement(same.ci_high),
        "ci_high": _complement(same.ci_low),
    }
    clear = pl.col("first_unclear").is_null() | (pl.col("first_flip") < pl.col("first_unclear"))
    responses = totals.filter((pl.col("n_measured") > 0) & clear.fill_null(False))
    never = responses["first_flip"].null_count()
    return TopToken(replace(same, **flips), _first_flip(totals, responses), never)


def _complement(share: float | None) -> float | None:
    return None if share is None else 1.0 - share


def _first_flip(totals: pl.DataFrame, responses: pl.DataFrame) -> Estimate:
    measured = totals.filter(pl.col("n_measured") > 0)
    if (measured["n_selected"] < measured["n_positions"]).any():
        return unknown_estimate("positions were sampled, the first one that differs is not known")
    first = responses["first_flip"].cast(pl.Float64).fill_null(math.inf)
    codes = responses["prompt_id"].rank("dense")
    found = quantile_estimate(first, np.ones(len(first)), codes, 0.5, n_unknown=measured.height - responses.height)
    if found.n and found.value is None:
        return replace(found, no_interval="half of the responses or more never differ")
    return found


def quantile_estimate(
    values: ArrayLike, weights: ArrayLike, clusters: ArrayLike, probability: float, *, n_unknown: int = 0
) -> Estimate:
    """A weighted quantile with a cluster-robust interval.

    The quantile q is the smallest value that the share ``probability`` does not exceed, or the middle between it and
    the next where the share is met exactly. Its interval is that of the share at q, turned back through the
    distribution [1]_: the linearised t interval of the share (`ratio_estimate`), on the logit scale so that it stays
    inside 0 and 1. ``se`` is its half width over t. An end beyond all finite values leaves no interval.

    Parameters
    ----------
    values : float64, shape (n,)
        ``inf`` for one that lies above all others.
    weights : float64, shape (n,)
        Positive.
    clusters : shape (n,)
        To which prompt each belongs.
    probability : float
        Between 0 and 1.

    References
    ----------
    .. [1] Woodruff (1952), "Confidence intervals for medians and other position measures", JASA 47.
    """
    data, heavy = np.asarray(values, dtype=np.float64), np.asarray(weights, dtype=np.float64)
    if not len(data):
        return unknown_estimate("nothing was measured", n_unknown=n_unknown)
    order = np.argsort(data, kind="stable")
    ranked, shares = data[order], np.cumsum(heavy[order]) / heavy.sum()
    value = _inverse(ranked, shares, probability)
    codes = np.unique(np.asarray(clusters), return_inverse=True)[1]
    share = ratio_estimate(np.bincount(codes, heavy * (data <= value)), np.bincount(codes, heavy), n=len(data))
    found = replace(share, value=_finite(value), se=None, ci_low=None, ci_high=None, n_unknown=n_unknown)
    if share.se is None or share.ci_low is None:
        return found
    t = float(stdtrit(share.n_clusters - 1, (1 + CONFIDENCE) / 2))
    half = t * share.se / (probability * (1.0 - probability))
    ends = expit(logit(probability) + np.array([-half, half]))
    low, high = (_inverse(ranked, shares, float(end)) for end in ends)
    if not math.isfinite(high) or not math.isfinite(value):
        return replace(found, no_interval="the interval ends above all finite values")
    return replace(found, ci_low=low, ci_high=high, se=(high - low) / (2.0 * t))


def _inverse(ranked: FloatArray, shares: FloatArray, probability: float) -> float:
    last = len(ranked) - 1
    below = min(int(np.searchsorted(shares, probability - _ROUNDING)), last)
    above = min(int(np.searchsorted(shares, probability + _ROUNDING)), last)
    return float((ranked[below] + ranked[above]) / 2.0)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
