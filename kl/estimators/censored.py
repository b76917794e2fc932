"""The distribution of log p/q over the tokens of one position, from two censored lists (a Tobit model).

A perturbation of a model changes its logits by nearly independent amounts, so that ``d = log p/q`` is near normal over
the tokens that P lists, N(m_p, s^2), and over those that Q lists, N(m_q, s^2). Where Q does not list P's token, only
``d >= log p - log c_q`` is known; where P does not list Q's, ``d <= log c_p - log q``.

References
----------
.. [1] Tobin, "Estimation of relationships for limited dependent variables", Econometrica 26 (1958).
.. [2] Dempster, Laird & Rubin, "Maximum likelihood from incomplete data via the EM algorithm", JRSS B 39 (1977).
.. [3] Smyth, "Linear models and empirical Bayes methods ...", Stat. Appl. Genet. Mol. Biol. 3 (2004): variances shrunk
   towards a common one.
.. [4] Law et al., "voom: precision weights ...", Genome Biology 15 (2014): towards a trend in a covariate.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.special import erfcx, log_ndtr
from scipy.special import polygamma as _polygamma  # pyright: ignore[reportUnknownVariableType]

from kl.estimators.align import Aligned, BoolArray, FloatArray, IntArray

# Tokens that the data set's variance counts for. Measured on a 135M model: 6 is no better at k = 20 and puts more
# positions off by a factor of two at k = 10; with 2 single large estimates go through (docs/decisions/0003).
PRIOR_WEIGHT = 4.0
MIN_TREND = 30  # positions; from fewer, a slope is mostly noise
# Of the data set's level, the most that one position may hold, here and of fewer than 80 positions: one that a wrong
# value has made large then raises the level by a ninth, and real heavy tails are hardly cut (docs/decisions/0007).
_MOST_INFLUENCE, _INFLUENCE_OF_FEW = 0.1, 8.0
_LEAST_VARIANCE = 1e-2  # of the mean one, in logarithms: else a few lists that agree to rounding would make the slope
_LARGEST_COUNT = np.iinfo(np.uint16).max
MIN_SHARED = 3  # fewer shared tokens carry no information about the spread
_MAX_STEPS = 100
_TOLERANCE = 1e-4  # of a step, in units of s
_MIN_VARIANCE = 1e-12
# Two lists without a shared token have no finite likelihood maximum; a tenth of a token at d = 0 gives one. Measured on
# a model rounded to 3 bits: such positions then come out between 13 % low (k = 5) and 17 % high (k = 20).
_ANCHOR = 0.1
# Of the tokens below P's cap, how far below in nats, mean by mass. Measured on full vocabularies of a 135M model: 2.4
# and 2.5 on two sets of prompts, 1.8 to 2.8 in eight of ten positions.
TAIL_DEPTH = 2.5
# Variance of unlisted tokens over the fitted one: log p/q varies more at lower ranks, and the fit leaves out the degree
# of freedom of its means and the rare large values that lists hide (docs/decisions/0004).
TAIL_SPREAD = 1.2


@dataclass(frozen=True, slots=True)
class LogRatioModel:
    """Fitted per position: means over P's and over Q's tokens and the variance, nats, shape (T,).

    ``ratio_p``, shape (T, K_p), is E[d | d above its limit] for the tokens that only P lists; ``ratio_q``,
    shape (T, K_q), E[d | d below its limit] for those that only Q lists; 0 elsewhere.
    """

    mean_p: FloatArray
    mean_q: FloatArray
    variance: FloatArray
    ratio_p: FloatArray
    ratio_q: FloatArray


@dataclass(frozen=True, slots=True)
class _Side:
    """One side's log-ratios, signed so that every censored one is known to be at least ``limit``.

    ``row`` and ``limit`` list the censored tokens of all positions; counts and sums of the observed have shape (T,).
    """

    row: IntArray
    column: IntArray
    limit: FloatArray
    n: FloatArray
    n_observed: FloatArray
    total: FloatArray
    squares: FloatArray

    def only(self, active: BoolArray) -> _Side:
        """The censored tokens of some positions; shapes (T,) stay."""
        keep = active[self.row]
        return replace(self, row=self.row[keep], column=self.column[keep], limit=self.limit[keep])


def _sides(aligned: Aligned) -> tuple[_Side, _Side]:
    shared = aligned.index_q >= 0
    d = np.subtract(aligned.logp, aligned.shared_logq, out=np.zeros(shared.shape), where=shared)
    only_p = np.isfinite(aligned.logp) & ~shared
    only_q = np.isfinite(aligned.logq) & (aligned.index_p < 0)
    side_p = _side(only_p, aligned.logp - aligned.log_limit_q[:, None], d, shared)
    # Over Q's tokens -d is censored from above in the same way.
    side_q = _side(only_q, aligned.logq - aligned.log_limit_p[:, None], -d, shared)
    return side_p, side_q


def _side(censored: BoolArray, limits: FloatArray, values: FloatArray, shared: BoolArray) -> _Side:
    row, column = np.nonzero(censored)
    n_observed = np.count_nonzero(shared, axis=1).astype(np.float64)
    n = n_observed + np.count_nonzero(censored, axis=1)
    squares = np.square(values).sum(axis=1)
    return _Side(row, column, limits[row, column], n, n_observed, values.sum(axis=1), squares)


def _excess(z: FloatArray) -> FloatArray:
    """E[u | u >= z] of a standard normal: the inverse Mills ratio, exact in both tails."""
    return math.sqrt(2.0 / math.pi) / erfcx(z / math.sqrt(2.0))


@dataclass(frozen=True, slots=True)
class SpreadEvidence:
    """What positions say about the spread of log p/q, 16 bytes each; shape (N,), of positions with a variance only.

    ``variance`` is from `logratio_variance`; ``rest`` the mass that P's list leaves out; ``shared`` the tokens that
    both list, ``unshared`` those that one does.
    """

    variance: FloatArray
    rest: NDArray[np.float32]
    shared: NDArray[np.uint16]
    unshared: NDArray[np.uint16]

    @classmethod
    def none(cls) -> SpreadEvidence:
        """No position."""
        counts = np.zeros(0, dtype=np.uint16)
        return cls(np.zeros(0), np.zeros(0, dtype=np.float32), counts, counts)

    @classmethod
    def of(cls, aligned: Aligned) -> SpreadEvidence:
        """Of the positions with at least 3 shared tokens."""
        variance = logratio_variance(aligned)
        usable = ~np.isnan(variance)
        rest = np.maximum(1.0 - aligned.coverage_p, 0.0)
        shared, unshared = _overlap(aligned)
        return cls(
            variance[usable],
            rest[usable].astype(np.float32),
            np.minimum(shared[usable], _LARGEST_COUNT).astype(np.uint16),
            np.minimum(unshared[usable], _LARGEST_COUNT).astype(np.uint16),
        )

    @classmethod
    def total(cls, parts: Sequence[SpreadEvidence]) -> SpreadEvidence:
        """All positions of several."""
        if not parts:
            return cls.none()
        return cls(
            np.concatenate([part.variance for part in parts]),
            np.concatenate([part.rest for part in parts]),
            np.concatenate([part.shared for part in parts]),
            np.concatenate([part.unshared for part in parts]),
        )


@dataclass(frozen=True, slots=True)
class SpreadPrior:
    """Variance of log p/q that a position is expected to have: ``variance * exp(slope * (log-odds - log_odds))``.

    The log-odds are those of a listed token to be unshared. ``variance`` is the data set's mean, nats squared, each
    position weighted by P's rest mass; positions whose lists overlap less have a larger one. The line ends at the
    lowest and highest log-odds that had a variance.
    """

    variance: float
    slope: float = 0.0
    log_odds: float = 0.0
    lowest: float = -math.inf
    highest: float = math.inf

    def at(self, aligned: Aligned) -> FloatArray:
        """For each position, shape (T,)."""
        x = np.clip(_log_odds(*_overlap(aligned)), self.lowest, self.highest)
        return self.variance * np.exp(self.slope * (x - self.log_odds))


def _overlap(aligned: Aligned) -> tuple[IntArray, IntArray]:
    shared = aligned.overlap
    return shared, aligned.n_listed_p + aligned.n_listed_q - 2 * shared


def _log_odds(shared: NDArray[np.integer], unshared: NDArray[np.integer]) -> FloatArray:
    """Of an entry to be unshared; half a token is added to either side, so that none is infinite."""
    return np.log((unshared + 1.0) / (2.0 * shared + 1.0))


def pooled_prior(evidence: SpreadEvidence) -> SpreadPrior | None:
    """What to expect of a position, from all positions of a data set; ``None`` if none has a variance.

    The level is the mean over positions by P's rest mass: that is what the variance is multiplied with in KL(P‖Q), so
    that shrinking towards it leaves the mean KL right; a median does not where variances differ much, nor do weights
    with Q's rest, which is large at other positions where Q is flatter than P. No position holds more than a tenth of
    it (8/N of N below 80): a larger one is cut to that, so that the mean follows heavy tails and no single value. The
    slope over the overlap is a regression of log variances, less the share of their spread that is sampling noise.

    Parameters
    ----------
    evidence : SpreadEvidence
        Of all responses.
    """
    v = evidence.variance
    if not v.size:
        return None
    weight = evidence.rest.astype(np.float64)
    if not weight.any():
        weight = np.ones(v.size)
    v = _limited(v, weight)
    mean = float(weight @ v / weight.sum())
    slope = _slope(replace(evidence, variance=v), mean) if v.size >= MIN_TREND and mean > 0 else 0.0
    if slope == 0.0:
        return SpreadPrior(mean)
    x = _log_odds(evidence.shared, evidence.unshared)
    # Centred so that the expected variances have the same weighted mean as the seen ones.
    highest = float(x.max())
    centre = highest + math.log(float(weight @ np.exp(slope * (x - highest)) / weight.sum())) / slope
    return SpreadPrior(mean, slope, centre, float(x.min()), highest)


def _limited(variance: FloatArray, weight: FloatArray) -> FloatArray:
    """The variances, the largest cut so that weighted none is more than the share a position may hold of their sum."""
    parts = variance * weight
    share = max(_MOST_INFLUENCE, _INFLUENCE_OF_FEW / len(parts))
    falling = np.sort(parts)[::-1]
    n_cut = np.arange(min(len(parts), math.ceil(1.0 / share)))
    left = falling.sum() - np.concatenate(([0.0], np.cumsum(falling)))[n_cut]  # without the n_cut largest
    limits = share * left / (1.0 - share * n_cut)  # of a sum in which they are cut to it
    fits = falling[n_cut] <= limits
    if not fits.any():
        return variance
    limit = limits[fits.argmax()]
    return variance * np.divide(limit, parts, out=np.ones_like(parts), where=parts > limit)


def _slope(evidence: SpreadEvidence, mean: float) -> float:
    """Of log variance over log-odds; at least 0, and 0 where sampling explains all differences of the variances."""
    x, y = _log_odds(evidence.shared, evidence.unshared), np.log(np.maximum(evidence.variance, _LEAST_VARIANCE * mean))
    freedom = evidence.shared.astype(np.float64) - 1.0
    share = freedom / freedom.sum()
    dx, dy = x - share @ x, y - share @ y
    spread_x, spread_y = float(share @ np.square(dx)), float(share @ np.square(dy))
    noise = float(share @ _log_chi_squared_variance(freedom))
    if spread_x == 0.0 or spread_y <= noise:
        return 0.0
    return max(float(share @ (dx * dy)) / spread_x, 0.0) * (1.0 - noise / spread_y)


def _log_chi_squared_variance(freedom: FloatArray) -> FloatArray:
    return np.asarray(_polygamma(1, freedom / 2.0), dtype=np.float64)


def fit(aligned: Aligned, prior: SpreadPrior | None) -> LogRatioModel:
    """Maximum-likelihood fit by EM, the variance shrunk towards what the data set lets expect.

    Every position is fitted for itself: what stands beside it in the batch changes nothing. Exchanging P and Q changes
    the signs of the means and nothing else.

    Parameters
    ----------
    prior : SpreadPrior, optional
        From `pooled_prior`; it counts for 4 tokens. ``None``: no shrinkage, and one degree of freedom is taken off for
        the mean. Without it positions with fewer than 3 shared tokens have no usable variance.
    """
    expected = None if prior is None else prior.at(aligned)
    pseudo_tokens = -1.0 if expected is None else 2.0 * PRIOR_WEIGHT
    pseudo_squares = 0.0 if expected is None else 2.0 * PRIOR_WEIGHT * expected
    side_p, side_q = _sides(aligned)
    mean_p, mean_q, variance = _start(side_p, side_q, expected)
    active = np.ones(len(mean_p), dtype=np.bool_)
    part_p, part_q = side_p, side_q
    for _ in range(_MAX_STEPS):
        new_p, squares_p = _step(part_p, mean_p, variance)
        new_q, squares_q = _step(part_q, mean_q, variance)
        n = np.maximum(side_p.n + side_q.n + pseudo_tokens, 1.0)
        new_variance = (squares_p + squares_q + pseudo_squares) / n
        scale = np.sqrt(np.maximum(variance, _MIN_VARIANCE))
        moved = np.maximum(np.abs(new_p - mean_p), np.abs(new_q - mean_q)) + np.abs(np.sqrt(new_variance) - scale)
        mean_p, mean_q = np.where(active, new_p, mean_p), np.where(active, new_q, mean_q)
        variance = np.where(active, new_variance, variance)
        active = active & (moved > _TOLERANCE * scale)
        if not active.any():
            break
        part_p, part_q = part_p.only(active), part_q.only(active)
    ratio_p = _ratios(side_p, mean_p, variance, aligned.logp.shape)
    ratio_q = -_ratios(side_q, mean_q, variance, aligned.logq.shape)
    return LogRatioModel(mean_p, -mean_q, variance, ratio_p, ratio_q)


def logratio_variance(aligned: Aligned) -> FloatArray:
    """Variance of log p/q at each position by itself, nats squared, shape (T,); NaN with fewer than 3 shared tokens."""
    return np.where(aligned.overlap >= MIN_SHARED, fit(aligned, None).variance, np.nan)


def tail_shape(variance: FloatArray, mean: FloatArray, log_cap: FloatArray, log_cap_other: FloatArray) -> FloatArray:
    """KL inside the outside cell, per unit of P's mass there: E[d] + log E[exp(-d)] over P's unlisted tokens.

    They are spread over log p by an exponential law below P's cap, and ``d = log p/q`` is normal, but only tokens are
    left that Q does not list either: those with ``d > log p - log c_q``. Given d this keeps the share
    ``min(1, exp((d - log c_p/c_q) / TAIL_DEPTH))``, and all is in closed form. A concave logarithm of that share makes
    the result at most half the variance, which a normal without the limit has.

    Parameters
    ----------
    variance, mean : shape (T,)
        Fitted, of P's tokens; for Q's own, the mean with its sign changed.
    log_cap, log_cap_other : shape (T,)
        Of P and of Q; exchanged for Q's own.

    Returns
    -------
    shape (T,)
        Nats, from 0 to ``TAIL_SPREAD * variance / 2``.
    """
    wide = TAIL_SPREAD * variance
    scale = np.sqrt(np.maximum(wide, _MIN_VARIANCE))
    kept, below = _kept_share(mean - (log_cap - log_cap_other), scale)
    tilted, _ = _kept_share(mean - np.square(scale) - (log_cap - log_cap_other), scale)
    return np.clip(wide / 2.0 + wide / TAIL_DEPTH * below + tilted - kept, 0.0, wide / 2.0)


def _kept_share(mean: FloatArray, scale: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Logarithm of E[min(1, exp(u / TAIL_DEPTH))], u normal, and the part of the expectation that is from u < 0."""
    step = scale / TAIL_DEPTH
    above = log_ndtr(mean / scale)
    under = mean / TAIL_DEPTH + np.square(step) / 2.0 + log_ndtr(-mean / scale - step)
    total = np.logaddexp(above, under)
    return total, np.exp(under - total)


