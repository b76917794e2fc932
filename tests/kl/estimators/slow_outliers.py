"""Outliers again, a row at a time and without a look at what most rows have not. Slow and obvious."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from kl.estimators.censored import PRIOR_WEIGHT
from kl.estimators.outliers import (
    _BALANCED,
    _CONSTANT_NOISE,
    _CROWD,
    _EASE,
    _EXCESS_SPREADS,
    _EXTREME_SPREADS,
    _FLOAT_NOISE,
    _GAP_PER_ENTRY,
    _GAP_STEPS,
    _IMPOSSIBLE_CROWD,
    _LEAST_EXCESS,
    _LEAST_GAIN,
    _LEAST_GAP,
    _LEAST_SPREAD,
    _MIN_OTHERS,
    _MOST_WRONG,
    _ROUNDING,
    _SMALLEST,
    _SPREAD_NOISE,
    _TWO_DECIMALS,
    _UNBALANCED,
    Outlier,
)


def find_outliers(aligned, prior):
    entries = _Entries.of(aligned, *_others(aligned, prior))
    found = {item.row: item for item in _alone(aligned, entries)}
    found |= {item.row: item for side in ("P", "Q") for item in _below_the_best(aligned, entries, side)}
    return tuple(found[row] for row in sorted(found))


def _others(aligned, prior):
    """Median of log p/q over the shared tokens, and a standard deviation that a few of them do not move; shape (T,)."""
    ratio = _ratios(aligned)
    n = aligned.overlap
    centre = _median(ratio)
    deviation = 1.4826 * _median(np.abs(ratio - centre[:, None]))  # of a normal law
    expected, weight = (np.zeros(len(n)), 0.0) if prior is None else (prior.at(aligned), PRIOR_WEIGHT)
    variance = (n * np.square(deviation) + weight * expected) / np.maximum(n + weight, 1.0)
    return centre, np.maximum(np.sqrt(variance), _LEAST_SPREAD)


def _ratios(aligned):
    shared = aligned.index_q >= 0
    return np.subtract(aligned.logp, aligned.shared_logq, out=np.full(shared.shape, np.nan), where=shared)


def _median(values):
    """Of each row without its NaN; 0 where there is nothing else."""
    rising = np.sort(values, axis=1)  # NaN last
    n = np.count_nonzero(~np.isnan(values), axis=1)
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

    logp: np.ndarray
    logq: np.ndarray
    excess: np.ndarray
    is_far: np.ndarray
    ease: np.ndarray
    spread: np.ndarray

    @classmethod
    def of(cls, aligned, centre, spread):
        shared = aligned.index_q >= 0
        logp = np.where(np.isfinite(aligned.logp), aligned.logp, np.nan)
        logq = np.where(shared, aligned.shared_logq, np.nan)
        only_q = np.where(np.isfinite(aligned.logq) & (aligned.index_p < 0), aligned.logq, np.nan)
        centred = centre[:, None]
        # An open entry of the other side may be any token, also one that this side lists.
        least = np.maximum(logp - aligned.log_limit_q[:, None] - centred, 0.0)
        most = np.minimum(aligned.log_limit_p[:, None] - only_q - centred, 0.0)
        excess = np.nan_to_num(np.concatenate([np.where(shared, _ratios(aligned) - centred, least), most], axis=1))
        limit = np.maximum(_LEAST_EXCESS, _EXCESS_SPREADS * spread)
        return cls(
            np.concatenate([logp, np.full(only_q.shape, np.nan)], axis=1),
            np.concatenate([logq, only_q], axis=1),
            excess,
            (np.abs(excess) >= limit[:, None]) & (aligned.overlap > _MIN_OTHERS)[:, None],
            np.where(np.abs(excess) >= _EXTREME_SPREADS * spread[:, None], _EASE, 1.0),
            spread,
        )


def _alone(aligned, entries):
    """Values far off all others; certainly wrong where the masses add up without them and do not with them."""
    two_decimals = _has_two_decimals(aligned.logp) | _has_two_decimals(aligned.logq)
    rounding = np.where(two_decimals, _TWO_DECIMALS, _ROUNDING)
    limits = np.exp(aligned.log_limit_p), np.exp(aligned.log_limit_q)
    for row in np.flatnonzero(entries.is_far.any(axis=1)):
        logp, logq, excess = entries.logp[row], entries.logq[row], np.abs(entries.excess[row])
        far = np.argsort(-excess, kind="stable")[:_MOST_WRONG]
        far = far[entries.is_far[row, far]]
        balance = _Balance(
            logp,
            logq,
            (float(aligned.log_cap_p[row]), float(aligned.log_cap_q[row])),
            (float(limits[0][row]), float(limits[1][row])),
            (float(aligned.open_p[row]), float(aligned.open_q[row])),
            float(entries.spread[row]),
            float(rounding[row]),
        )
        certain = any(
            balance.is_only_without(far[:n], entries.ease[row, far[n - 1]]) and balance.is_off_the_line(far[:n])
            for n in range(1, len(far) + 1)
        )
        yield Outlier(int(row), certain, None, float(logp[far[0]]), float(logq[far[0]]), float(entries.spread[row]))


def _has_two_decimals(logs):
    steps = 100.0 * np.where(np.isfinite(logs), logs, 0.0)
    return np.abs(steps - np.rint(steps)).max(axis=1) < _SMALLEST


class _Balance(NamedTuple):
    """The masses of one position, its entries as in `_Entries`.

    Of both sides: ``log_caps``, the ``limits`` of the mass of a token that they do not name, and the mass ``opened`` of
    their open entries. ``rounding`` is what a listed mass is exact to.

    With the shared masses P_I and Q_I, 1 - P_I and 1 - Q_I are outside. Tokens outside differ like the shared ones, so
    that log (1 - P_I)/(1 - Q_I) is near the median of their log p/q.
    """

    logp: np.ndarray
    logq: np.ndarray
    log_caps: tuple[float, float]
    limits: tuple[float, float]
    opened: tuple[float, float]
    spread: float
    rounding: float

    def is_only_without(self, far, ease):
        """Whether the outside balances if the tokens ``far`` may have any value, and not if theirs are right.

        What the far ones lost may have gone to tokens that one side alone lists, above all that the other could give
        them, or to open entries: whatever part of these balances the outside, the values may be right.
        """
        shared = ~np.isnan(self.logp) & ~np.isnan(self.logq)
        shared[far] = False
        n = int(np.count_nonzero(shared))
        if n < _MIN_OTHERS:
            return False
        logp, logq = self.logp[shared], self.logq[shared]
        centre = float(np.median(logp - logq))
        out_p, out_q = 1.0 - float(np.exp(logp).sum()), 1.0 - float(np.exp(logq).sum())
        (low_p, high_p), (low_q, high_q) = self._masses(self.logp[far], 0), self._masses(self.logq[far], 1)
        noise = math.hypot(_CONSTANT_NOISE, _SPREAD_NOISE * self.spread) * math.sqrt(1.0 + 4.0 / n)
        rounding = self.rounding / max(min(out_p, out_q), self.rounding)
        without = abs(_log(out_p) - _log(out_q) - centre) / math.hypot(noise, rounding)
        only_p = self.opened[0] + self._gained(self.logp, self.logq, self.log_caps[1] + centre, far)
        only_q = self.opened[1] + self._gained(self.logq, self.logp, self.log_caps[0] - centre, far)
        lowest = _log(out_p - high_p - only_p) - _log(out_q - low_q) - centre
        highest = _log(out_p - low_p) - _log(out_q - high_q - only_q) - centre
        with_them = max(lowest, -highest, 0.0) / noise
        moved = abs(out_p - low_p - (out_q - low_q) * math.exp(centre))
        unbalanced = max(ease * _UNBALANCED, without + ease * _BALANCED)
        return moved > self.rounding and without <= _BALANCED and with_them >= unbalanced

    def is_off_the_line(self, far):
        """Whether each of ``far`` is off the line of log p/q over log p q, too, that another temperature makes."""
        shared = ~np.isnan(self.logp) & ~np.isnan(self.logq)
        known = far[shared[far]]
        shared[far] = False
        ratio, level = self.logp - self.logq, (self.logp + self.logq) / 2
        slope = _slope(level[shared], ratio[shared])
        centre = float(np.median(ratio[shared] - slope * level[shared]))
        return bool((np.abs(ratio[known] - slope * level[known] - centre) >= _LEAST_EXCESS).all())

    @staticmethod
    def _gained(logs, others, most, far):
        """Mass of the tokens, those of ``far`` aside, that one side alone lists, well above what the other has."""
        gained = np.isnan(others) & (logs >= most + _LEAST_GAIN)
        gained[far] = False
        return float(np.exp(logs[gained]).sum())

    def _masses(self, logs, side):
        """What the tokens have by their values, those that are not listed at 0 and at the cap."""
        unlisted = np.isnan(logs)
        listed = float(np.exp(logs[~unlisted]).sum())
        return listed, listed + self.limits[side] * int(np.count_nonzero(unlisted))


def _slope(x, y):
    """The median of the slopes of all pairs of points (Theil and Sen); 0 where no two differ in x."""
    i, j = np.triu_indices(len(x), 1)
    run = x[i] - x[j]
    apart = np.abs(run) > _SMALLEST
    return float(np.median((y[i] - y[j])[apart] / run[apart])) if apart.any() else 0.0


def _log(mass):
    return math.log(max(mass, _SMALLEST))


def _below_the_best(aligned, entries, side):
    """Last entries below a gap that the other side does not have, in a list that leaves much over."""
    mine, other = _Lists.of(aligned, "P" if side == "P" else "Q"), _Lists.of(aligned, "Q" if side == "P" else "P")
    for n_wrong in range(_MOST_WRONG, 0, -1):
        gap, crowd = mine.gap(n_wrong), mine.crowd(n_wrong)
        found = (
            (mine.rest > _FLOAT_NOISE)
            & (gap >= _EASE * _LEAST_GAP)
            & (crowd >= _CROWD)
            & (crowd - other.crowd(1) >= gap / 2)
        )
        ordinary = mine.ordinary_gap(n_wrong)
        for row in np.flatnonzero(found):
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
    shape (T,).
    """

    logs: np.ndarray
    entry: np.ndarray
    n: np.ndarray
    rest: np.ndarray

    @classmethod
    def of(cls, aligned, side):
        if side == "P":
            logs, unclear, coverage = aligned.logp, aligned.log_open_p, aligned.coverage_p
            entry = np.zeros(logs.shape, dtype=np.int64) + np.arange(logs.shape[1], dtype=np.int64)
        else:
            logs, unclear, coverage = aligned.logq, aligned.log_open_q, aligned.coverage_q
            own = aligned.logp.shape[1] + np.arange(logs.shape[1], dtype=np.int64)
            entry = np.where(aligned.index_p >= 0, aligned.index_p, own)
        logs = np.concatenate([logs, unclear], axis=1)
        entry = np.concatenate([entry, np.full(unclear.shape, -1, dtype=np.int64)], axis=1)
        falling = np.argsort(-logs, axis=1, kind="stable")
        n = np.count_nonzero(np.isfinite(logs), axis=1)
        logs, entry = np.take_along_axis(logs, falling, axis=1), np.take_along_axis(entry, falling, axis=1)
        return cls(logs, entry, n, 1.0 - coverage)

    def _at(self, column):
        found = self.logs[np.arange(len(self.n)), np.maximum(column, 0)]
        return np.where(np.isfinite(found), found, 0.0)  # a list may name no token at all

    def gap(self, n_wrong):
        """Distance of the last ``n_wrong`` entries to the others, nats, shape (T,); 0 where these are too few."""
        enough = self.n - n_wrong > _MIN_OTHERS
        return np.where(enough, self._at(self.n - n_wrong - 1) - self._at(self.n - n_wrong), 0.0)

    def ordinary_gap(self, n_wrong):
        """From where on a gap is out of the ordinary by the distances of the others, shape (T,)."""
        n = np.maximum(self.n - n_wrong, 1)
        step = (self._at(n // 2 - 1) - self._at(n - 1)) / np.maximum(n - n // 2, 1)
        return np.maximum(_GAP_STEPS * step, _GAP_PER_ENTRY / n)

    def crowd(self, n_wrong):
        """Logarithm of how many tokens, as large as the first of the last ``n_wrong``, the mass left over is."""
        return np.log(np.maximum(self.rest, _SMALLEST)) - self._at(self.n - n_wrong)
