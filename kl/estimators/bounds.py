"""What two top-k lists say for certain: tight lower bounds of every divergence, and upper bounds under an assumption.

At one position let A and B be the listed tokens of P and Q. Known are p on A and q on B, the rest masses
``r_p = 1 - sum_A p`` and ``r_q``, and the caps ``c_p`` and ``c_q``: no unlisted token has more than the smallest listed
one. Unknown are y = q on A outside B, x = p on B outside A, and the masses X, Y of the tokens in neither list.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import rel_entr

from kl.estimators.align import Aligned, BoolArray, FloatArray

# A softmax in float32 makes lists of 20 exceed 1 by up to 1e-6, so a smaller rest mass is noise. The slack is added to
# both rests; by the log-sum inequality equal additions never raise a divergence, so that the bounds stay valid.
REST_SLACK = 1e-6
SMALLEST = 1e-300  # probability of a token that exists; below, float64 ends and divergences become infinite
_LOG_SMALLEST = -690.0  # of caps and listed masses, a little above it


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
    rest_p, rest_q : shape (T,)
        Mass that is not listed, at least 0, without the slack.
    open_p, open_q : shape (T,)
        Listed mass that cannot be matched: it lies somewhere outside the cells above.
    slack : float
        Added to both rests.
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
    slack: float

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

    Parameters
    ----------
    slack : float
        Above 0. At 0 a rest mass of exactly 0 would make bounds infinite for a rounding error.
    """
    if not slack > 0:
        raise ValueError(f"slack={slack} must be above 0; rests of exactly 0 have no finite bound.")
    shared_p, shared_q = aligned.index_q >= 0, aligned.index_p >= 0
    listed_p, listed_q = np.isfinite(aligned.logp), np.isfinite(aligned.logq)
    shared_logq = aligned.shared_logq
    only_p, only_q = listed_p & ~shared_p, listed_q & ~shared_q
    return Cells(
        p=np.where(shared_p, np.exp(aligned.logp), 0.0),
        q=np.where(shared_p, np.exp(shared_logq), 0.0),
        log_ratio=np.subtract(aligned.logp, shared_logq, out=np.zeros(shared_p.shape), where=shared_p),
        a=np.where(only_p, _exp(aligned.logp), 0.0),
        b=np.where(only_q, _exp(aligned.logq), 0.0),
        n_a=np.count_nonzero(only_p, axis=1),
        n_b=np.count_nonzero(only_q, axis=1),
        cap_p=_exp(aligned.log_cap_p),
        cap_q=_exp(aligned.log_cap_q),
        rest_p=np.maximum(1.0 - aligned.coverage_p, 0.0),
        rest_q=np.maximum(1.0 - aligned.coverage_q, 0.0),
        open_p=aligned.open_p,
        open_q=aligned.open_q,
        slack=slack,
    )


def _exp(logs: FloatArray) -> FloatArray:
    return np.exp(np.maximum(logs, _LOG_SMALLEST))


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
    """Tight lower bounds: no pair of distributions with these lists has a smaller divergence.

    One completion minimises KL, reverse KL, Jensen-Shannon, total variation and every other f-divergence, as the
    optimality conditions hold the ratio p/q alone. The size of the vocabulary does not matter. Cost: one sort per row.
    With log-probabilities rounded to a step d the head, and so the bound, moves by up to d.
    """
    return divergences(cell, lower_completion(cell))


def lower_completion(cell: Cells) -> Completion:
    """The completion at which every f-divergence is smallest.

    With X >= open_p and Y >= open_q (the unmatched listed mass cannot leave the outside cell) and one ratio L = X/Y the
    conditions are ``x = min(c_p, L b)`` and ``y = min(c_q, a / L)``. As every a >= c_p and every b >= c_q, either
    L <= c_p/c_q and all y are at their cap, or all x are. Either way the other side is one water-filling.
    """
    free = _free_outside(cell)
    if not (cell.open_p.any() or cell.open_q.any()):
        return free
    return _keep_open_outside(cell, free)


