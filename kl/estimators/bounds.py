"""What two top-k lists say for certain: tight lower bounds of every divergence, and upper bounds under an assumption.

At one position let A and B be the listed tokens of P and Q. Known are p on A and q on B, the rest masses
``r_p = 1 - sum_A p`` and ``r_q``, and the caps ``c_p`` and ``c_q``: no unlisted token has more than the smallest listed
one. Unknown are y = q on A outside B, x = p on B outside A, and the masses X, Y of the tokens in neither list.

An *open* entry has a known probability and may be any token that its own side does not name: x and y may take it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import numpy as np
from scipy.special import rel_entr

from kl.estimators.align import Aligned, BoolArray, FloatArray, IntArray
from kl.estimators.rows import Entries, row_sums

# A softmax in float32 makes lists of 20 exceed 1 by up to 1e-6, so a smaller rest mass is noise. The slack is added to
# both rests; by the log-sum inequality equal additions never raise a divergence, so that the bounds stay valid.
REST_SLACK = 1e-6
SMALLEST = 1e-300  # probability of a token that exists; below, float64 ends and divergences become infinite
_LOG_SMALLEST = -690.0  # of caps and listed masses, a little above it
# A server whose values are all too large by one constant shows it only where a list is whole (llama.cpp: up to 2.5e-4,
# measured); more is a fault of single lists.
_COMMON_NOISE = 1e-3
_LARGEST_LEAN = float(np.nextafter(1.0, 0.0))  # of p from q, as a share of their sum
_BISECTIONS = 64  # of a logarithm within some hundreds: to the last bit


class Divergences(NamedTuple):
    """Of P from Q at each position, shape (T,): nats, and total variation in probability."""

    kl: FloatArray
    reverse_kl: FloatArray
    js: FloatArray
    tv: FloatArray


@dataclass(frozen=True, slots=True)
class Alone:
    """The tokens that one side alone lists; all shape (N,), in the order of `Aligned.alone_p` or `alone_q`.

    Attributes
    ----------
    at : which they are
    mass : float64, their probability
    cap : float64
        The largest that the other side gives each in the smallest completion: its cap, or more where the token may be
        one of its open entries.
    """

    at: Entries
    mass: FloatArray
    cap: FloatArray

    def only(self, rows: BoolArray) -> Alone:
        """Those of some positions, shape (T,)."""
        keep = rows[self.at.row]
        return Alone(self.at.within(rows), self.mass[keep], self.cap[keep])


@dataclass(frozen=True, slots=True)
class Cells:
    """T positions split into shared tokens, tokens that one side lists, and the rest. In probability, shape (T,).

    Attributes
    ----------
    shared : Divergences
        Sums over the shared tokens alone; the KL and its reverse may be below 0.
    a, b : Alone
        The tokens that only P lists with their p, and those that only Q lists with their q; x and y are what the other
        side gives them. ``sum_a`` and ``sum_b`` are their masses, ``n_a`` and ``n_b`` their numbers.
    cap_p, cap_q : float64
        Largest possible mass of one unlisted token.
    rest_p, rest_q : float64
        Mass that is not listed, at least 0, without the slack.
    open_p, open_q : float64
        Mass of the open entries: x and X, or y and Y, share it with the rest.
    slack : float64
        Added to both rests.
    mass_above_1_p, mass_above_1_q : bool
        Whether the listed mass was above 1 by more than the noise of float32, and the list was scaled to 1.
    """

    shared: Divergences
    a: Alone
    b: Alone
    sum_a: FloatArray
    sum_b: FloatArray
    n_a: IntArray
    n_b: IntArray
    cap_p: FloatArray
    cap_q: FloatArray
    rest_p: FloatArray
    rest_q: FloatArray
    open_p: FloatArray
    open_q: FloatArray
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
        return self.rest_p + self.open_p + self.sum_a

    @property
    def hidden_q(self) -> FloatArray:
        """Q's mass whose value under P is unknown, without slack. Shape (T,)."""
        return self.rest_q + self.open_q + self.sum_b

    def only(self, rows: BoolArray) -> Cells:
        """Some of the positions, shape (T,)."""
        names = [item.name for item in fields(self) if item.name not in ("shared", "a", "b")]
        arrays = {name: getattr(self, name)[rows] for name in names}
        shared = Divergences(*(part[rows] for part in self.shared))
        return replace(self, **arrays, shared=shared, a=self.a.only(rows), b=self.b.only(rows))


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
    cap_p, cap_q = _exp(aligned.log_cap_p) / scale_p, _exp(aligned.log_cap_q) / scale_q
    at_a, at_b = aligned.alone_p, aligned.alone_q
    mass_a = _exp(at_a.of_array(aligned.logp)) / scale_p[at_a.row]
    mass_b = _exp(at_b.of_array(aligned.logq)) / scale_q[at_b.row]
    return Cells(
        shared=_shared(aligned, scale_p, scale_q),
        a=Alone(at_a, mass_a, _raised_caps(at_a, mass_a, cap_q, np.exp(aligned.log_open_q) / scale_q[:, None])),
        b=Alone(at_b, mass_b, _raised_caps(at_b, mass_b, cap_p, np.exp(aligned.log_open_p) / scale_p[:, None])),
        sum_a=at_a.sums(mass_a),
        sum_b=at_b.sums(mass_b),
        n_a=at_a.counts(),
        n_b=at_b.counts(),
        cap_p=cap_p,
        cap_q=cap_q,
        rest_p=np.maximum(1.0 - aligned.coverage_p, 0.0),
        rest_q=np.maximum(1.0 - aligned.coverage_q, 0.0),
        open_p=aligned.open_p / scale_p,
        open_q=aligned.open_q / scale_q,
        slack=_slack(
            np.maximum(scale_p, scale_q) - 1.0,
            np.maximum(slack, np.maximum(aligned.step_p, aligned.step_q) / 2),
            aligned.response,
        ),
        mass_above_1_p=above_p,
        mass_above_1_q=above_q,
    )


