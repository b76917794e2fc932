"""What two top-k lists say for certain: tight lower bounds of every divergence, and upper bounds under an assumption.

At one position let A and B be the listed tokens of P and Q. Known are p on A and q on B, the rest masses
``r_p = 1 - sum_A p`` and ``r_q``, and the caps ``c_p`` and ``c_q``: no unlisted token has more than the smallest listed
one. Unknown are y = q on A outside B, x = p on B outside A, and the masses X, Y of the tokens in neither list.

An *open* entry has a known probability and may be any token that its own side does not name: x and y may take it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import rel_entr

from kl.estimators.align import Aligned, BoolArray, FloatArray, IntArray

# A softmax in float32 makes lists of 20 exceed 1 by up to 1e-6, so a smaller rest mass is noise. The slack is added to
# both rests; by the log-sum inequality equal additions never raise a divergence, so that the bounds stay valid.
REST_SLACK = 1e-6
SMALLEST = 1e-300  # probability of a token that exists; below, float64 ends and divergences become infinite
_LOG_SMALLEST = -690.0  # of caps and listed masses, a little above it
# A server whose values are all too large by one constant shows it only where a list is whole (llama.cpp: up to 2.5e-4,
# measured); more is a fault of single lists.
_COMMON_NOISE = 1e-3
_BISECTIONS = 64  # of a logarithm within some hundreds: to the last bit


@dataclass(frozen=True, slots=True)
class Cells:
    """T positions split into shared tokens, tokens that one side lists, and the rest. All float64, in probability.

    Attributes
    ----------
    p, q, log_ratio : shape (T, K_p)
        Shared tokens in P's order with ``log p/q``; 0 elsewhere.
    a : shape (T, K_p)
        p of the tokens that only P lists; 0 elsewhere. ``n_a``, shape (T,), is their number.
    b : shape (T, K_q)
        q of the tokens that only Q lists; 0 elsewhere. ``n_b``, shape (T,), is their number.
    cap_p, cap_q : shape (T,)
        Largest possible mass of one unlisted token.
    cap_x, cap_y : shapes (T, K_q) and (T, K_p)
        Largest mass of each x and each y that the smallest completion needs: the cap, or more where a token that one
        side lists may be an open entry of the other.
    rest_p, rest_q : shape (T,)
        Mass that is not listed, at least 0, without the slack.
    open_p, open_q : shape (T,)
        Mass of the open entries: x and X, or y and Y, share it with the rest.
    slack : shape (T,)
        Added to both rests.
    mass_above_1_p, mass_above_1_q : bool, shape (T,)
        Whether the listed mass was above 1 by more than the noise of float32, and the list was scaled to 1.
    """

    p: FloatArray
    q: FloatArray
    log_ratio: FloatArray
    a: FloatArray
    b: FloatArray
    n_a: NDArray[np.int64]
    n_b: NDArray[np.int64]
    cap_p: FloatArray
    cap_q: FloatArray
    rest_p: FloatArray
    rest_q: FloatArray
    open_p: FloatArray
    open_q: FloatArray
    cap_x: FloatArray
    cap_y: FloatArray
    slack: FloatArray
    mass_above_1_p: BoolArray
    mass_above_1_q: BoolArray

    @property
    def total_p(self) -> FloatArray:
        """P's mass outside P's matched tokens, slack included: what x and X share. Shape (T,)."""
        return self.rest_p + self.open_p + self.slack

    @property
    def total_q(self) -> FloatArray:
        """Q's mass outside Q's matched tokens, slack included: what y and Y share. Shape (T,)."""
        return self.rest_q + self.open_q + self.slack

    @property
    def hidden_p(self) -> FloatArray:
        """P's mass whose value under Q is unknown, without slack. Shape (T,)."""
        return self.rest_p + self.open_p + self.a.sum(axis=1)

    @property
    def hidden_q(self) -> FloatArray:
        """Q's mass whose value under P is unknown, without slack. Shape (T,)."""
        return self.rest_q + self.open_q + self.b.sum(axis=1)

    @property
    def head(self) -> FloatArray:
        """``sum p log p/q`` over the shared tokens. Shape (T,)."""
        return (self.p * self.log_ratio).sum(axis=1)

    @property
    def reverse_head(self) -> FloatArray:
        """``sum q log q/p`` over the shared tokens. Shape (T,)."""
        return -(self.q * self.log_ratio).sum(axis=1)


