"""Means with intervals: the cluster is the prompt, because tokens of one prompt are not independent."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import stdtrit

CONFIDENCE = 0.95
MIN_CLUSTERS = 5  # coverage of the t interval was .95 at 5 prompts; below, one prompt decides it

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean with its uncertainty; ``None`` means not known.

    ``n`` counts the positions (or responses) that enter, ``n_unknown`` those that were measured but lack this value.
    ``no_interval`` says in words why there is no interval or no value. ``design_effect`` is the variance divided by the
    variance that independent positions (responses) would give.
    """

    value: float | None
    se: float | None
    ci_low: float | None
    ci_high: float | None
    n: int
    n_unknown: int
    n_clusters: int
    design_effect: float | None
    no_interval: str | None


def ratio_estimate(
    numerators: ArrayLike,
    denominators: ArrayLike,
    *,
    n: int,
    n_unknown: int = 0,
    iid_variance: float | None = None,
) -> Estimate:
    """Ratio of means with a linearised, cluster-robust t interval.

    ``θ = ΣN/ΣD``, ``e = N - θD``, ``SE = sqrt(G/(G-1) Σe²)/ΣD``, ``θ ± t(.975, G-1) SE`` [1]_ [2]_. The ratio is
    consistent, with a bias of order 1/G. Horvitz-Thompson totals as numerators carry the variance of position sampling
    with them, so that no second term is needed.

    Parameters
    ----------
    numerators, denominators : float64, shape (G,)
        Totals of each cluster. Clusters with a denominator of 0 hold no data and are left out.
    n, n_unknown : int
        Passed on to the result.
    iid_variance : float, optional
        Variance of θ if units were independent; gives the design effect.

    Returns
    -------
    Estimate
        Without a value where there is no data, without SE for G < 2, without interval for G < 5.

    Raises
    ------
    ValueError
        If a total is not finite or a denominator is negative.

    References
    ----------
    .. [1] Cochran (1977), *Sampling Techniques*, 3rd ed., sections 6.3 and 9A.
    .. [2] Miller (2024), "Adding Error Bars to Evals", arXiv 2411.00640.
    """
    totals = _cluster_totals(numerators, denominators)
    n_clusters = len(totals[0])
    if n_clusters == 0:
        return unknown_estimate("nothing was measured", n=n, n_unknown=n_unknown)
    value, residuals = _linearise(*totals)
    if n_clusters < 2:
        return Estimate(value, None, None, None, n, n_unknown, 1, None, _too_few(1))
    scale = math.sqrt(n_clusters / (n_clusters - 1)) / float(totals[1].sum())
    se = scale * math.sqrt(float(residuals @ residuals))
    effect = se**2 / iid_variance if iid_variance else None
    if n_clusters < MIN_CLUSTERS:
        return Estimate(value, se, None, None, n, n_unknown, n_clusters, effect, _too_few(n_clusters))
    half = float(stdtrit(n_clusters - 1, (1 + CONFIDENCE) / 2)) * se
    return Estimate(value, se, value - half, value + half, n, n_unknown, n_clusters, effect, None)


def unknown_estimate(why: str, *, n: int = 0, n_unknown: int = 0) -> Estimate:
    """An estimate without a value, and the reason."""
    return Estimate(None, None, None, None, n, n_unknown, 0, None, why)


def clusters_needed(numerators: ArrayLike, denominators: ArrayLike, relative: float) -> int | None:
    """How many prompts like these give a 95 % interval of ``± relative`` times the mean.

    ``(1.96 CV / relative)²`` with ``CV = sd(e)/mean(N)`` from the clusters at hand taken as a pilot; rounded up, and at
    least the 5 that an interval needs. ``None`` with fewer than 2 clusters or a mean of 0.
    """
    totals = _cluster_totals(numerators, denominators)
    if len(totals[0]) < 2 or totals[0].sum() <= 0:
        return None
    _, residuals = _linearise(*totals)
    variation = float(residuals.std(ddof=1)) / float(totals[0].mean())
    return max(MIN_CLUSTERS, math.ceil((1.96 * variation / relative) ** 2))


def _cluster_totals(numerators: ArrayLike, denominators: ArrayLike) -> tuple[FloatArray, FloatArray]:
    above, below = np.asarray(numerators, dtype=np.float64), np.asarray(denominators, dtype=np.float64)
    if above.shape != below.shape or above.ndim != 1:
        raise ValueError(f"cluster totals have the shapes {above.shape} and {below.shape}; both must be (G,).")
    if not (np.isfinite(above).all() and np.isfinite(below).all()) or (below < 0).any():
        raise ValueError("cluster totals must be finite and denominators at least 0.")
    return above[below > 0], below[below > 0]


def _linearise(numerators: FloatArray, denominators: FloatArray) -> tuple[float, FloatArray]:
    value = float(numerators.sum()) / float(denominators.sum())
    return value, numerators - value * denominators


def _too_few(n_clusters: int) -> str:
    return f"{n_clusters} prompt{'s' if n_clusters > 1 else ''}, at least {MIN_CLUSTERS} are needed"