def _shared(aligned: Aligned, scale_p: FloatArray, scale_q: FloatArray) -> Divergences:
    """The parts of the tokens that both sides list."""
    p, q = _exp(aligned.logp), _exp(aligned.shared_logq)
    for values, scale in ((p, scale_p), (q, scale_q)):
        values *= aligned.shared
        values /= scale[:, None]
    log_ratio = aligned.log_ratio - (np.log(scale_p) - np.log(scale_q))[:, None]
    log_ratio *= aligned.shared
    return Divergences(
        row_sums(p * log_ratio), -row_sums(q * log_ratio), row_sums(js_terms(p, q)), 0.5 * row_sums(np.abs(p - q))
    )


def _slack(excess: FloatArray, least: FloatArray, response: IntArray) -> FloatArray:
    if not excess.any():
        return least
    starts = np.flatnonzero(np.diff(response, prepend=response[0] - 1))
    common = np.minimum(np.maximum.reduceat(excess, starts), _COMMON_NOISE)
    return np.maximum(np.maximum(excess, np.repeat(common, np.diff(starts, append=len(response)))), least)


def _exp(logs: FloatArray) -> FloatArray:
    known = np.maximum(logs, _LOG_SMALLEST)
    return np.exp(known, out=known)


def _raised_caps(at: Entries, weights: FloatArray, cap: FloatArray, open_values: FloatArray) -> FloatArray:
    """Caps of the tokens that only the other side names, each of which may be one of a side's open entries.

    At most one token can be one entry: what the tokens have above the cap is, all together, at most what the entries
    have above it. Of all ways to share that the smallest completion takes ``min(largest entry, L * weight)`` with one
    level L, at which it is used up.

    Parameters
    ----------
    at, weights : shape (N,)
        Of the tokens under the other side, above 0.
    cap : shape (T,)
    open_values : shape (T, M)
        Probabilities of the open entries; 0 is none.
    """
    caps = cap[at.row]
    opened = open_values.max(axis=1) > 0
    chosen = opened[at.row]
    if not chosen.any():
        return caps
    held, least, some = weights[chosen], caps[chosen], at.within(opened)
    values, lowest = open_values[opened], cap[opened]
    largest = values.max(axis=1)
    budget = row_sums(np.maximum(values - lowest[:, None], 0.0))

    def raised(level: FloatArray) -> FloatArray:
        return np.maximum(np.minimum(largest[some.row], level[some.row] * held), least)

    level = _rising_root(lambda level: some.sums(raised(level) - least) - budget, lowest, largest / SMALLEST)
    caps[chosen] = raised(level)
    return caps


class Completion(NamedTuple):
    """Values for what the lists leave open: x and y of `Cells.b` and `Cells.a`; X and Y, shape (T,)."""

    x: FloatArray
    y: FloatArray
    out_p: FloatArray
    out_q: FloatArray