def cells(aligned: Aligned, slack: float = REST_SLACK) -> Cells:
    """Split aligned positions into cells of probability.

    A list of mass above 1 is whole, as nothing can be left over: it is scaled to 1. How much it was above is how far
    its values are known to be off, and up to `_COMMON_NOISE` those of all lists of its response, as is half the step to
    which they are rounded. As much is added to both rests.

    Parameters
    ----------
    slack : float
        Above 0. At 0 a rest mass of exactly 0 would make bounds infinite for a rounding error.
    """
    if not slack > 0:
        raise ValueError(f"slack={slack} must be above 0; rests of exactly 0 have no finite bound.")
    above_p, above_q = aligned.coverage_p > 1.0 + REST_SLACK, aligned.coverage_q > 1.0 + REST_SLACK
    scale_p, scale_q = np.where(above_p, aligned.coverage_p, 1.0), np.where(above_q, aligned.coverage_q, 1.0)
    logp, logq = aligned.logp - np.log(scale_p)[:, None], aligned.logq - np.log(scale_q)[:, None]
    shared_logq = aligned.shared_logq - np.log(scale_q)[:, None]
    shared_p, shared_q = aligned.index_q >= 0, aligned.index_p >= 0
    only_p, only_q = np.isfinite(logp) & ~shared_p, np.isfinite(logq) & ~shared_q
    a, b = np.where(only_p, _exp(logp), 0.0), np.where(only_q, _exp(logq), 0.0)
    cap_p, cap_q = _exp(aligned.log_cap_p) / scale_p, _exp(aligned.log_cap_q) / scale_q
    return Cells(
        p=np.where(shared_p, np.exp(logp), 0.0),
        q=np.where(shared_p, np.exp(shared_logq), 0.0),
        log_ratio=np.subtract(logp, shared_logq, out=np.zeros(shared_p.shape), where=shared_p),
        a=a,
        b=b,
        n_a=np.count_nonzero(only_p, axis=1),
        n_b=np.count_nonzero(only_q, axis=1),
        cap_p=cap_p,
        cap_q=cap_q,
        rest_p=np.maximum(1.0 - aligned.coverage_p, 0.0),
        rest_q=np.maximum(1.0 - aligned.coverage_q, 0.0),
        open_p=aligned.open_p / scale_p,
        open_q=aligned.open_q / scale_q,
        cap_x=_raised_caps(b, cap_p, np.exp(aligned.log_open_p) / scale_p[:, None]),
        cap_y=_raised_caps(a, cap_q, np.exp(aligned.log_open_q) / scale_q[:, None]),
        slack=_slack(
            np.maximum(scale_p, scale_q) - 1.0,
            np.maximum(slack, np.maximum(aligned.step_p, aligned.step_q) / 2),
            aligned.response,
        ),
        mass_above_1_p=above_p,
        mass_above_1_q=above_q,
    )


def _slack(excess: FloatArray, least: FloatArray, response: IntArray) -> FloatArray:
    if not excess.any():
        return least
    starts = np.flatnonzero(np.diff(response, prepend=response[0] - 1))
    common = np.minimum(np.maximum.reduceat(excess, starts), _COMMON_NOISE)
    return np.maximum(np.maximum(excess, np.repeat(common, np.diff(starts, append=len(response)))), least)


def _exp(logs: FloatArray) -> FloatArray:
    return np.exp(np.maximum(logs, _LOG_SMALLEST))


def _raised_caps(weights: FloatArray, cap: FloatArray, open_values: FloatArray) -> FloatArray:
    """Caps of the tokens that only the other side names, each of which may be one of a side's open entries.

    At most one token can be one entry: what the tokens have above the cap is, all together, at most what the entries
    have above it. Of all ways to share that the smallest completion takes ``min(largest entry, L * weight)`` with one
    level L, at which it is used up.

    Parameters
    ----------
    weights : shape (T, K)
        Of the tokens under the other side; 0 is no token.
    cap : shape (T,)
    open_values : shape (T, M)
        Probabilities of the open entries; 0 is none.
    """
    caps = np.repeat(cap[:, None], weights.shape[1], axis=1)
    rows = np.flatnonzero(open_values.any(axis=1) & weights.any(axis=1))
    if not rows.size:
        return caps
    held, least, largest = weights[rows], cap[rows, None], open_values[rows].max(axis=1, keepdims=True)
    budget = np.maximum(open_values[rows] - least, 0.0).sum(axis=1)

    def raised(level: FloatArray) -> FloatArray:
        return np.maximum(np.minimum(largest, level[:, None] * held), least)

    smallest = np.where(held > 0, held, np.inf).min(axis=1)
    low, high = cap[rows] / held.max(axis=1), largest[:, 0] / smallest
    level = _rising_root(lambda level: ((raised(level) - least) * (held > 0)).sum(axis=1) - budget, low, high)
    caps[rows] = raised(level)
    return caps


class Completion(NamedTuple):
    """Values for what the lists leave open: x, shape (T, K_q); y, shape (T, K_p); X and Y, shape (T,)."""

    x: FloatArray
    y: FloatArray
    out_p: FloatArray
    out_q: FloatArray


