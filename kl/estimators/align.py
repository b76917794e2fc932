"""Which listed token of P is which listed token of Q.

Two ragged candidate lists per position become padded arrays. An entry without a key, or with one that several tokens
share, is *open*: its probability is known, and that it is no token that its own side names otherwise. It may be one
that the other side names, one that the other side holds open too, or one that the other side does not list.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kl.columns import NO_ID, BoolArray, Entries, FloatArray, IntArray, TopLists
from kl.estimators.list_checks import check_lengths, check_lists, check_wanted, masses, rounding_steps
from kl.estimators.matching.aligned import Aligned, widened
from kl.estimators.matching.codes import NO_KEY, Codes, Sides, key_codes, text_codes
from kl.estimators.matching.evidence import evidence_of
from kl.estimators.matching.padded import Padded
from kl.estimators.matching.places import distinct, inverse, places_in, repeats
from kl.estimators.matching.rows import (
    MatchedRow,
    Sample,
    indices,
    keyed,
    keys_of_several,
    match_row,
    namesakes,
    with_one_stop,
)
from kl.estimators.rows import row_sums
from kl.estimators.token_bytes import Candidates
from kl.estimators.token_keys import Key, KeyFunction, contradicted_ids, id_key
from kl.records import END_TOKENS, UNKNOWN_LOGPROB, Candidate

__all__ = ["Aligned", "BoolArray", "FloatArray", "IntArray", "align", "align_columns", "with_hidden"]

_PADDING = -2  # of Q's keys, so that none is one of P's


def align(
    lists_p: Sequence[Candidates],
    lists_q: Sequence[Candidates],
    sampled_p: Sequence[Candidate | None] | Entries | None = None,
    sampled_q: Sequence[Candidate | None] | Entries | None = None,
    stops: Sequence[bool] | BoolArray | None = None,
    response: IntArray | None = None,
    wanted_q: Sequence[Candidates] | None = None,
) -> Aligned:
    """Match the lists of P and Q, position by position.

    Parameters
    ----------
    lists_p, lists_q : sequences of T candidate lists
        As `listed` returns them: the k best by falling log-probability, known values only, at least one entry each.
        Columns (`kl.columns.TopLists`) are used as they are.
    sampled_p : sequence of T candidates, optional
        The token that P sampled; it need not be listed.
    sampled_q : sequence of T candidates, optional
        What Q reports beside its list. It is used where it is the token that P sampled, and only there.
    stops : sequence of T bool, optional
        Whether the token that P sampled ends the turn: it is then that of Q which is known to, whatever it is called.
    response : int64, shape (T,), optional
        The number of the response that a position belongs to, from 0 on and never falling; default one. What tokens are
        matched by is decided for each response by its own lists.
    wanted_q : sequence of T candidate lists, optional
        What Q was asked for by name beside its list, known values only, by falling log-probability; none need be there.
        Such a token is matched as a listed one, and bounds none that Q says nothing of.

    Raises
    ------
    CandidateListError
        If a list is empty, holds a value that is not known, does not fall, or has a mass above 1, that of what Q was
        asked for included.
    ValueError
        If there are not T of each.
    """
    check_lengths(lists_p, lists_q, sampled_p, sampled_q)
    columns_p, columns_q = TopLists.of(lists_p), TopLists.of(lists_q)
    check_lists(lists_p, "P")
    check_lists(lists_q, "Q")
    n = len(columns_p)
    wanted = TopLists.empty(n) if wanted_q is None else TopLists.of(wanted_q)
    if wanted_q is not None:
        check_wanted(columns_q, wanted)
    of_response = np.zeros(n, dtype=np.int64) if response is None else response
    is_stop = np.zeros(n, dtype=np.bool_) if stops is None else np.asarray(stops, dtype=np.bool_)
    return align_columns(
        columns_p, columns_q, _entries(sampled_p, n), _entries(sampled_q, n), is_stop, of_response, wanted
    )


def align_columns(
    lists_p: TopLists,
    lists_q: TopLists,
    sampled_p: Entries,
    sampled_q: Entries,
    is_stop: BoolArray,
    response: IntArray,
    wanted_q: TopLists,
) -> Aligned:
    """`align` of lists that are known to be as it wants them."""
    all_q = lists_q.followed_by(wanted_q) if len(wanted_q.entries) else lists_q
    sides = Sides(lists_p, all_q, sampled_p, sampled_q, response)
    return _Matching(sides, is_stop, lists_q, wanted_q).aligned()


def _entries(sampled: Sequence[Candidate | None] | Entries | None, n: int) -> Entries:
    if isinstance(sampled, Entries):
        return sampled
    return Entries.of([None] * n if sampled is None else sampled)


def with_hidden(aligned: Aligned, hidden_p: FloatArray, hidden_q: FloatArray) -> Aligned:
    """The same with what one token outside each list may have, where its smallest value is no limit.

    Parameters
    ----------
    hidden_p, hidden_q : float64, shape (T,)
        Probabilities; NaN or 0 where the smallest value is one.
    """
    caps_p, caps_q = (
        np.log(hidden, out=np.full(len(hidden), -np.inf), where=hidden > 0) for hidden in (hidden_p, hidden_q)
    )
    return replace(
        aligned,
        log_cap_p=np.maximum(aligned.log_cap_p, caps_p),
        log_cap_q=np.maximum(aligned.log_cap_q, caps_q),
    )


class _Matching:
    """All positions at once; those that a rule for single cases may concern are matched by `match_row` instead."""

    def __init__(self, sides: Sides, is_stop: BoolArray, best_q: TopLists, wanted_q: TopLists) -> None:
        self._sides = sides
        self._is_stop = is_stop
        self._best_q, self._wanted_q = best_q, wanted_q
        self._codes = key_codes(sides)
        self._ids = _Ids(sides)
        ids = [self._ids.numbers(part.ids) for part in sides.parts()]
        self._evidence = evidence_of(sides, self._codes, ids[0], ids[1])
        by_id = np.array([choice.key == "id" for choice in self._evidence.choices], dtype=np.bool_)
        self._by_id = by_id[sides.response]
        self._all_by_id = bool(self._by_id.all())
        found = (self._codes.p, self._codes.q, self._codes.sampled_p, self._codes.sampled_q)
        every = np.arange(len(is_stop), dtype=np.int64)
        rows = (sides.lists_p.rows, sides.lists_q.rows, every, every)
        self._keys_p, self._keys_q, wanted, self._own = (
            numbers if self._all_by_id else np.where(self._by_id[row], numbers, codes)
            for numbers, codes, row in zip(ids, found, rows, strict=True)
        )
        self._wanted = self._by_text(wanted)

    def _by_text(self, wanted: Codes) -> Codes:
        """The sampled tokens' keys; one without id or bytes of its own has that of the one listed token of its text."""
        sampled, lists = self._sides.sampled_p, self._sides.lists_p
        rows = np.flatnonzero((wanted < 0) & self._codes.is_whole)
        if not rows.size:
            return wanted
        some = lists.take(rows)
        same = some.padded(some.entries.codes(), NO_KEY) == sampled.codes()[rows, None]
        keys = lists.padded(self._keys_p, NO_KEY)[rows]
        found = wanted.copy()
        found[rows] = np.where(
            same.sum(axis=1) == 1, np.take_along_axis(keys, same.argmax(axis=1)[:, None], axis=1)[:, 0], NO_KEY
        )
        return found

    def aligned(self) -> Aligned:
        """What the rows have in common, and the special ones by all the rules."""
        n_best = self._best_q.lengths
        p, q = Padded.of(self._sides.lists_p, self._keys_p), Padded.of(self._sides.lists_q, self._keys_q, n_best)
        repeated, index_q = self._repeats_and_places(p, q)
        ambiguous = self._ambiguous(repeated, self._namesakes(p))
        special = repeated | self._special(p, q, ambiguous)
        rows = self._by_all_rules(np.flatnonzero(special), ambiguous)
        logp_sampled, logq_sampled, clear = self._sampled(p, q)
        arrays: dict[str, Any] = {
            "logp": p.logs,
            "logq": q.logs,
            "index_q": index_q,
            "log_open_p": p.open_logs,
            "log_open_q": q.open_logs,
            "open_p": row_sums(np.exp(p.open_logs)),
            "open_q": row_sums(np.exp(q.open_logs)) + q.open_wanted,
            "n_listed_p": self._sides.lists_p.lengths,
            "n_listed_q": self._sides.lists_q.lengths,
            "n_wanted_q": q.n_wanted,
            "wanted_mass_q": masses(self._wanted_q),
            "top_open": p.top_open | q.top_open,
            "n_duplicate_keys": np.zeros(len(special), dtype=np.int64),
            "logp_sampled": logp_sampled,
            "logq_sampled": logq_sampled,
            "sampled_clear": clear,
        }
        _put(arrays, rows)
        return Aligned(
            **arrays,
            index_p=inverse(arrays["index_q"], arrays["logq"].shape[1]),
            log_cap_p=self._sides.lists_p.last(),
            log_cap_q=np.fmax(self._best_q.last(), self._wanted_q.first()),  # of two askings, the lists may disagree
            coverage_p=row_sums(np.exp(arrays["logp"])) + arrays["open_p"],
            coverage_q=row_sums(np.exp(arrays["logq"])) + arrays["open_q"],
            step_p=rounding_steps(self._sides.lists_p, self._sides.response)[self._sides.response],
            step_q=np.maximum(
                rounding_steps(self._best_q, self._sides.response), rounding_steps(self._wanted_q, self._sides.response)
            )[self._sides.response],
            response=self._sides.response,
            choices=self._evidence.choices,
            keys_p=self._all_keys(p, special) | {key for row in rows.values() for key in row.p.keys},
            keys_q=self._all_keys(q, special)
            | {key for row in rows.values() for key in row.q.keys[: len(row.q.keys) - row.q.n_wanted]},
        )

    def _repeats_and_places(self, p: Padded, q: Padded) -> tuple[BoolArray, IntArray]:
        """Where a list has a key twice, shape (T,), and where P's tokens stand in Q's rows, shape (T, K_p)."""
        seen = self._evidence
        if self._all_by_id and seen.twice is not None and seen.places is not None:
            return seen.twice, seen.places
        places = places_in(p.keys, np.where(q.keys < 0, _PADDING, q.keys))
        return repeats(p.all_keys) | repeats(q.all_keys), places

    def _sampled(self, p: Padded, q: Padded) -> tuple[FloatArray, FloatArray, BoolArray]:
        """Of the token that P sampled: its value under P and Q, and whether it has a key."""
        logp = p.value_of(self._wanted, _known(self._sides.sampled_p))
        same = (self._own == self._wanted) & (self._own >= 0)
        own_q = np.where(same, _known(self._sides.sampled_q), np.nan)
        return logp, q.value_of(self._wanted, own_q), self._wanted >= 0

    def _namesakes(self, p: Padded) -> BoolArray:
        """Where `namesakes` may find a key: the sampled token and a listed one have one by text, and two ids."""
        lists, sampled = self._sides.lists_p, self._sides.sampled_p
        found = np.zeros(len(lists), dtype=np.bool_)
        rows = np.flatnonzero(~self._by_id & (self._wanted >= 0) & (sampled.ids != NO_ID))
        if rows.size:
            some = lists.take(rows)
            ids = some.padded(some.entries.ids, NO_ID)
            others = (ids != NO_ID) & (ids != sampled.ids[rows, None])
            same = p.all_keys[rows, : ids.shape[1]] == self._wanted[rows, None]
            found[rows] = (others & same).any(axis=1)
        return found

    def _ambiguous(self, repeated: BoolArray, shared: BoolArray) -> dict[int, frozenset[Key | None]]:
        """By response, the keys that stand for several tokens of one list, or for a listed and the sampled one."""
        found: dict[int, set[Key | None]] = {}
        rows = np.flatnonzero(repeated | shared)
        for row, top_p, top_q in self._lists_at(rows):
            key_p, key_q = self._key_functions(row)
            side_p = keyed(top_p, key_p)
            several = keys_of_several(side_p) | keys_of_several(keyed(top_q, key_q))
            if shared[row]:
                (sampled,) = self._sides.sampled_p.part(row, row + 1).candidates()
                several |= namesakes(side_p, Sample(sampled, key_p))
            found.setdefault(int(self._sides.response[row]), set()).update(several)
        return {response: frozenset(keys) for response, keys in found.items() if keys}

    def _special(self, p: Padded, q: Padded, ambiguous: dict[int, frozenset[Key | None]]) -> BoolArray:
        """The rows that one of the rules for single cases may concern, those with a repeated key aside."""
        special = self._evidence.doubtful & self._by_id
        special |= p.open_ties | q.open_ties | (self._is_stop & ~self._by_id)
        if not self._all_by_id:
            ends = text_codes(sorted(END_TOKENS))
            ends_p, ends_q = (np.isin(side.keys, ends).any(axis=1) for side in (p, q))
            special |= ends_p & ends_q & ~self._by_id
        for response, keys in ambiguous.items():
            rows = self._sides.slice_of(response)
            numbers = self._numbers_of(keys, bool(self._by_id[rows.start]))
            special[rows] |= np.isin(p.keys[rows], numbers).any(axis=1) | np.isin(q.keys[rows], numbers).any(axis=1)
            special[rows] |= np.isin(self._wanted[rows], numbers)
        return special

    def _numbers_of(self, keys: frozenset[Key | None], by_id: bool) -> Codes:
        if by_id:
            return self._ids.numbers(np.array([key for key in keys if isinstance(key, int)], dtype=np.int64))
        return self._codes.numbers.of([key for key in keys if isinstance(key, bytes)])

    def _lists_at(self, rows: IntArray) -> Iterator[tuple[int, tuple[Candidate, ...], tuple[Candidate, ...]]]:
        """Some rows with the objects of their lists, which are made all at once."""
        return zip(rows.tolist(), self._sides.lists_p.take(rows), self._sides.lists_q.take(rows), strict=True)

    def _key_functions(self, row: int) -> tuple[KeyFunction, KeyFunction]:
        readers = self._codes.readers[int(self._sides.response[row])]
        return (id_key, id_key) if self._by_id[row] else readers

    def _by_all_rules(self, rows: IntArray, ambiguous: dict[int, frozenset[Key | None]]) -> dict[int, MatchedRow]:
        sampled = zip(
            self._sides.sampled_p.take(rows).candidates(), self._sides.sampled_q.take(rows).candidates(), strict=True
        )
        found: dict[int, MatchedRow] = {}
        for (row, top_p, top_q), (sample_p, sample_q) in zip(self._lists_at(rows), sampled, strict=True):
            response = int(self._sides.response[row])
            choice = self._evidence.choices[response]
            key_p, key_q = self._key_functions(row)
            side_p = keyed(top_p, key_p)
            side_q = keyed(top_q, key_q, int(self._best_q.lengths[row]))
            unclear = ambiguous.get(response, frozenset[Key | None]())
            if choice.key == "id":
                unclear |= contradicted_ids(side_p.candidates, side_q.candidates, *self._codes.readers[response])
            samples = Sample(sample_p, key_p), Sample(sample_q, key_q)
            if self._is_stop[row] and choice.key != "id":
                side_p, side_q, samples = with_one_stop(side_p, side_q, samples)
            found[row] = match_row(side_p, side_q, *samples, unclear, by_role=choice.key == "text")
        return found

    def _all_keys(self, side: Padded, special: BoolArray) -> frozenset[Key]:
        """What the lists name in the rows that no rule for single cases concerns."""
        keys = side.best_keys()
        ordinary = (self._by_id & ~special, ~self._by_id & ~special)
        by_id, by_bytes = (distinct(keys if rows.all() else keys[rows]) for rows in ordinary)
        return frozenset[Key](chain(self._ids.of(by_id).tolist(), self._codes.numbers.bytes_of(by_bytes)))