def divergences(cell: Cells, completion: Completion) -> Divergences:
    """The divergences of one completion, the tokens outside both lists taken as a single cell."""
    listed, out_p, out_q = of_listed(cell, completion), completion.out_p, completion.out_q
    return Divergences(
        np.maximum(listed.kl + rel_entr(out_p, out_q), 0.0),
        np.maximum(listed.reverse_kl + rel_entr(out_q, out_p), 0.0),
        # Lists that exceed 1 by rounding would exceed the largest possible values.
        np.minimum(listed.js + js_terms(out_p, out_q), np.log(2.0)),
        np.minimum(listed.tv + 0.5 * np.abs(out_p - out_q), 1.0),
    )


def of_listed(cell: Cells, completion: Completion) -> Divergences:
    """The parts of the tokens that a side lists; KL and its reverse may be below 0."""
    a, b, x, y = cell.a, cell.b, completion.x, completion.y
    ratio_a, ratio_b = np.log(a.mass / y), np.log(x / b.mass)
    return Divergences(
        cell.shared.kl + a.at.sums(a.mass * ratio_a) + b.at.sums(x * ratio_b),
        cell.shared.reverse_kl - a.at.sums(y * ratio_a) - b.at.sums(b.mass * ratio_b),
        cell.shared.js + a.at.sums(js_terms(a.mass, y)) + b.at.sums(js_terms(x, b.mass)),
        cell.shared.tv + 0.5 * (a.at.sums(np.abs(a.mass - y)) + b.at.sums(np.abs(x - b.mass))),
    )


def js_terms(p: FloatArray, q: FloatArray) -> FloatArray:
    """Each cell's part of the Jensen-Shannon divergence in nats, at least 0; shape of the arguments."""
    whole, lean = p + q, np.abs(p - q)  # arrays of its own, which are written over: fresh memory costs more than sums
    lean /= np.maximum(whole, SMALLEST)
    np.minimum(lean, _LARGEST_LEAN, out=lean)
    terms, others = np.log1p(lean), np.log1p(-lean)
    terms *= 1.0 + lean
    others *= np.subtract(1.0, lean, out=lean)
    terms += others
    whole *= 0.25
    terms *= whole
    return np.maximum(terms, 0.0, out=terms)


def bucket(cell: Cells) -> Divergences:
    """Divergences of the shared tokens plus one cell for everything else: a lower bound, rarely tight."""
    out_p, out_q, shared = cell.hidden_p + cell.slack, cell.hidden_q + cell.slack, cell.shared
    return Divergences(
        np.maximum(shared.kl + rel_entr(out_p, out_q), 0.0),
        np.maximum(shared.reverse_kl + rel_entr(out_q, out_p), 0.0),
        np.minimum(shared.js + js_terms(out_p, out_q), np.log(2.0)),
        np.minimum(shared.tv + 0.5 * np.abs(out_p - out_q), 1.0),
    )


def lower_bounds(cell: Cells) -> Divergences:
    """Lower bounds: no pair of distributions with these lists has a smaller divergence. Tight without open mass.

    One completion minimises KL, reverse KL, Jensen-Shannon, total variation and every other f-divergence, as the
    optimality conditions hold the ratio p/q alone. The size of the vocabulary does not matter. With log-probabilities
    rounded to a step d the head, and so the bound, moves by up to d.
    """
    return divergences(cell, lower_completion(cell))


def lower_completion(cell: Cells) -> Completion:
    """The completion at which every f-divergence is smallest.

    With one ratio L = X/Y the conditions are ``x = min(cap_x, L b)`` and ``y = min(cap_y, a / L)``. As a rule every
    a >= c_p and every b >= c_q, so that either L <= c_p/c_q and all y are at their cap, or all x are. Either way the
    other side is one water-filling. With open mass, or a cap above what is listed, L is found by bisection.
    """
    found = _by_levels(cell)
    a, b = cell.a, cell.b
    is_below = (a.at.sums(a.mass < cell.cap_p[a.at.row]) > 0) | (b.at.sums(b.mass < cell.cap_q[b.at.row]) > 0)
    rows = (cell.open_p > 0) | (cell.open_q > 0) | is_below
    if rows.any():
        chosen = (rows[b.at.row], rows[a.at.row], rows, rows)
        for whole, places, part in zip(found, chosen, _by_bisection(cell.only(rows)), strict=True):
            whole[places] = part
    return found


