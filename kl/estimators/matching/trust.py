"""`kl.estimators.list_checks` for the lists of many responses: at once where nothing is wrong, else list by list."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kl.columns import NO_ID, BoolArray, FloatArray, IntArray, TopLists
from kl.estimators.list_checks import (
    CERTAIN,
    ENOUGH,
    EXTREME,
    FLOAT_NOISE,
    FLOOR_BELOW,
    MOST_TOKENS,
    SUM_NOISE,
    TELLING,
    Trusted,
    is_common,
    masses,
    trusted,
    unusable,
    without_contradicted,
)
from kl.estimators.matching.places import repeats
from kl.estimators.rows import n_responses
from kl.estimators.token_keys import listed
from kl.records import LARGEST_MASS, UNKNOWN_LOGPROB


@dataclass(frozen=True, slots=True)
class TrustedLists:
    """The parts of N lists that can be relied on, as `Trusted` has them for one; arrays of shape (N,).

    ``floor`` and ``largest_hidden`` are NaN where there is none. ``n_entries`` counts the source's entries,
    ``n_listed`` those with a value, ``n_dropped`` the others. ``is_truncated``: the list is of a law that was cut and
    renormalised.
    """

    lists: TopLists
    mass: FloatArray
    n_clipped: IntArray
    floor: FloatArray
    largest_hidden: FloatArray
    is_degenerate: BoolArray
    n_entries: IntArray
    n_listed: IntArray
    n_dropped: IntArray
    is_truncated: BoolArray

    @classmethod
    def of(cls, lists: TopLists, n_dropped: IntArray, response: IntArray) -> TrustedLists:
        """The lists of one side, each in the light of the others of its response.

        Parameters
        ----------
        n_dropped : int64, shape (N,)
            Entries that were taken out before.
        response : int64, shape (N,)
            The number of the response of each list; never falls.
        """
        usable = listed_columns(lists)
        dropped = n_dropped + lists.lengths - usable.lengths
        n_entries = lists.lengths + n_dropped
        floors = _common_floors(usable, response)
        mass = masses(usable)
        nothing = np.full(len(usable), np.nan)
        found = cls(
            usable,
            mass,
            np.zeros(len(usable), dtype=np.int64),
            nothing,
            nothing,
            usable.lengths == 0,
            n_entries,
            usable.lengths,
            dropped,
            np.zeros(len(usable), dtype=np.bool_),
        )
        single = np.flatnonzero(_suspicious(usable, mass, dropped, floors[response]))
        known: dict[int, Trusted] = {}
        for row, top in zip(single.tolist(), usable.take(single), strict=True):
            floor = float(floors[response[row]])
            marks = frozenset[float]() if math.isnan(floor) else frozenset({floor})
            known[row] = trusted(top, int(dropped[row]), marks)
        found = found.with_rows(known)
        return replace(found, is_truncated=_truncated(found, response))

    def __len__(self) -> int:
        return len(self.mass)

    def row(self, row: int) -> Trusted:
        """One of them."""
        floor, hidden = float(self.floor[row]), float(self.largest_hidden[row])
        return Trusted(
            self.lists[row],
            float(self.mass[row]),
            int(self.n_clipped[row]),
            None if math.isnan(floor) else floor,
            None if math.isnan(hidden) else hidden,
            bool(self.is_degenerate[row]),
        )

    def with_rows(self, rows: Mapping[int, Trusted]) -> TrustedLists:
        """The same with some of them replaced."""
        if not rows:
            return self
        at = np.array([*rows], dtype=np.int64)
        others = [*rows.values()]

        def changed(values: NDArray[Any], new: list[Any]) -> NDArray[Any]:
            copied = values.copy()
            copied[at] = [np.nan if item is None else item for item in new]
            return copied

        return replace(
            self,
            lists=self.lists.replaced(at, TopLists.of([item.candidates for item in others])),
            mass=changed(self.mass, [item.mass for item in others]),
            n_clipped=changed(self.n_clipped, [item.n_clipped for item in others]),
            floor=changed(self.floor, [item.floor for item in others]),
            largest_hidden=changed(self.largest_hidden, [item.largest_hidden for item in others]),
            is_degenerate=changed(self.is_degenerate, [item.is_degenerate for item in others]),
        )

    def take(self, rows: IntArray) -> TrustedLists:
        """Some of them, by number."""
        arrays = {name: getattr(self, name)[rows] for name in self.__slots__ if name != "lists"}
        return TrustedLists(lists=self.lists.take(rows), **arrays)

    def unlimited(self, rows: BoolArray) -> TrustedLists:
        """The same where in some of them one token outside may have all that is left over."""
        left = np.maximum(0.0, 1.0 - self.mass)
        return replace(self, largest_hidden=np.where(rows, left, self.largest_hidden))

    def without_contradicted(self, judged: BoolArray) -> tuple[TrustedLists, BoolArray]:
        """The same without smallest values that the mass contradicts, in the lists that are judged; which changed."""
        changed = np.zeros(len(self), dtype=np.bool_)
        doubtful = judged & (self.lists.lengths > 1) & is_contradicted(self.mass, self.lists.last())
        rows: dict[int, Trusted] = {}
        for row in map(int, np.flatnonzero(doubtful)):
            before = self.row(row)
            after = without_contradicted(before)
            if after is not before:
                rows[row], changed[row] = after, True
        return self.with_rows(rows), changed


def trusted_wanted(wanted: TopLists, best: TrustedLists, response: IntArray) -> TopLists:
    """What a side was asked for beside its k best, by falling value, without marks in place of probabilities.

    Such values lie far below those of the k best: nothing is left over that could contradict one. Left out are unknown
    ones, those at or below a mark of the k best, and any that is a mark itself: as `trusted` has it for a smallest one.
    So is a token that is one of the k best.

    Parameters
    ----------
    wanted : TopLists, of N
    best : TrustedLists, of N
    response : int64, shape (N,)
        The number of the response of each list; never falls.
    """
    logs, rows = wanted.entries.logprobs, wanted.rows
    is_value = (logs > UNKNOWN_LOGPROB) & ~(logs <= best.floor[rows])
    kept = wanted.kept(is_value & ~_is_listed(wanted, best.lists)).falling()
    logs, rows = kept.entries.logprobs, kept.rows
    twice = np.zeros(len(logs), dtype=np.bool_)
    twice[1:] = (rows[1:] == rows[:-1]) & (logs[1:] == logs[:-1])
    twice[:-1] |= twice[1:]
    mark = (logs <= EXTREME) & ((logs == np.trunc(logs)) | twice)
    return kept.kept(~(mark | (logs <= _common_floors(kept, response)[response[rows]])))


def _is_listed(wanted: TopLists, best: TopLists) -> BoolArray:
    """Which entries are one of the k best: by their id, or where they have none by text and value; shape (E,)."""
    rows, found = wanted.rows, np.zeros(len(wanted.entries), dtype=np.bool_)
    ids, logs, codes = wanted.entries.ids, wanted.entries.logprobs, wanted.entries.codes()
    best_ids: IntArray = best.padded(best.entries.ids, NO_ID)
    best_codes: IntArray = best.padded(best.entries.codes(), -1)
    best_logs: FloatArray = best.padded(best.entries.logprobs, -np.inf)
    for column in range(best_ids.shape[1]):
        same = (best_codes[rows, column] == codes) & (best_logs[rows, column] == logs)
        found |= ((ids == NO_ID) & same) | ((ids != NO_ID) & (best_ids[rows, column] == ids))
    return found


def is_contradicted(mass: FloatArray, least: FloatArray) -> BoolArray:
    """Whether more is left over than any vocabulary of tokens as large as the least has, rounding left aside."""
    return 1.0 - mass - FLOAT_NOISE + SUM_NOISE > MOST_TOKENS * np.exp(least)


def listed_columns(lists: TopLists) -> TopLists:
    """`kl.estimators.token_keys.listed` of each list."""
    single = unusable(lists)
    if not single.size:
        return lists
    return lists.replaced(single, TopLists.of([listed(top).candidates for top in lists.take(single)]))


def _common_floors(lists: TopLists, response: IntArray) -> FloatArray:
    """`common_floors` of each response, shape (R,); NaN where there is none."""
    n = n_responses(response)
    last = lists.last()
    least = np.zeros(n)
    np.minimum.at(least, response, np.nan_to_num(last, nan=0.0))
    long = np.flatnonzero(lists.lengths > 2)
    ties = long[lists.entries.logprobs[lists.offsets[1:][long] - 3] == last[long]]
    ties = ties[last[ties] == least[response[ties]]]
    n_ties, n_lists = np.bincount(response[ties], minlength=n), np.bincount(response, minlength=n)
    return np.where((least <= FLOOR_BELOW) & is_common(n_ties, n_lists), least, np.nan)


def _suspicious(lists: TopLists, mass: FloatArray, n_dropped: IntArray, floor: FloatArray) -> BoolArray:
    """The lists of which `trusted` may say anything but that all is well."""
    found = np.zeros(len(lists), dtype=np.bool_)
    filled = np.flatnonzero(lists.lengths > 0)
    logs, n = lists.entries.logprobs, lists.lengths[filled]
    first, last = logs[lists.offsets[:-1][filled]], logs[lists.offsets[1:][filled] - 1]
    before = np.where(n > 1, logs[np.maximum(lists.offsets[1:][filled] - 2, 0)], np.nan)
    second = np.where(n > 1, logs[np.minimum(lists.offsets[:-1][filled] + 1, len(logs) - 1)], np.nan)
    clip = (last == floor[filled]) | ((last <= EXTREME) & ((last == np.trunc(last)) | (before == last)))
    one_floor = (n > ENOUGH) & (second == last) & (first > -1e-3)
    alone = (n == 1) & (n_dropped[filled] > 0) & (first > -CERTAIN)
    above = mass[filled] > LARGEST_MASS - SUM_NOISE
    found[filled] = clip | one_floor | alone | above | is_contradicted(mass[filled], last)
    # An entry that is there twice counts once.
    ties = np.unique(lists.rows[1:][(logs[1:] == logs[:-1]) & (lists.rows[1:] == lists.rows[:-1])])
    if ties.size:
        some = lists.take(ties)
        found[ties] |= repeats(some.padded(some.entries.codes().astype(np.int32), -1))
    return found


def _truncated(found: TrustedLists, response: IntArray) -> BoolArray:
    """`kl.estimators.list_checks.truncated` within each response."""
    whole = np.abs(1.0 - found.mass) <= FLOAT_NOISE
    telling = (found.lists.lengths > 1) & (np.exp(found.lists.last()) >= TELLING)
    n_whole, n_telling = (
        np.bincount(response[rows], minlength=n_responses(response)) for rows in (whole & telling, telling)
    )
    return whole & ((n_whole > 0) & (2 * n_whole >= n_telling))[response]