class _Ids:
    """Token ids as int32: themselves where they have the room, else numbers by size."""

    def __init__(self, sides: Sides) -> None:
        parts = [part.ids for part in sides.parts()]
        fits = max((int(ids.max(initial=0)) for ids in parts), default=0) < np.iinfo(np.int32).max
        self._known = None if fits else np.unique(np.concatenate(parts))

    def numbers(self, ids: IntArray) -> Codes:
        if self._known is None:
            return ids.astype(np.int32)
        return np.where(ids < 0, NO_KEY, np.searchsorted(self._known, ids)).astype(np.int32)

    def of(self, numbers: IntArray) -> IntArray:
        return numbers if self._known is None else self._known[numbers]


def _known(sampled: Entries) -> FloatArray:
    return np.where(sampled.logprobs > UNKNOWN_LOGPROB, sampled.logprobs, np.nan)


def _put(arrays: dict[str, Any], rows: dict[int, MatchedRow]) -> None:
    """Set the rows that were matched one by one."""
    if not rows:
        return
    tables = {
        "logp": (-np.inf, {row: item.p.logs for row, item in rows.items()}),
        "logq": (-np.inf, {row: item.q.logs for row, item in rows.items()}),
        "index_q": (-1, {row: indices(item.p.keys, item.q.keys) for row, item in rows.items()}),
        "log_open_p": (-np.inf, {row: item.p.open_logs for row, item in rows.items()}),
        "log_open_q": (-np.inf, {row: item.q.open_logs for row, item in rows.items()}),
    }
    for name, (fill, values) in tables.items():
        arrays[name] = _with_rows(arrays[name], values, fill)
    width = arrays["logp"].shape[1]
    arrays["index_q"] = _with_rows(arrays["index_q"], {}, -1, width)
    at = np.array([*rows], dtype=np.int64)
    found = [*rows.values()]
    columns = {
        "open_p": [item.p.open_mass for item in found],
        "open_q": [item.q.open_mass for item in found],
        "n_listed_p": [item.p.n_listed for item in found],
        "n_listed_q": [item.q.n_listed for item in found],
        "n_wanted_q": [item.q.n_wanted for item in found],
        "wanted_mass_q": [item.q.wanted_mass for item in found],
        "top_open": [item.p.top_open or item.q.top_open for item in found],
        "n_duplicate_keys": [item.p.n_repeats + item.q.n_repeats for item in found],
        "logp_sampled": [item.sampled[0] for item in found],
        "logq_sampled": [item.sampled[1] for item in found],
        "sampled_clear": [item.sampled[2] for item in found],
    }
    for name, values in columns.items():
        arrays[name] = arrays[name].copy()
        arrays[name][at] = values


def _with_rows(table: NDArray[Any], rows: dict[int, list[Any]], fill: float, width: int = 0) -> NDArray[Any]:
    """The table with some rows set, wider where that takes it."""
    wide = widened(table, max(table.shape[1], width, *(len(values) for values in rows.values()), 1), fill)
    for row, values in rows.items():
        wide[row] = fill
        wide[row, : len(values)] = values
    return wide