def _by_levels(cell: Cells) -> Completion:
    """`lower_completion` of positions where all tokens of a side have one cap."""
    left_p = cell.total_p - cell.n_b * cell.cap_p  # X if every x is at its cap
    left_q = cell.total_q - cell.n_a * cell.cap_q
    fill_q = (left_q >= 0) & ((left_p < 0) | (left_p * cell.cap_q <= cell.cap_p * left_q))
    fill_p = ~fill_q & (left_p >= 0)
    out_p, out_q = np.where(fill_p, left_p, 0.0), np.where(fill_q, left_q, 0.0)
    level_p = _water_level(cell.b, cell.cap_p, out_q, cell.total_p)
    level_q = _water_level(cell.a, cell.cap_q, out_p, cell.total_q)
    x = _filled(cell.b.mass, cell.cap_p[cell.b.at.row], np.where(fill_p, np.inf, level_p)[cell.b.at.row])
    y = _filled(cell.a.mass, cell.cap_q[cell.a.at.row], np.where(fill_q, np.inf, level_q)[cell.a.at.row])
    with np.errstate(invalid="ignore"):  # levels that no row uses may be infinite
        return Completion(x, y, np.where(fill_q, level_p * out_q, out_p), np.where(fill_p, level_q * out_p, out_q))


def _by_bisection(cell: Cells) -> Completion:
    """`lower_completion` whatever the caps: what is left of P's mass is L times what is left of Q's.

    Where both sides can be filled by x and y alone, and the level at which P's is full is below that of Q's, nothing is
    left outside, and each side has its own level.
    """
    a, b, total_p, total_q = cell.a, cell.b, cell.total_p, cell.total_q

    def left_p(level: FloatArray) -> FloatArray:
        return total_p - b.at.sums(_filled(b.mass, b.cap, level[b.at.row]))

    def left_q(level: FloatArray) -> FloatArray:
        return total_q - a.at.sums(_filled(a.mass, a.cap, 1.0 / level[a.at.row]))

    low = total_p / (cell.sum_b + total_q)
    high = (total_p + cell.sum_a) / total_q
    level = _rising_root(lambda level: level * left_q(level) - left_p(level), low, high)
    out_p, out_q = left_p(level), left_q(level)
    corner = (out_p < 0) & (out_q < 0)
    full_p = _rising_root(lambda level: -left_p(level), np.minimum(low, level), level)
    full_q = _rising_root(left_q, level, np.maximum(high, level))
    level_p, level_q = np.where(corner, full_p, level), np.where(corner, full_q, level)
    x, y = _filled(b.mass, b.cap, level_p[b.at.row]), _filled(a.mass, a.cap, 1.0 / level_q[a.at.row])
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
    """``min(cap, level * weight)``, all of one shape and weights above 0."""
    return np.maximum(np.minimum(cap, level * weights), SMALLEST)


def _water_level(tokens: Alone, cap: FloatArray, outside: FloatArray, total: FloatArray) -> FloatArray:
    """The level L with ``L * outside + sum(min(cap, L * weights)) = total``, row by row; shape (T,).

    ``inf`` where nothing can take the mass: no weight and nothing outside, or all tokens at the cap. Tokens above the
    cap at a level that is too low are above it at the right one: they are taken out until none is.
    """
    at, weights = tokens.at, tokens.mass
    caps, uncapped = cap[at.row], np.ones(len(weights), dtype=np.bool_)
    n_capped = np.zeros(len(cap))
    while True:
        weight = outside + at.sums(weights * uncapped)
        takes = weight > 0
        left = np.maximum(total - n_capped * cap, 0.0)
        level = np.where(takes, left / np.where(takes, weight, 1.0), np.inf)
        below = uncapped & (level[at.row] * weights <= caps)
        if np.array_equal(below, uncapped):
            return level
        uncapped, n_capped = below, at.sums(~below)


def upper_subgauss(cell: Cells, variance: FloatArray, factor: float) -> FloatArray:
    """KL at most this, if ``log p/q`` of the tokens not shared is sub-Gaussian with proxy ``factor * variance``.

    Nats, shape (T,). The variance is estimated, so that this is a plausible limit and no certificate.
    """
    return bucket(cell).kl + cell.hidden_p * factor * variance / 2.0
