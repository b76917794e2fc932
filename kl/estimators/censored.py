"""The distribution of log p/q over the tokens of one position, from two censored lists (a Tobit model).

A perturbation of a model changes its logits by nearly independent amounts, so that ``d = log p/q`` is near normal over
the tokens that P lists, N(m_p, s^2), and over those that Q lists, N(m_q, s^2). Where Q does not list P's token, only
``d >= log p - log c_q`` is known; where P does not list Q's, ``d <= log c_p - log q``.

References
----------
.. [1] Tobin, "Estimation of relationships for limited dependent variables", Econometrica 26 (1958).
.. [2] Olsen, "Note on the uniqueness of the maximum likelihood estimator for the Tobit model", Econometrica 46 (1978):
   concave in 1/s and m/s.
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
from kl.estimators.rows import row_counts, row_sums

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
# Of Newton's method: the last step, in units of s; what is left is its square. The oddest lists drawn took 17 steps.
_TOLERANCE, _MAX_STEPS = 1e-5, 60
_MOST_CHANGE = 4.0  # factor of s in one step
_MIN_VARIANCE = 1e-12  # below, log p/q agrees to rounding and the variance is 0
_LARGEST_INVERSE = _MIN_VARIANCE**-0.5
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

    ``ratio_p`` is E[d | d above its limit] for the tokens that P alone lists, in the order of `Aligned.alone_p`;
    ``ratio_q`` E[d | d below its limit] for those that Q alone lists.
    """

    mean_p: FloatArray
    mean_q: FloatArray
    variance: FloatArray
    ratio_p: FloatArray
    ratio_q: FloatArray


@dataclass(frozen=True, slots=True)
class _Sides:
    """Both sides' log-ratios about ``centre``, the mean of the shared ones; Q's with their sign changed.

    So each censored one is known to be at least its ``limit``, shape (N,), P's before Q's, of ``row``, which is T more
    for Q's. ``n`` counts the shared tokens of each side, ``squares`` is the sum of their squares, shape (2, T). Those
    that Q was asked for are of P's tokens, but not of those that Q lists: chosen by P, they would make Q's seem like
    P's.
    """

    row: IntArray
    limit: FloatArray
    n: FloatArray
    centre: FloatArray
    squares: FloatArray

    @classmethod
    def of(cls, aligned: Aligned) -> _Sides:
        p, q = aligned.alone_p, aligned.alone_q
        of_p = _seen(aligned.log_ratio, aligned.shared)
        of_q = _seen(aligned.log_ratio, aligned.shared_best) if aligned.n_wanted_q.any() else of_p
        n, centre, squares = (np.stack(pair) for pair in zip(of_p, of_q, strict=True))
        limit_p = p.of_array(aligned.logp) - (aligned.log_limit_q + centre[0])[p.row]
        limit_q = q.of_array(aligned.logq) - (aligned.log_limit_p - centre[1])[q.row]
        rows = np.concatenate([p.row, q.row + len(n[0])])
        return cls(rows, np.concatenate([limit_p, limit_q]), n, centre, squares)

    def sums(self, values: FloatArray) -> FloatArray:
        """Over the censored tokens of each side, shape (2, T)."""
        return np.bincount(self.row, values, self.n.size).astype(np.float64, copy=False).reshape(2, -1)

    def only(self, active: BoolArray) -> _Sides:
        """The censored tokens of some positions; shapes (T,) stay."""
        keep = np.tile(active, 2)[self.row]
        return replace(self, row=self.row[keep], limit=self.limit[keep])

    def excess(self, mean: FloatArray, inverse: FloatArray) -> tuple[FloatArray, FloatArray]:
        """How far the limits are above the means, and E[u | u >= that] of a standard normal: in units of s, (N,).

        Parameters
        ----------
        mean : shape (2, T), in units of s
        inverse : shape (T,), 1/s
        """
        z = np.tile(inverse, 2)[self.row] * self.limit - mean.ravel()[self.row]
        return z, math.sqrt(2.0 / math.pi) / erfcx(z / math.sqrt(2.0))  # inverse Mills ratio, exact in both tails