def _start(side_p: _Side, side_q: _Side, prior: FloatArray | None) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Mean and variance of the shared tokens; the prior counts as in the fit."""
    n = np.maximum(side_p.n_observed, 1.0)
    mean_p, mean_q = side_p.total / n, side_q.total / n
    squares = np.maximum(side_p.squares - n * np.square(mean_p), 0.0)
    if prior is None:
        return mean_p, mean_q, squares / n
    return mean_p, mean_q, (squares + PRIOR_WEIGHT * prior) / (side_p.n_observed + PRIOR_WEIGHT)


def _step(side: _Side, mean: FloatArray, variance: FloatArray) -> tuple[FloatArray, FloatArray]:
    """One EM step of one side: the new mean, and the expected sum of squares about it. Shapes (T,)."""
    n_rows = len(mean)
    old = mean[side.row]
    s = np.sqrt(np.maximum(variance, _MIN_VARIANCE))[side.row]
    z = (side.limit - old) / s
    above = _excess(z)
    expected = old + s * above
    inside = np.square(s) * np.clip(1.0 + z * above - np.square(above), 0.0, 1.0)
    anchor = np.where(side.n_observed == 0, _ANCHOR, 0.0)
    total = side.total + _row_sums(side.row, expected, n_rows)
    new = total / np.maximum(side.n + anchor, _ANCHOR)
    observed = side.squares - 2.0 * new * side.total + side.n_observed * np.square(new)
    hidden = _row_sums(side.row, inside + np.square(expected - new[side.row]), n_rows)
    return new, np.maximum(observed, 0.0) + hidden


def _row_sums(row: IntArray, values: FloatArray, n_rows: int) -> FloatArray:
    return np.bincount(row, values, n_rows).astype(np.float64)  # integers where there is nothing to add


def _ratios(side: _Side, mean: FloatArray, variance: FloatArray, shape: tuple[int, ...]) -> FloatArray:
    s = np.sqrt(np.maximum(variance, _MIN_VARIANCE))[side.row]
    ratios = np.zeros(shape)
    ratios[side.row, side.column] = mean[side.row] + s * _excess((side.limit - mean[side.row]) / s)
    return ratios
