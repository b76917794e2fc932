"""Reads many lists of positions at once as columns, where what they hold is beyond doubt or repaired by one rule.

What is right, and how it is repaired, is said in `kl.input.logprobs`, which reads whatever is refused here: a list of
positions with any defect, or in another form than the documented one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, pairwise, repeat
from typing import Any, NamedTuple, cast

import msgspec
import numpy as np
import polars as pl
from msgspec import UNSET, UnsetType
from numpy.typing import NDArray

from kl.columns import NO_ID, BoolArray, Entries, FloatArray, IntArray, Positions, TopLists
from kl.input.logprobs import (
    SAMPLED_TOLERANCE,
    UNSORTED,
    added,
    is_same_token,
    masked,
    null_entry,
    unknown_sampled,
    usual_length,
)
from kl.input.problems import KEPT_PER_KIND, Repair, number
from kl.pieces import ESCAPES, NAMED_BY_ID, REPLACEMENT
from kl.records import LARGEST_MASS, UNKNOWN_LOGPROB, Candidate

_AT_ONCE = 1 << 22  # bytes of JSON whose objects are in memory at one time
_MASS_NOISE = 1e-9  # of a sum in another order
_BAD_ID = -2
_ID_END = 2**63


class _Entry(msgspec.Struct, gc=False, forbid_unknown_fields=True):
    token: str
    logprob: float | None
    token_id: int | UnsetType | None = UNSET
    bytes: list[int] | UnsetType | None = UNSET


class _Row(msgspec.Struct, gc=False, forbid_unknown_fields=True):
    token: str
    logprob: int | float | None
    token_id: int | UnsetType | None = UNSET
    bytes: list[int] | UnsetType | None = UNSET
    top_logprobs: list[_Entry] | UnsetType | None = UNSET


class _BareEntry(msgspec.Struct, gc=False, forbid_unknown_fields=True):
    token: str
    logprob: float | None
    token_id: int


class _BareRow(msgspec.Struct, gc=False, forbid_unknown_fields=True):
    token: str
    logprob: int | float | None
    token_id: int
    top_logprobs: list[_BareEntry] | UnsetType | None = UNSET


_ROWS = msgspec.json.Decoder(list[_Row])
_BARE_ROWS = msgspec.json.Decoder(list[_BareRow])  # the most common objects, in half the time


class Columns(NamedTuple):
    """A list of positions that can be used, and the repairs that made it so.

    ``sampled`` are the texts and bytes of the sampled tokens, without their numbers.
    ``repairs`` are the first ones of each kind, in order; ``counts`` is how many there are of each kind.
    """

    sampled: list[Candidate]
    positions: Positions
    repairs: list[Repair]
    counts: Counter[str]


class _Fields(NamedTuple):
    """What objects hold, each as a list; ``stated`` are bytes, None where no object states any."""

    texts: list[str]
    values: Sequence[float | None]
    ids: list[int | UnsetType | None]
    stated: list[list[int] | UnsetType | None] | None

    @classmethod
    def of(cls, items: Sequence[_Row] | Sequence[_Entry]) -> _Fields:
        stated = [item.bytes for item in items]
        return cls(
            [item.token for item in items],
            [item.logprob for item in items],
            [item.token_id for item in items],
            None if stated.count(UNSET) == len(stated) else stated,
        )

    @classmethod
    def of_bare(cls, items: Sequence[_BareRow] | Sequence[_BareEntry]) -> _Fields:
        ids: list[int | UnsetType | None] = [item.token_id for item in items]
        return cls([item.token for item in items], [item.logprob for item in items], ids, None)

    @classmethod
    def joined(cls, parts: Sequence[_Fields]) -> _Fields:
        texts, values, ids = (list(chain.from_iterable(column)) for column in list(zip(*parts, strict=True))[:3])
        if all(part.stated is None for part in parts):
            return cls(texts, values, ids, None)
        lists = ([UNSET] * len(part.texts) if part.stated is None else part.stated for part in parts)
        return cls(texts, values, ids, list(chain.from_iterable(lists)))

    def n_keys(self) -> int:
        """How many keys the objects have, if none of them is repeated: of two the last one would stand."""
        n, unset = 2 * len(self.texts), UNSET
        for column in (self.ids, self.stated or ()):
            n += len(column) - len([0 for value in column if value is unset])
        return n


class _Content(NamedTuple):
    """The objects of one list of positions, and how long their lists are."""

    said: _Fields
    listed: _Fields
    lengths: list[int]


class _Tokens(NamedTuple):
    """Columns of tokens; ``bad`` are those whose id or bytes are none."""

    texts: list[str]
    entries: Entries
    whole: BoolArray
    bad: BoolArray
    odd: BoolArray | None  # whose bytes are not those of their texts; None where no bytes are stated


def read_contents(
    contents: Sequence[memoryview], plainly: Callable[[memoryview], object]
) -> Iterator[Columns | object]:
    """Each JSON list of positions as columns, or ``plainly`` as values where it needs a closer look."""
    for group in _groups(contents):
        parsed = [_parse(raw) for raw in group]
        read = iter(_columns([content for content in parsed if content is not None]))
        for raw, content in zip(group, parsed, strict=True):
            columns = None if content is None else next(read)
            yield plainly(raw) if columns is None else columns


def _groups(contents: Sequence[memoryview]) -> Iterator[list[memoryview]]:
    group: list[memoryview] = []
    size = 0
    for raw in contents:
        group.append(raw)
        size += len(raw)
        if size >= _AT_ONCE:
            yield group
            group, size = [], 0
    if group:
        yield group


def _parse(raw: memoryview) -> _Content | None:
    """The objects of a list in the documented form without repeated keys."""
    try:
        return _flat(raw, _BARE_ROWS.decode(raw), _Fields.of_bare)
    except msgspec.ValidationError:
        pass
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    try:
        return _flat(raw, _ROWS.decode(raw), _Fields.of)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None


def _flat(raw: memoryview, rows: list[Any], fields: Callable[[Sequence[Any]], _Fields]) -> _Content | None:
    tops = [row.top_logprobs or () for row in rows]
    said, listed = fields(rows), fields(list(chain.from_iterable(tops)))
    n_keys = said.n_keys() + listed.n_keys() + sum([row.top_logprobs is not UNSET for row in rows])
    tokens = "".join(listed.texts) + "".join(said.texts)
    if not rows or NAMED_BY_ID in tokens or n_keys != _n_keys(raw, tokens):
        return None
    return _Content(said, listed, [len(top) for top in tops])


def _n_keys(raw: memoryview, tokens: str) -> int | None:
    """How many keys stand in JSON where only ``tokens`` may have colons; None where these may be written otherwise."""
    codes = np.frombuffer(raw, dtype=np.uint8)
    within = tokens.count(":")
    return None if within and _escapes_colon(codes) else int(np.count_nonzero(codes == ord(":"))) - within


def _escapes_colon(codes: NDArray[np.uint8]) -> bool:
    r"""Whether there may be a colon that is written ``\u003a``."""
    at = np.flatnonzero(codes[: -len("\\u003a")] == ord("\\"))
    return bool(((codes[at + 1] == ord("u")) & (codes[at + 4] == ord("3")) & ((codes[at + 5] | 32) == ord("a"))).any())


def _columns(contents: Sequence[_Content]) -> list[Columns | None]:
    """Columns of many lists of positions; None for one that needs a closer look."""
    if not contents:
        return []
    batch = _Batch(contents)
    batch.take_out_unknown()
    batch.check_lists()
    was_sorted = batch.sort()
    batch.agree()
    batch.drop_last(~was_sorted & (batch.tops.lengths > 1) & batch.ends_sampled(), _REORDERED)
    batch.drop_last(batch.is_appended(), _COMPARED)
    return batch.columns()


# The order in which the repairs of one position are noted; the last one comes after those of all positions.
_SAMPLED, _NULL, _MASKED, _SORTED, _REORDERED, _COMPARED = range(6)


class _Batch:
    """Lists of positions on their way through the rules of `kl.input.logprobs`, which has the reasons.

    There are N positions in R contents. ``unfit`` are those of the R of which something is for a closer look.
    """

    def __init__(self, contents: Sequence[_Content]) -> None:
        said = _Fields.joined([content.said for content in contents])
        self.values = said.values
        self.starts = np.cumsum([0, *(len(content.lengths) for content in contents)])
        self.content = np.repeat(np.arange(len(contents)), np.diff(self.starts))
        self.unfit = np.zeros(len(contents), dtype=np.bool_)
        self.noted: list[tuple[tuple[bool, int, int, int], int, Repair]] = []
        self.counts: list[tuple[str, IntArray]] = []
        self.said = _tokens(said)
        self.listed = _tokens(_Fields.joined([content.listed for content in contents]))
        self.sampled = self.said.entries
        lengths = chain.from_iterable(content.lengths for content in contents)
        self.tops = TopLists(self.listed.entries, np.cumsum([0, *lengths]))
        self.rows = self.tops.rows
        self.kept = np.arange(len(self.rows))
        self.same = np.zeros(len(self.rows), dtype=np.bool_)
        self.n_dropped = np.zeros(len(self.tops), dtype=np.int64)
        self.hides = self._contents(~self.said.whole | self._lists(~self.listed.whole))
        self._refuse(self.said.bad | self._lists(self.listed.bad))

    def take_out_unknown(self) -> None:
        """Log-probabilities that are not known, of the sampled tokens and at the end of lists."""
        own, values, rows = self.sampled.logprobs, self.tops.entries.logprobs, self.rows
        self._refuse((own > 0) | np.isinf(own))
        unknown = np.flatnonzero(~(own > UNKNOWN_LOGPROB))
        self._note(_SAMPLED, "unknown-logprob", unknown, lambda i: unknown_sampled(self.values[int(unknown[i])]))
        if len(unknown):
            self.sampled = self.sampled.with_logprobs(np.where(own > UNKNOWN_LOGPROB, own, np.nan))

        left_out = ~(values > UNKNOWN_LOGPROB)
        if left_out.any():
            null = np.isnan(values)
            at = np.arange(len(values))
            last = np.full(len(self.tops), -1)
            last[rows[~null]] = at[~null]
            tail = np.flatnonzero(null & (at > last[rows]))
            self._refuse(self._lists(null & (at < last[rows])))
            ranks = at - self.tops.offsets[rows]
            self._note(_NULL, "null-logprob", rows[tail], lambda i: null_entry(int(ranks[tail[i]])))
            marks = np.flatnonzero(values <= UNKNOWN_LOGPROB)
            texts = self.listed.texts
            self._note(
                _MASKED,
                "masked-candidate",
                rows[marks],
                lambda i: masked(texts[int(marks[i])], float(values[marks[i]])),
            )
            self.n_dropped = np.bincount(rows[left_out], minlength=len(self.tops))
            self._keep(~left_out)

    def check_lists(self) -> None:
        """No position without a list but the last one, no token twice in a list, nothing too probable."""
        values, rows, n = self.tops.entries.logprobs, self.rows, len(self.tops)
        is_last = np.zeros(n, dtype=np.bool_)
        is_last[self.starts[1:] - 1] = True
        mass = np.bincount(rows, weights=np.exp(np.minimum(values, 1)), minlength=n)
        self._refuse(((self.tops.lengths == 0) & ~is_last) | (mass > LARGEST_MASS - _MASS_NOISE))
        self._refuse(self._lists(values > 0))
        self._refuse(self._repeats_id())

    def sort(self) -> BoolArray:
        """Lists that do not fall; which of the N did."""
        values, rows = self.tops.entries.logprobs, self.rows
        rises = (values[1:] > values[:-1]) & (rows[1:] == rows[:-1])
        was_sorted = np.ones(len(self.tops), dtype=np.bool_)
        was_sorted[rows[1:][rises]] = False
        if not was_sorted.all():
            self._note(_SORTED, "unsorted-list", np.flatnonzero(~was_sorted), lambda _: UNSORTED)
            order = np.lexsort((-values, rows))
            self.tops = TopLists(self.tops.entries.take(order), self.tops.offsets)
            self.kept = self.kept[order]
        return was_sorted

    def agree(self) -> None:
        """Sampled tokens with their lists; their log-probabilities are taken from these where they are not known."""
        own, values, rows, n = self.sampled.logprobs, self.tops.entries.logprobs, self.rows, len(self.tops)
        lacks_id = (self.sampled.ids == NO_ID) | self._lists(self.tops.entries.ids == NO_ID)
        checked = (self.tops.lengths > 0) & ~(self.hides[self.content] & lacks_id)
        same = self.same = self._is_same()
        found = np.bincount(rows[same], minlength=n)
        near = self._lists(same & (np.abs(values - own[rows]) <= SAMPLED_TOLERANCE))
        is_above = own > self.tops.last() + SAMPLED_TOLERANCE
        self._refuse(checked & ~np.isnan(own) & np.where(found > 0, ~near, is_above))
        taken = np.flatnonzero(same & (checked & np.isnan(own) & (found == 1))[rows])
        if len(taken):
            own = own.copy()
            own[rows[taken]] = values[taken]
            self.sampled = self.sampled.with_logprobs(own)

    def ends_sampled(self) -> BoolArray:
        """Which of the N lists end with the sampled token, shape (N,)."""
        filled = self.tops.lengths > 0
        ends = np.zeros(len(self.tops), dtype=np.bool_)
        ends[filled] = self.same[self.tops.offsets[1:][filled] - 1]
        return ends

    def is_appended(self) -> BoolArray:
        """Which of the N lists are one longer than is usual in their content, for the sampled token at their end."""
        lengths, offsets = self.tops.lengths, self.tops.offsets
        appended = np.zeros(len(self.tops), dtype=np.bool_)
        filled = lengths > 0
        longest = np.maximum.reduceat(lengths, self.starts[:-1])
        shortest = np.minimum.reduceat(np.where(filled, lengths, longest[self.content]), self.starts[:-1])
        if (longest == shortest).all():
            return appended
        last = offsets[1:][filled] - 1
        entries = self.tops.entries
        alike = np.zeros(len(self.tops), dtype=np.bool_)
        alike[filled] = (
            (entries.codes()[last] == self.sampled.codes()[filled])
            & (entries.logprobs[last] == self.sampled.logprobs[filled])
            & (entries.ids[last] == self.sampled.ids[filled])
        )
        ends = self.ends_sampled() | alike
        for index in np.flatnonzero(longest != shortest):
            span = slice(self.starts[index], self.starts[index + 1])
            usual = usual_length(lengths[span].tolist(), ends[span].tolist())
            if usual is not None:
                appended[span] = ends[span] & (lengths[span] == usual + 1)
        return appended

    def drop_last(self, of: BoolArray, stage: int) -> None:
        """Take the last entry out of some of the N lists, which is the sampled token."""
        if of.any():
            at = self.tops.offsets[1:][of] - 1
            texts: list[str] = [self.listed.texts[index] for index in cast("list[int]", self.kept[at].tolist())]
            self._note(stage, "sampled-appended", np.flatnonzero(of), lambda i: added(texts[i]))
            mask = np.ones(len(self.kept), dtype=np.bool_)
            mask[at] = False
            self._keep(mask)

    def columns(self) -> list[Columns | None]:
        """What became of each of the R contents."""
        stated = repeat(None) if self.sampled.stated is None else self.sampled.stated.to_list()
        sampled = list(map(Candidate, self.said.texts, repeat(None), repeat(None), stated))
        positions = Positions(self.sampled, self.tops, self.n_dropped, np.zeros(len(self.tops), dtype=np.bool_))
        repairs: list[list[Repair]] = [[] for _ in self.unfit]
        for _, content, repair in sorted(self.noted, key=lambda noted: noted[0]):
            repairs[content].append(repair)
        found: list[Columns | None] = []
        for content, (start, stop) in enumerate(pairwise(self.starts.tolist())):
            counts = Counter({kind: int(numbers[content]) for kind, numbers in self.counts if numbers[content]})
            columns = Columns(sampled[start:stop], positions.part(start, stop), repairs[content], counts)
            found.append(None if self.unfit[content] else columns)
        return found

    def _repeats_id(self) -> BoolArray:
        """Which of the N lists have one id twice, shape (N,)."""
        ids, rows = self.tops.entries.ids, self.rows
        if len(self.tops) * int(self.tops.lengths.max(initial=0)) <= 2 * len(ids):
            table = np.sort(self.tops.padded(ids, NO_ID), axis=1)  # several times faster than to sort by two keys
            return ((table[:, 1:] == table[:, :-1]) & (table[:, 1:] != NO_ID)).any(axis=1)
        stated = ids != NO_ID
        ids, rows = ids[stated], rows[stated]
        order = np.lexsort((ids, rows))
        ids, rows = ids[order], rows[order]
        repeats = np.zeros(len(self.tops), dtype=np.bool_)
        repeats[rows[1:][(rows[1:] == rows[:-1]) & (ids[1:] == ids[:-1])]] = True
        return repeats

    def _is_same(self) -> BoolArray:
        """Which entries are the token that was sampled, as `is_same_token` has it."""
        entries, rows = self.tops.entries, self.rows
        by_id = (entries.ids != NO_ID) & (self.sampled.ids[rows] != NO_ID)
        same: BoolArray = entries.ids == self.sampled.ids[rows]
        if by_id.all():
            return same
        by_text = (entries.codes() == self.sampled.codes()[rows]) & self.said.whole[rows]
        same = np.where(by_id, same, by_text)
        if self.said.odd is not None and self.listed.odd is not None:
            odd = np.flatnonzero(~by_id & (self.said.odd[rows] | self.listed.odd[self.kept]))
            pairs = zip(self.sampled.take(rows[odd]).candidates(), entries.take(odd).candidates(), strict=True)
            same[odd] = [is_same_token(*cast("tuple[Candidate, Candidate]", pair)) for pair in pairs]
        return same

    def _keep(self, mask: BoolArray) -> None:
        """Leave the other entries out."""
        self.tops = self.tops.kept(mask)
        self.rows, self.kept, self.same = self.rows[mask], self.kept[mask], self.same[mask]

    def _lists(self, mask: BoolArray) -> BoolArray:
        """Which of the N lists have an entry with the mark, shape (N,)."""
        found = np.zeros(len(self.tops), dtype=np.bool_)
        found[self.rows[mask]] = True
        return found

    def _contents(self, mask: BoolArray) -> BoolArray:
        """Which of the R contents have a position with the mark, shape (R,)."""
        found = np.zeros(len(self.unfit), dtype=np.bool_)
        found[self.content[mask]] = True
        return found

    def _refuse(self, mask: BoolArray) -> None:
        """Leave the contents with such positions to a closer look; shape of the mask (N,)."""
        self.unfit |= self._contents(mask)

    def _note(self, stage: int, kind: str, rows: IntArray, what: Callable[[int], str]) -> None:
        """Note repairs of positions, in order; ``what`` says the i-th of them."""
        contents = self.content[rows]
        ranks = np.arange(len(rows)) - np.searchsorted(contents, contents)
        for i in np.flatnonzero((ranks < KEPT_PER_KIND) & ~self.unfit[contents]).tolist():
            content = int(contents[i])
            position = int(rows[i]) - int(self.starts[content])
            order = (stage == _COMPARED, position, stage, i)
            self.noted.append((order, content, Repair(kind, what(i), position)))
        self.counts.append((kind, np.bincount(contents, minlength=len(self.unfit))))


def _tokens(fields: _Fields) -> _Tokens:
    text = pl.Series("token", fields.texts, dtype=pl.String)
    whole = np.ones(len(text), dtype=np.bool_)
    if (text == "").any() or REPLACEMENT in "".join(fields.texts):
        whole = ~((text == "") | text.str.contains(REPLACEMENT, literal=True)).to_numpy()
    ids, bad = _ids(fields.ids)
    odd = stated = None
    if fields.stated is not None:
        stated, no_bytes = _stated(fields.stated)
        bad = bad | no_bytes
        differs = text.cast(pl.Binary).ne_missing(stated) | text.str.contains_any([*ESCAPES])
        odd = (differs & (stated.bin.size() > 0).fill_null(False)).to_numpy()
    entries = Entries(text.cast(pl.Categorical), _floats(fields.values), ids, stated)
    return _Tokens(fields.texts, entries, whole, bad, odd)


def _floats(values: Sequence[float | None]) -> FloatArray:
    try:
        series = pl.Series(values, dtype=pl.Float64)
    except (TypeError, ValueError, OverflowError):  # a whole number beyond all range
        series = pl.Series([number(value) for value in values], dtype=pl.Float64)
    return series.to_numpy()  # null becomes NaN


def _ids(values: Sequence[int | UnsetType | None]) -> tuple[IntArray, BoolArray]:
    """Token ids, and which of them are none."""
    if values and values[0] is UNSET and values.count(UNSET) == len(values):
        return np.full(len(values), NO_ID), np.zeros(len(values), dtype=np.bool_)
    try:
        series = pl.Series(values, dtype=pl.Int64)
    except (TypeError, ValueError, OverflowError):  # not all have one, or one that is too large
        plain = [None if value is UNSET else value for value in values]
        series = pl.Series(
            [_BAD_ID if value is not None and not 0 <= value < _ID_END else value for value in plain], dtype=pl.Int64
        )
    if not series.null_count():
        ids = series.to_numpy()
        return ids, ids < 0
    return series.fill_null(NO_ID).to_numpy(), (series < 0).fill_null(False).to_numpy()


def _stated(values: Sequence[list[int] | UnsetType | None]) -> tuple[pl.Series, BoolArray]:
    """Stated bytes, and which of them are none."""
    bad = np.zeros(len(values), dtype=np.bool_)
    found: list[bytes | None] = []
    for index, value in enumerate(values):
        try:
            found.append(bytes(value) if isinstance(value, list) else None)
        except (ValueError, OverflowError):
            found.append(None)
            bad[index] = True
    return pl.Series("stated", found, dtype=pl.Binary), bad