def _seen(log_ratio: FloatArray, chosen: BoolArray) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Number, mean and sum of squares about it of the chosen log-ratios of each row, shape (T,)."""
    n = row_counts(chosen).astype(np.float64)
    centre = row_sums(log_ratio * chosen) / np.maximum(n, 1.0)
    return n, centre, row_sums(np.square((log_ratio - centre[:, None]) * chosen))


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
    """Maximum-likelihood fit, the variance shrunk towards what the data set lets expect.

    Every position is fitted for itself: what stands beside it in the batch changes nothing. Exchanging P and Q changes
    the signs of the means and nothing else.

    Parameters
    ----------
    prior : SpreadPrior, optional
        From `pooled_prior`; it counts for 4 tokens. ``None``: no shrinkage, and one degree of freedom is taken off for
        the mean. Without it positions with fewer than 3 shared tokens have no usable variance.
    """
    sides = _Sides.of(aligned)
    if prior is None:
        n, squares = sides.n.sum(axis=0) - 1.0, sides.squares.sum(axis=0)
    else:
        n = sides.n.sum(axis=0) + 2.0 * PRIOR_WEIGHT
        squares = sides.squares.sum(axis=0) + 2.0 * PRIOR_WEIGHT * prior.at(aligned)
    means, inverse = _most_likely(sides, np.maximum(n, 1.0), squares)
    _, excess = sides.excess(means, inverse)
    s = 1.0 / inverse
    mean_p, mean_q = sides.centre[0] + means[0] * s, sides.centre[1] - means[1] * s
    p, q = aligned.alone_p.row, aligned.alone_q.row
    return LogRatioModel(
        mean_p,
        mean_q,
        np.where(inverse < _LARGEST_INVERSE, np.square(s), 0.0),
        mean_p[p] + s[p] * excess[: len(p)],
        mean_q[q] - s[q] * excess[len(p) :],
    )


def _most_likely(sides: _Sides, n: FloatArray, squares: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Means in units of s, shape (2, T), and 1/s, shape (T,), by Newton's method.

    With g = m/s and t = 1/s the likelihood is concave: n log t - t^2 squares/2 - sum over both sides of
    n_shared g^2/2 - log P(u >= t limit - g). Its gradient is 0 where the EM algorithm stands still.

    Parameters
    ----------
    n, squares : shape (T,)
        Shared log-ratios of both sides and their squares, each with what the prior adds.
    """
    anchor = np.where(sides.n == 0, _ANCHOR, 0.0)
    n_mean = sides.n + anchor
    mean, inverse = np.zeros((2, len(n))), np.sqrt(n / np.maximum(squares, n * _MIN_VARIANCE))
    active, part = np.ones(len(n), dtype=np.bool_), sides
    for _ in range(_MAX_STEPS):
        z, excess = part.excess(mean, inverse)
        slope = np.clip(excess * (excess - z), 0.0, 1.0)  # of the excess over z
        weighted = slope * part.limit
        across = part.sums(weighted)
        steep = n_mean + part.sums(slope)
        to_mean = (part.sums(excess) - n_mean * mean) / steep
        # The anchor of positions without a shared token takes part in the means, and so in n here.
        whole = n + (anchor * np.square(mean)).sum(axis=0)
        pull = whole / inverse - inverse * squares - part.sums(excess * part.limit).sum(axis=0)
        tilt = across + 2.0 * anchor * mean / inverse
        bend = whole / np.square(inverse) + squares + part.sums(weighted * part.limit).sum(axis=0)
        bend -= (tilt * across / steep).sum(axis=0)
        wanted = inverse + (pull + (tilt * to_mean).sum(axis=0)) / bend
        new = np.clip(wanted, inverse / _MOST_CHANGE, np.minimum(inverse * _MOST_CHANGE, _LARGEST_INVERSE))
        moved = np.where(active, new - inverse, 0.0)
        to_mean = np.where(active, to_mean + across / steep * moved, 0.0)
        step = np.maximum(np.abs(to_mean).max(axis=0), np.abs(moved) / inverse)
        mean, inverse = mean + to_mean, inverse + moved
        active = step > _TOLERANCE
        if not active.any():
            break
        part = part.only(active)
    return mean, inverse


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