class Divergences(NamedTuple):
    """Of P from Q at each position, shape (T,): nats, and total variation in probability."""

    kl: FloatArray
    reverse_kl: FloatArray
    js: FloatArray
    tv: FloatArray


def divergences(cell: Cells, completion: Completion) -> Divergences:
    """The divergences of one completion, the tokens outside both lists taken as a single cell."""
    x, y, out_p, out_q = completion
    kl = cell.head + rel_entr(cell.a, y).sum(axis=1) + rel_entr(x, cell.b).sum(axis=1) + rel_entr(out_p, out_q)
    reverse = cell.reverse_head + rel_entr(y, cell.a).sum(axis=1) + rel_entr(cell.b, x).sum(axis=1)
    apart = _distance(cell.p, cell.q) + _distance(cell.a, y) + _distance(x, cell.b)
    return Divergences(
        np.maximum(kl, 0.0),
        np.maximum(reverse + rel_entr(out_q, out_p), 0.0),
        # Lists that exceed 1 by rounding would exceed the largest possible values.
        np.minimum(listed_js(cell, completion) + js_terms(out_p, out_q), np.log(2.0)),
        np.minimum(0.5 * (apart + np.abs(out_p - out_q)), 1.0),
    )


def listed_js(cell: Cells, completion: Completion) -> FloatArray:
    """Jensen-Shannon divergence of the listed tokens alone, in nats, shape (T,)."""
    pairs = ((cell.p, cell.q), (cell.a, completion.y), (completion.x, cell.b))
    return sum((js_terms(p, q).sum(axis=1) for p, q in pairs), start=np.zeros(cell.rest_p.shape))


def js_terms(p: FloatArray, q: FloatArray) -> FloatArray:
    """Each cell's part of the Jensen-Shannon divergence in nats, at least 0; shape of the arguments."""
    middle = 0.5 * (p + q)
    return np.maximum(0.5 * (rel_entr(p, middle) + rel_entr(q, middle)), 0.0)


def _distance(p: FloatArray, q: FloatArray) -> FloatArray:
    return np.abs(p - q).sum(axis=1)


def bucket(cell: Cells) -> Divergences:
    """Divergences of the shared tokens plus one cell for everything else: a lower bound, rarely tight."""
    out_p, out_q = cell.hidden_p + cell.slack, cell.hidden_q + cell.slack
    return Divergences(
        np.maximum(cell.head + rel_entr(out_p, out_q), 0.0),
        np.maximum(cell.reverse_head + rel_entr(out_q, out_p), 0.0),
        np.minimum(js_terms(cell.p, cell.q).sum(axis=1) + js_terms(out_p, out_q), np.log(2.0)),
        np.minimum(0.5 * (_distance(cell.p, cell.q) + np.abs(out_p - out_q)), 1.0),
    )


def lower_bounds(cell: Cells) -> Divergences:
    """Lower bounds: no pair of distributions with these lists has a smaller divergence. Tight without open mass.

    One completion minimises KL, reverse KL, Jensen-Shannon, total variation and every other f-divergence, as the
    optimality conditions hold the ratio p/q alone. The size of the vocabulary does not matter. Cost: one sort per row.
    With log-probabilities rounded to a step d the head, and so the bound, moves by up to d.
    """
    return divergences(cell, lower_completion(cell))


def lower_completion(cell: Cells) -> Completion:
    """The completion at which every f-divergence is smallest.

    With one ratio L = X/Y the conditions are ``x = min(cap_x, L b)`` and ``y = min(cap_y, a / L)``. As a rule every
    a >= c_p and every b >= c_q, so that either L <= c_p/c_q and all y are at their cap, or all x are. Either way the
    other side is one water-filling. With open mass, or a cap above what is listed, L is found by bisection.
    """
    found = _by_sorting(cell)
    is_below = ((cell.a > 0) & (cell.a < cell.cap_p[:, None])).any(axis=1)
    is_below |= ((cell.b > 0) & (cell.b < cell.cap_q[:, None])).any(axis=1)
    rows = np.flatnonzero((cell.open_p > 0) | (cell.open_q > 0) | is_below)
    if rows.size:
        for whole, part in zip(found, _by_bisection(cell, rows), strict=True):
            whole[rows] = part
    return found