def _free_outside(cell: Cells) -> Completion:
    """`lower_completion` under X >= 0 and Y >= 0."""
    left_p = cell.total_p - cell.n_b * cell.cap_p  # X if every x is at its cap
    left_q = cell.total_q - cell.n_a * cell.cap_q
    fill_q = (left_q >= 0) & ((left_p < 0) | (left_p * cell.cap_q <= cell.cap_p * left_q))
    fill_p = ~fill_q & (left_p >= 0)
    out_p, out_q = np.where(fill_p, left_p, 0.0), np.where(fill_q, left_q, 0.0)
    level_p = _water_level(cell.b, cell.cap_p, out_q, cell.total_p)
    level_q = _water_level(cell.a, cell.cap_q, out_p, cell.total_q)
    x = _filled(cell.b, cell.cap_p, np.where(fill_p, np.inf, level_p))
    y = _filled(cell.a, cell.cap_q, np.where(fill_q, np.inf, level_q))
    with np.errstate(invalid="ignore"):  # levels that no row uses may be infinite
        return Completion(x, y, np.where(fill_q, level_p * out_q, out_p), np.where(fill_p, level_q * out_p, out_q))


def _keep_open_outside(cell: Cells, free: Completion) -> Completion:
    """`lower_completion` where open mass must stay outside: the best of the faces X = open_p, Y = open_q."""
    short = (free.out_p < cell.open_p) | (free.out_q < cell.open_q)
    room_p, room_q = cell.total_p - cell.open_p, cell.total_q - cell.open_q
    best, best_kl = free, np.where(short, np.inf, -np.inf)
    nothing = np.zeros_like(room_p)
    # A side that is held at its open mass fills its own tokens; the other side keeps one ratio to the mass held.
    held = _water_level(cell.b, cell.cap_p, nothing, room_p), _water_level(cell.a, cell.cap_q, nothing, room_q)
    follows = (
        _water_level(cell.b, cell.cap_p, cell.open_q, cell.total_p),
        _water_level(cell.a, cell.cap_q, cell.open_p, cell.total_q),
    )
    for hold_p, hold_q in ((True, False), (False, True), (True, True)):
        level_p, level_q = held[0] if hold_p else follows[0], held[1] if hold_q else follows[1]
        with np.errstate(invalid="ignore"):
            out_p = cell.open_p if hold_p else level_p * cell.open_q
            out_q = cell.open_q if hold_q else level_q * cell.open_p
        x, y = _filled(cell.b, cell.cap_p, level_p), _filled(cell.a, cell.cap_q, level_q)
        trial = Completion(x, y, out_p, out_q)
        fits = _fits(trial, cell)
        kl = np.where(fits, divergences(cell, trial).kl, np.inf)
        best = _where(kl < best_kl, trial, best)
        best_kl = np.minimum(kl, best_kl)
    return best


def _fits(trial: Completion, cell: Cells) -> BoolArray:
    """Whether the masses add up and the open mass stays outside (rounding allowed)."""
    near = 1e-12
    sums_p = np.abs(trial.x.sum(axis=1) + trial.out_p - cell.total_p) <= near
    sums_q = np.abs(trial.y.sum(axis=1) + trial.out_q - cell.total_q) <= near
    return sums_p & sums_q & (trial.out_p >= cell.open_p - near) & (trial.out_q >= cell.open_q - near)


def _where(chosen: BoolArray, new: Completion, old: Completion) -> Completion:
    column = chosen[:, None]
    return Completion(
        np.where(column, new.x, old.x),
        np.where(column, new.y, old.y),
        np.where(chosen, new.out_p, old.out_p),
        np.where(chosen, new.out_q, old.out_q),
    )


def _filled(weights: FloatArray, cap: FloatArray, level: FloatArray) -> FloatArray:
    """``min(cap, level * weight)``, 0 where there is no token."""
    with np.errstate(invalid="ignore"):
        filled = np.minimum(cap[:, None], level[:, None] * weights)
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
