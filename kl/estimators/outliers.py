"""Single list values that their own lists contradict: wrong numbers, as no model changes one token alone.

Probabilities add up to 1. A model that gives one token less gives the others more, so that ``d = log p/q`` of all of
them moves; and a list of the k best has no entry far below the others while much probability is left to tokens that are
smaller still. A value that was corrupted on its way breaks one of the two rules and leaves all else as it was. Real
differences, however large (another system text or temperature, a suppressed or exchanged token, coarse weights), keep
both: what a token lost is with the others, or with tokens that the other side does not list.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Literal, NamedTuple

import numpy as np

from kl.estimators.align import Aligned, BoolArray, FloatArray, IntArray
from kl.estimators.censored import PRIOR_WEIGHT, SpreadEvidence, SpreadPrior
from kl.estimators.rows import row_counts, row_sums

Side = Literal["P", "Q"]

# The limits were chosen on lists of a 135M model (docs/decisions/0007): of 60,000 real pairs, of weights rounded to 8,
# 4 and 3 bits and six other system texts, k = 5 to 50, none is contradicted.
_LEAST_EXCESS, _EXCESS_SPREADS = 2.0, 5.0  # how far a value lies off the others: nats, and their standard deviations
# No real value is off by so many; the limits below are then this much lower.
_EXTREME_SPREADS, _EASE = 20.0, 0.6
_LEAST_GAIN = 0.5  # nats, from where on a token that one side alone lists may have taken what another lost
_LEAST_SPREAD = 0.05  # nats, where the others agree to rounding
_MIN_OTHERS = 3  # tokens that must agree
_MOST_WRONG = 2  # values of one position
_CONSTANT_NOISE, _SPREAD_NOISE = 0.05, 0.6  # of the balance of the outside: nats, and a share of the others' spread
_BALANCED, _UNBALANCED = 2.5, 3.0  # standard deviations of it: at most without the value, at least with it
_ROUNDING, _TWO_DECIMALS = 1e-3, 1e-2  # to which a listed mass is known
# A gap before the last entry: nats, mean distances in the lower half of the list, and over the number of the others.
_LEAST_GAP, _GAP_STEPS, _GAP_PER_ENTRY = 0.8, 8.0, 16.0
# The mass left over would be at least so many tokens, all as large as the last entry; real lists of 20 have up to 130.
_CROWD, _IMPOSSIBLE_CROWD = math.log(30.0), math.log(3000.0)
_SMALLEST = 1e-6
_NO_LOGPROB = 1e300  # beyond every log-probability, to leave entries out
_FLOAT_NOISE = 2e-6  # of the mass of a list: no more left over may be nothing


class Outlier(NamedTuple):
    """A value far off the other tokens of its position.

    ``certain``: its own lists contradict it. Otherwise it may be real. ``side`` is where the wrong value stands,
    ``None`` if it may be either; ``logp`` and ``logq`` are those of the token, NaN where a side does not list it.
    ``spread`` is the standard deviation of log p/q over the others.
    """

    row: int
    certain: bool
    side: Side | None
    logp: float
    logq: float
    spread: float


def find_outliers(aligned: Aligned, prior: SpreadPrior | None) -> tuple[Outlier, ...]:
    """The worst of each position that has one, by row.

    Parameters
    ----------
    prior : SpreadPrior, optional
        What the data set lets expect of log p/q; it counts for 4 tokens in the spread of a position, so that the few
        tokens of a short list do not agree by chance.
    """
    rows = np.flatnonzero(_may_have_one(aligned, prior))
    if not rows.size:
        return ()
    some = aligned.only(rows)
    entries = _Entries.of(some, *_others(some.log_ratio, some.shared, None if prior is None else prior.at(some)))
    found = {item.row: item for item in _alone(some, entries)}
    found |= {item.row: item for side in ("P", "Q") for item in _below_the_best(some, entries, side)}
    return tuple(found[row]._replace(row=int(rows[row])) for row in sorted(found))


def spread_evidence(aligned: Aligned) -> SpreadEvidence:
    """What positions say about the spread of log p/q, without those that contradict themselves."""
    wrong = [item.row for item in find_outliers(aligned, None) if item.certain]
    return SpreadEvidence.of(aligned.only(np.delete(np.arange(len(aligned.logp)), wrong)) if wrong else aligned)


def _may_have_one(aligned: Aligned, prior: SpreadPrior | None) -> BoolArray:
    """Positions at which there is something to look at, and some more: most have nothing. Shape (T,)."""
    found = (aligned.log_open_p.max(axis=1) > -np.inf) | (aligned.log_open_q.max(axis=1) > -np.inf)
    found[_may_be_far(aligned, prior)] = True
    lists_p, lists_q = _Lists.without_open(aligned, "P"), _Lists.without_open(aligned, "Q")
    for mine, other in ((lists_p, lists_q), (lists_q, lists_p)):
        for n_wrong in range(1, _MOST_WRONG + 1):
            found |= mine.is_below_a_gap(n_wrong, other)
    return found


def _may_be_far(aligned: Aligned, prior: SpreadPrior | None) -> IntArray:
    """Rows of which an entry may be far off the others, by the largest and smallest log p/q alone."""
    most, least = aligned.log_ratio.max(axis=1), aligned.log_ratio.min(axis=1)  # or 0, where a token is not shared
    top_p = (aligned.logp - _NO_LOGPROB * aligned.shared).max(axis=1) - aligned.log_limit_q
    top_q = (aligned.logq - _NO_LOGPROB * (aligned.index_p >= 0)).max(axis=1) - aligned.log_limit_p
    highest, lowest = np.maximum(most, top_p), np.minimum(least, -top_q)
    wide = np.maximum(highest - least, most - lowest) >= _LEAST_EXCESS  # the median is between most and least
    rows = np.flatnonzero(wide & (aligned.overlap > _MIN_OTHERS))
    expected = None if prior is None else prior.at(aligned)[rows]
    centre, spread = _others(aligned.log_ratio[rows], aligned.shared[rows], expected)
    return rows[np.maximum(highest[rows] - centre, centre - lowest[rows]) >= _far_limit(spread)]


def _far_limit(spread: FloatArray) -> FloatArray:
    return np.maximum(_LEAST_EXCESS, _EXCESS_SPREADS * spread)


def _others(ratio: FloatArray, shared: BoolArray, expected: FloatArray | None) -> tuple[FloatArray, FloatArray]:
    """Median of log p/q over the shared tokens, and a standard deviation that a few of them do not move; shape (T,).

    Parameters
    ----------
    ratio, shared : shape (T, K)
    expected : shape (T,), optional
        Variance that the data set lets expect.
    """
    n = row_counts(shared)
    centre = _median(ratio, shared, n)
    deviation = 1.4826 * _median(np.abs(ratio - centre[:, None]), shared, n)  # of a normal law
    weight = 0.0 if expected is None else PRIOR_WEIGHT
    variance = (n * np.square(deviation) + weight * (0.0 if expected is None else expected)) / np.maximum(n + weight, 1)
    return centre, np.maximum(np.sqrt(variance), _LEAST_SPREAD)


def _median(values: FloatArray, chosen: BoolArray, n: IntArray) -> FloatArray:
    """Of the n chosen ones of each row; 0 where there is none."""
    rising = np.sort(np.ascontiguousarray(values + _NO_LOGPROB * ~chosen), axis=1)  # the others last
    rows = np.arange(len(values))
    middle = (rising[rows, np.maximum(n - 1, 0) // 2] + rising[rows, n // 2]) / 2
    return np.where(n > 0, middle, 0.0)


@dataclass(frozen=True, slots=True)
class _Entries:
    """All tokens of either list, shape (T, K_p + K_q): P's, then Q's; a shared token stands in P's part.

    ``logp`` and ``logq`` are NaN where a side does not list the token. ``excess`` is how far log p/q is off the others,
    at least that far where it is not known; ``is_far`` where that is much, ``ease`` a factor of the limits.
    ``spread``, shape (T,), is the others'.
    """

    logp: FloatArray
    logq: FloatArray
    excess: FloatArray
    is_far: BoolArray
    ease: FloatArray
    spread: FloatArray

    @classmethod
    def of(cls, aligned: Aligned, centre: FloatArray, spread: FloatArray) -> _Entries:
        shared = aligned.shared
        logp = np.where(np.isfinite(aligned.logp), aligned.logp, np.nan)
        logq = np.where(shared, aligned.shared_logq, np.nan)
        only_q = np.where(np.isfinite(aligned.logq) & (aligned.index_p < 0), aligned.logq, np.nan)
        centred = centre[:, None]
        # An open entry of the other side may be any token, also one that this side lists.
        least = np.maximum(logp - aligned.log_limit_q[:, None] - centred, 0.0)
        most = np.minimum(aligned.log_limit_p[:, None] - only_q - centred, 0.0)
        excess = np.nan_to_num(
            np.concatenate([np.where(shared, aligned.log_ratio - centred, least), most], axis=1), nan=0.0
        )
        return cls(
            np.concatenate([logp, np.full(only_q.shape, np.nan)], axis=1),
            np.concatenate([logq, only_q], axis=1),
            excess,
            (np.abs(excess) >= _far_limit(spread)[:, None]) & (aligned.overlap > _MIN_OTHERS)[:, None],
            np.where(np.abs(excess) >= _EXTREME_SPREADS * spread[:, None], _EASE, 1.0),
            spread,
        )

    def only(self, rows: IntArray) -> _Entries:
        """Some of the positions."""
        return _Entries(*(getattr(self, item.name)[rows] for item in fields(self)))


def _alone(aligned: Aligned, entries: _Entries) -> Iterator[Outlier]:
    """Values far off all others; certainly wrong where the masses add up without them and do not with them."""
    rows = np.flatnonzero(entries.is_far.any(axis=1))
    if not rows.size:
        return
    some, at = entries.only(rows), np.arange(len(rows))
    balance = _Balance.of(aligned.only(rows), some)
    far = np.argsort(-np.abs(some.excess), axis=1, kind="stable")[:, :_MOST_WRONG]
    certain = np.zeros(len(rows), dtype=np.bool_)
    for n in range(1, far.shape[1] + 1):
        last = far[:, n - 1]
        wrong = balance.is_only_without(far[:, :n], some.ease[at, last]) & some.is_far[at, last] & ~certain
        for row in np.flatnonzero(wrong):
            certain[row] = _is_off_the_line(some.logp[row], some.logq[row], far[row, :n])
    first = some.logp[at, far[:, 0]].tolist(), some.logq[at, far[:, 0]].tolist()
    columns = zip(rows.tolist(), certain.tolist(), *first, some.spread.tolist(), strict=True)
    yield from (Outlier(row, is_wrong, None, logp, logq, spread) for row, is_wrong, logp, logq, spread in columns)


def _has_two_decimals(logs: FloatArray) -> BoolArray:
    steps = 100.0 * np.where(np.isfinite(logs), logs, 0.0)
    return np.abs(steps - np.rint(steps)).max(axis=1) < _SMALLEST


class _Balance(NamedTuple):
    """The masses of positions, their entries as in `_Entries`; shapes (T, K) and (T,).

    Of both sides: ``caps``, logarithms, the ``limits`` of the mass of a token that they do not name, and the mass
    ``opened`` of their open entries. ``rounding`` is what a listed mass is exact to.

    With the shared masses P_I and Q_I, 1 - P_I and 1 - Q_I are outside. Tokens outside differ like the shared ones, so
    that log (1 - P_I)/(1 - Q_I) is near the median of their log p/q.
    """

    logp: FloatArray
    logq: FloatArray
    caps: tuple[FloatArray, FloatArray]
    limits: tuple[FloatArray, FloatArray]
    opened: tuple[FloatArray, FloatArray]
    spread: FloatArray
    rounding: FloatArray

    @classmethod
    def of(cls, aligned: Aligned, entries: _Entries) -> _Balance:
        two_decimals = _has_two_decimals(aligned.logp) | _has_two_decimals(aligned.logq)
        return cls(
            entries.logp,
            entries.logq,
            (aligned.log_cap_p, aligned.log_cap_q),
            (np.exp(aligned.log_limit_p), np.exp(aligned.log_limit_q)),
            (aligned.open_p, aligned.open_q),
            entries.spread,
            np.where(two_decimals, _TWO_DECIMALS, _ROUNDING),
        )

    def is_only_without(self, far: IntArray, ease: FloatArray) -> BoolArray:
        """Whether the outside balances if the tokens ``far`` may have any value, and not if theirs are right.

        What the far ones lost may have gone to tokens that one side alone lists, above all that the other could give
        them, or to open entries: whatever part of these balances the outside, the values may be right.

        Parameters
        ----------
        far : shape (T, n), the columns of n tokens
        ease : shape (T,)
        """
        others = np.ones(self.logp.shape, dtype=np.bool_)
        np.put_along_axis(others, far, np.False_, axis=1)
        shared = ~np.isnan(self.logp) & ~np.isnan(self.logq) & others
        n = row_counts(shared)
        centre = _median(np.where(shared, self.logp - self.logq, 0.0), shared, n)
        out_p, out_q = 1.0 - _mass(self.logp, shared), 1.0 - _mass(self.logq, shared)
        (low_p, high_p), (low_q, high_q) = self._masses(~others, 0), self._masses(~others, 1)
        noise = np.hypot(_CONSTANT_NOISE, _SPREAD_NOISE * self.spread) * np.sqrt(1.0 + 4.0 / np.maximum(n, 1))
        rounding = self.rounding / np.maximum(np.minimum(out_p, out_q), self.rounding)
        without = np.abs(_log(out_p) - _log(out_q) - centre) / np.hypot(noise, rounding)
        only_p = self.opened[0] + _gained(self.logp, self.logq, self.caps[1] + centre, others)
        only_q = self.opened[1] + _gained(self.logq, self.logp, self.caps[0] - centre, others)
        lowest = _log(out_p - high_p - only_p) - _log(out_q - low_q) - centre
        highest = _log(out_p - low_p) - _log(out_q - high_q - only_q) - centre
        with_them = np.maximum(np.maximum(lowest, -highest), 0.0) / noise
        moved = np.abs(out_p - low_p - (out_q - low_q) * np.exp(centre))
        unbalanced = np.maximum(ease * _UNBALANCED, without + ease * _BALANCED)
        is_so = (moved > self.rounding) & (without <= _BALANCED) & (with_them >= unbalanced)
        return is_so & (n >= _MIN_OTHERS)

    def _masses(self, far: BoolArray, side: int) -> tuple[FloatArray, FloatArray]:
        """What the far tokens have by their values, those that are not listed at 0 and at the cap."""
        logs = (self.logp, self.logq)[side]
        listed = _mass(logs, far & ~np.isnan(logs))
        return listed, listed + self.limits[side] * row_counts(far & np.isnan(logs))


def _mass(logs: FloatArray, chosen: BoolArray) -> FloatArray:
    """Of the chosen tokens of each row."""
    return row_sums(np.exp(np.where(chosen, logs, -np.inf)))


def _gained(logs: FloatArray, others: FloatArray, most: FloatArray, chosen: BoolArray) -> FloatArray:
    """Mass of the chosen tokens that one side alone lists, well above what the other has."""
    return _mass(logs, np.isnan(others) & (logs >= (most + _LEAST_GAIN)[:, None]) & chosen)


def _is_off_the_line(logp: FloatArray, logq: FloatArray, far: IntArray) -> bool:
    """Whether each of ``far`` is off the line, log p/q over log p q of one position, that another temperature makes."""
    shared = ~np.isnan(logp) & ~np.isnan(logq)
    known = far[shared[far]]
    shared[far] = False
    ratio, level = logp - logq, (logp + logq) / 2
    slope = _slope(level[shared], ratio[shared])
    centre = float(np.median(ratio[shared] - slope * level[shared]))
    return bool((np.abs(ratio[known] - slope * level[known] - centre) >= _LEAST_EXCESS).all())


def _slope(x: FloatArray, y: FloatArray) -> float:
    """The median of the slopes of all pairs of points (Theil and Sen); 0 where no two differ in x."""
    i, j = np.triu_indices(len(x), 1)
    run = x[i] - x[j]
    apart = np.abs(run) > _SMALLEST
    return float(np.median((y[i] - y[j])[apart] / run[apart])) if apart.any() else 0.0


def _log(mass: FloatArray) -> FloatArray:
    return np.log(np.maximum(mass, _SMALLEST))


def _below_the_best(aligned: Aligned, entries: _Entries, side: Side) -> Iterator[Outlier]:
    """Last entries below a gap that the other side does not have, in a list that leaves much over."""
    mine, other = _Lists.of(aligned, "P" if side == "P" else "Q"), _Lists.of(aligned, "Q" if side == "P" else "P")
    for n_wrong in range(_MOST_WRONG, 0, -1):
        gap, crowd = mine.gap(n_wrong), mine.crowd(n_wrong)
        ordinary = mine.ordinary_gap(n_wrong)
        for row in np.flatnonzero(mine.is_below_a_gap(n_wrong, other)):
            at = int(mine.n[row]) - n_wrong
            column = int(mine.entry[row, at])
            is_far = column >= 0 and entries.is_far[row, column]
            least = entries.ease[row, column] * _LEAST_GAP if is_far else max(_LEAST_GAP, ordinary[row])
            if gap[row] >= least or (gap[row] >= _LEAST_GAP and crowd[row] >= _IMPOSSIBLE_CROWD):
                logp, logq = (
                    (float(entries.logp[row, column]), float(entries.logq[row, column]))
                    if column >= 0
                    else (float(mine.logs[row, at]), math.nan)[:: 1 if side == "P" else -1]
                )
                yield Outlier(int(row), True, side, logp, logq, float(entries.spread[row]))


class _Lists(NamedTuple):
    """One side's lists: all log-probabilities by falling value and where each stands in `_Entries`, shape (T, K).

    An open entry stands at -1: a gap and what is left over need no names. ``n`` and ``rest``, the mass left over, have
    shape (T,). What Q was asked for beside its list is none of them.
    """

    logs: FloatArray
    entry: IntArray
    n: IntArray
    rest: FloatArray

    @classmethod
    def of(cls, aligned: Aligned, side: Side) -> _Lists:
        if side == "P":
            logs, unclear, coverage = aligned.logp, aligned.log_open_p, aligned.coverage_p
            entry = np.zeros(logs.shape, dtype=np.int64) + np.arange(logs.shape[1], dtype=np.int64)
        else:
            logs, unclear = np.where(aligned.best_q, aligned.logq, -np.inf), aligned.log_open_q
            coverage = aligned.coverage_q - aligned.wanted_mass_q
            own = aligned.logp.shape[1] + np.arange(logs.shape[1], dtype=np.int64)
            entry = np.where(aligned.index_p >= 0, aligned.index_p, own)
        logs = np.concatenate([logs, unclear], axis=1)
        entry = np.concatenate([entry, np.full(unclear.shape, -1, dtype=np.int64)], axis=1)
        falling = np.argsort(-logs, axis=1, kind="stable")
        n = np.count_nonzero(np.isfinite(logs), axis=1)
        logs, entry = np.take_along_axis(logs, falling, axis=1), np.take_along_axis(entry, falling, axis=1)
        return cls(logs, entry, n, 1.0 - coverage)

    @classmethod
    def without_open(cls, aligned: Aligned, side: Side) -> _Lists:
        """Right where a list has no open entries; places in `_Entries` are not looked up."""
        none = np.zeros((0, 0), dtype=np.int64)
        if side == "P":
            return cls(aligned.logp, none, row_counts(aligned.logp > -np.inf), 1.0 - aligned.coverage_p)
        return cls(aligned.logq, none, aligned.n_best_q, 1.0 - (aligned.coverage_q - aligned.wanted_mass_q))

    def is_below_a_gap(self, n_wrong: int, other: _Lists) -> BoolArray:
        """Whether the last ``n_wrong`` entries may be below a gap that the other side does not have, shape (T,)."""
        gap, crowd = self.gap(n_wrong), self.crowd(n_wrong)
        is_low = (self.rest > _FLOAT_NOISE) & (gap >= _EASE * _LEAST_GAP) & (crowd >= _CROWD)
        return is_low & (crowd - other.crowd(1) >= gap / 2)

    def _at(self, column: IntArray) -> FloatArray:
        found = self.logs[np.arange(len(self.n)), np.maximum(column, 0)]
        return np.where(np.isfinite(found), found, 0.0)  # a list may name no token at all

    def gap(self, n_wrong: int) -> FloatArray:
        """Distance of the last ``n_wrong`` entries to the others, nats, shape (T,); 0 where these are too few."""
        enough = self.n - n_wrong > _MIN_OTHERS
        return np.where(enough, self._at(self.n - n_wrong - 1) - self._at(self.n - n_wrong), 0.0)

    def ordinary_gap(self, n_wrong: int) -> FloatArray:
        """From where on a gap is out of the ordinary by the distances of the others, shape (T,)."""
        n = np.maximum(self.n - n_wrong, 1)
        step = (self._at(n // 2 - 1) - self._at(n - 1)) / np.maximum(n - n // 2, 1)
        return np.maximum(_GAP_STEPS * step, _GAP_PER_ENTRY / n)

    def crowd(self, n_wrong: int) -> FloatArray:
        """Logarithm of how many tokens, as large as the first of the last ``n_wrong``, the mass left over is."""
        return np.log(np.maximum(self.rest, _SMALLEST)) - self._at(self.n - n_wrong)