def _by_sorting(cell: Cells) -> Completion:
    """`lower_completion` of positions where all tokens of a side have one cap."""
    left_p = cell.total_p - cell.n_b * cell.cap_p  # X if every x is at its cap
    left_q = cell.total_q - cell.n_a * cell.cap_q
    fill_q = (left_q >= 0) & ((left_p < 0) | (left_p * cell.cap_q <= cell.cap_p * left_q))
    fill_p = ~fill_q & (left_p >= 0)
    out_p, out_q = np.where(fill_p, left_p, 0.0), np.where(fill_q, left_q, 0.0)
    level_p = _water_level(cell.b, cell.cap_p, out_q, cell.total_p)
    level_q = _water_level(cell.a, cell.cap_q, out_p, cell.total_q)
    x = _filled(cell.b, cell.cap_p[:, None], np.where(fill_p, np.inf, level_p))
    y = _filled(cell.a, cell.cap_q[:, None], np.where(fill_q, np.inf, level_q))
    with np.errstate(invalid="ignore"):  # levels that no row uses may be infinite
        return Completion(x, y, np.where(fill_q, level_p * out_q, out_p), np.where(fill_p, level_q * out_p, out_q))


def _by_bisection(cell: Cells, rows: NDArray[np.int64]) -> Completion:
    """`lower_completion` of some positions, whatever the caps: what is left of P's mass is L times what is left of Q's.

    Where both sides can be filled by x and y alone, and the level at which P's is full is below that of Q's, nothing is
    left outside, and each side has its own level.
    """
    a, b, cap_x, cap_y = cell.a[rows], cell.b[rows], cell.cap_x[rows], cell.cap_y[rows]
    total_p, total_q = cell.total_p[rows], cell.total_q[rows]

    def left_p(level: FloatArray) -> FloatArray:
        return total_p - _filled(b, cap_x, level).sum(axis=1)

    def left_q(level: FloatArray) -> FloatArray:
        return total_q - _filled(a, cap_y, 1.0 / level).sum(axis=1)

    low = total_p / (b.sum(axis=1) + total_q)
    high = (total_p + a.sum(axis=1)) / total_q
    level = _rising_root(lambda level: level * left_q(level) - left_p(level), low, high)
    out_p, out_q = left_p(level), left_q(level)
    corner = (out_p < 0) & (out_q < 0)
    full_p = _rising_root(lambda level: -left_p(level), np.minimum(low, level), level)
    full_q = _rising_root(left_q, level, np.maximum(high, level))
    level_p, level_q = np.where(corner, full_p, level), np.where(corner, full_q, level)
    x, y = _filled(b, cap_x, level_p), _filled(a, cap_y, 1.0 / level_q)
    outside = (out_p > 0) & (out_q > 0)
    return Completion(x, y, np.where(outside, out_p, 0.0), np.where(outside, out_q, 0.0))


def _rising_root(function: Callable[[FloatArray], FloatArray], low: FloatArray, high: FloatArray) -> FloatArray:
    """Where a function turns from below 0 to above, row by row; ``high`` where it does not. All of shape (T,), > 0."""
    below, above = np.log(low), np.log(high)
    for _ in range(_BISECTIONS):
        middle = 0.5 * (below + above)
        is_above = function(np.exp(middle)) >= 0
        below, above = np.where(is_above, below, middle), np.where(is_above, middle, above)
    return np.exp(above)


def _filled(weights: FloatArray, cap: FloatArray, level: FloatArray) -> FloatArray:
    """``min(cap, level * weight)``, 0 where there is no token. The cap has shape (T, K) or (T, 1)."""
    with np.errstate(invalid="ignore"):
        filled = np.minimum(cap, level[:, None] * weights)
    return np.where(weights > 0, np.maximum(filled, SMALLEST), 0.0)


def _water_level(weights: FloatArray, cap: FloatArray, outside: FloatArray, total: FloatArray) -> FloatArray:
    """The level L with ``L * outside + sum(min(cap, L * weights)) = total``, row by row.

    Parameters
    ----------
    weights : shape (T, K)
        At least 0; 0 is no token.
    cap, outside, total : shape (T,)

    Returns
    -------
    shape (T,)
        ``inf`` where nothing can take the mass: no weight and nothing outside, or all tokens at the cap.
    """
    falling = -np.sort(-weights, axis=1)
    n_rows, n_tokens = falling.shape
    padded = np.concatenate([falling, np.zeros((n_rows, 1))], axis=1)
    uncapped = np.cumsum(padded[:, ::-1], axis=1)[:, ::-1]  # weight left when the m largest tokens are at the cap
    capped = np.arange(n_tokens + 1, dtype=np.float64) * cap[:, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        levels = (total[:, None] - capped) / (outside[:, None] + uncapped)
        right = (levels >= 0) & (levels * padded <= cap[:, None])  # the next token stays below the cap
    found = levels[np.arange(n_rows), right.argmax(axis=1)]
    return np.where(right.any(axis=1), found, np.inf)


def upper_subgauss(cell: Cells, variance: FloatArray, factor: float) -> FloatArray:
    """KL at most this, if ``log p/q`` of the tokens not shared is sub-Gaussian with proxy ``factor * variance``.

    Nats, shape (T,). The variance is estimated, so that this is a plausible limit and no certificate.
    """
    return bucket(cell).kl + cell.hidden_p * factor * variance / 2.0
