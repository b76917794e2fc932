"""Top-k lists of many positions as flat arrays; what moves between the rooms as objects is a view of them.

An *entry* is one token with its log-probability. The entries of N lists stand one after the other; ``offsets`` says
where each list begins. Tokens are coded by their text (a Polars categorical: one table of distinct texts a process).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, chain, pairwise
from typing import Any, cast, overload

import numpy as np
import polars as pl
from numpy.typing import NDArray

from kl.records import Candidate, Defect, Position

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]

NO_ID = -1


@dataclass(frozen=True, slots=True, eq=False)
class Entries:
    """E tokens with their log-probabilities.

    Attributes
    ----------
    tokens : pl.Series of Categorical, length E
        Their texts; null is no token at all (an entry that is None).
    logprobs : float64, shape (E,)
        Nats; NaN where not reported.
    ids : int64, shape (E,)
        Token ids, `NO_ID` where not stated.
    stated : pl.Series of Binary, length E, or None
        Their exact bytes where the source states them, else null; None if it states none.
    """

    tokens: pl.Series
    logprobs: FloatArray
    ids: IntArray
    stated: pl.Series | None = None

    @classmethod
    def of(cls, candidates: Sequence[Candidate | None]) -> Entries:
        """Of candidates; None is no token."""
        if all(candidate is None for candidate in candidates):
            return cls.no_tokens(len(candidates))
        known = [_NOBODY if candidate is None else candidate for candidate in candidates]
        return cls.from_lists(
            [item[0] if other is not None else None for item, other in zip(known, candidates, strict=True)],
            [item[1] for item in known],
            [item[2] for item in known],
            [item[3] for item in known],
        )

    @classmethod
    def from_lists(
        cls,
        tokens: Sequence[str | None],
        logprobs: Sequence[float | None],
        ids: Sequence[int | None] | None = None,
        stated: Sequence[bytes | None] | None = None,
    ) -> Entries:
        """Of plain lists of one length, None for what is not known. Half a character in a text is taken as U+FFFD.

        Raises
        ------
        OverflowError
            If an id has no place in 64 bits.
        """
        n = len(tokens)
        numbers = (
            np.full(n, NO_ID, dtype=np.int64)
            if ids is None
            else np.fromiter((NO_ID if item is None else item for item in ids), dtype=np.int64, count=n)
        )
        is_stated = stated is not None and any(item is not None for item in stated)
        return cls(
            _texts(tokens),
            np.array(logprobs, dtype=np.float64),  # None becomes NaN
            numbers,
            pl.Series("stated", stated, dtype=pl.Binary) if is_stated else None,
        )

    @classmethod
    def none(cls) -> Entries:
        """No entry."""
        return cls.no_tokens(0)

    @classmethod
    def no_tokens(cls, n: int) -> Entries:
        """N entries that are no token."""
        texts = pl.Series("token", [None], dtype=pl.Categorical).new_from_index(0, n)
        return cls(texts, np.full(n, np.nan), np.full(n, NO_ID, dtype=np.int64))

    @classmethod
    def joined(cls, parts: Sequence[Entries]) -> Entries:
        """All entries of several, one after the other."""
        if not parts:
            return cls.none()
        if len(parts) == 1:
            return parts[0]
        stated = None
        if any(part.stated is not None for part in parts):
            stated = pl.concat([part._bytes() for part in parts])
        return cls(
            pl.concat([part.tokens for part in parts]),
            np.concatenate([part.logprobs for part in parts]),
            np.concatenate([part.ids for part in parts]),
            stated,
        )

    def _bytes(self) -> pl.Series:
        return pl.Series("stated", [None] * len(self), dtype=pl.Binary) if self.stated is None else self.stated

    def __len__(self) -> int:
        return len(self.logprobs)

    def or_none(self, at: IntArray) -> Entries:
        """Some of the entries, by number; -1 is no token."""
        if not len(self):
            return Entries.no_tokens(len(at))
        if at.min(initial=0) >= 0:
            return self.take(at)
        return Entries.joined([self, Entries.no_tokens(1)]).take(np.where(at < 0, len(self), at))

    def take(self, at: IntArray) -> Entries:
        """Some of the entries, by number."""
        if _is_all(at, len(self)):
            return self
        return Entries(
            _gathered(self.tokens, at),
            self.logprobs[at],
            self.ids[at],
            None if self.stated is None else _gathered(self.stated, at),
        )

    def part(self, start: int, stop: int) -> Entries:
        """The entries from one number to another."""
        span = slice(start, stop)
        return Entries(
            self.tokens[span], self.logprobs[span], self.ids[span], None if self.stated is None else self.stated[span]
        )

    def with_logprobs(self, logprobs: FloatArray) -> Entries:
        """The same tokens with other values."""
        return Entries(self.tokens, logprobs, self.ids, self.stated)

    def codes(self) -> IntArray:
        """The number of each token's text, -1 for no token; one numbering in a process."""
        codes = self.tokens.to_physical().to_numpy()  # floats and NaN where there is no token
        return np.nan_to_num(codes, nan=-1).astype(np.int64) if codes.dtype == np.float64 else codes.astype(np.int64)

    def texts(self) -> list[str]:
        """The texts of tokens that all are there."""
        return self.tokens.cast(pl.String).to_list()

    def candidates(self) -> list[Candidate | None]:
        """The entries as objects."""
        stated: Iterable[bytes | None] = [None] * len(self) if self.stated is None else self.stated.to_list()
        logprobs = [None if value != value else value for value in self.logprobs.tolist()]
        ids = [None if number == NO_ID else number for number in self.ids.tolist()]
        tokens = self.tokens.cast(pl.String).to_list()
        made = map(Candidate, tokens, logprobs, ids, stated)
        return [None if token is None else candidate for token, candidate in zip(tokens, made, strict=True)]


_NOBODY = Candidate("", None)


def _texts(tokens: Sequence[str | None]) -> pl.Series:
    try:
        return pl.Series("token", tokens, dtype=pl.Categorical)
    except UnicodeEncodeError:
        whole = [token and token.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for token in tokens]
        return pl.Series("token", whole, dtype=pl.Categorical)


def _is_all(at: IntArray, n: int) -> bool:
    """Whether the numbers are those from 0 to n in their order."""
    return len(at) == n and bool((at == np.arange(n)).all())


def _gathered(series: pl.Series, at: IntArray) -> pl.Series:
    # By the brackets of a series, not its method `gather`, which makes a query.
    return series[pl.Series(at.astype(np.uint32))] if len(at) else series.clear()


@dataclass(frozen=True, slots=True, eq=False)
class TopLists(Sequence[tuple[Candidate, ...]]):
    """N candidate lists; as a sequence, their objects.

    Attributes
    ----------
    entries : Entries
    offsets : int64, shape (N + 1,)
        The entries of list i are ``offsets[i]`` to ``offsets[i + 1]``.
    """

    entries: Entries
    offsets: IntArray

    @classmethod
    def of(cls, lists: Sequence[Sequence[Candidate]]) -> TopLists:
        """Of objects, unless they are columns already."""
        if isinstance(lists, TopLists):
            return lists
        return cls(Entries.of(list(chain.from_iterable(lists))), _offsets([len(item) for item in lists]))

    @classmethod
    def joined(cls, parts: Sequence[TopLists]) -> TopLists:
        """All lists of several, one after the other."""
        lengths = [part.lengths for part in parts]
        return cls(Entries.joined([part.entries for part in parts]), _offsets(np.concatenate([_NONE, *lengths])))

    @classmethod
    def empty(cls, n: int) -> TopLists:
        """Of n empty lists."""
        return cls(Entries.none(), np.zeros(n + 1, dtype=np.int64))

    @property
    def lengths(self) -> IntArray:
        """Entries of each list, shape (N,)."""
        return np.diff(self.offsets)

    @property
    def rows(self) -> IntArray:
        """The number of the list of each entry, shape (E,)."""
        return np.repeat(np.arange(len(self)), self.lengths)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @overload
    def __getitem__(self, at: int) -> tuple[Candidate, ...]: ...
    @overload
    def __getitem__(self, at: slice) -> tuple[tuple[Candidate, ...], ...]: ...
    def __getitem__(self, at: int | slice) -> tuple[Candidate, ...] | tuple[tuple[Candidate, ...], ...]:
        if isinstance(at, slice):
            return tuple(self[index] for index in range(*at.indices(len(self))))
        index = range(len(self))[at]
        return _whole(
            self.entries.take(np.arange(int(self.offsets[index]), int(self.offsets[index + 1]), dtype=np.int64))
        )

    def __iter__(self) -> Iterator[tuple[Candidate, ...]]:
        candidates = [candidate for candidate in self.entries.candidates() if candidate is not None]
        return (tuple(candidates[start:stop]) for start, stop in pairwise(self.offsets.tolist()))

    def take(self, rows: IntArray) -> TopLists:
        """Some of the lists, by number; -1 is an empty one."""
        if _is_all(rows, len(self)):
            return self
        lengths = np.where(rows < 0, 0, self.lengths[rows]) if len(self) else np.zeros(len(rows), dtype=np.int64)
        offsets = _offsets(lengths)
        at = np.arange(int(offsets[-1]), dtype=np.int64) + np.repeat(self.offsets[rows] - offsets[:-1], lengths)
        return TopLists(self.entries.take(at), offsets)

    def followed_by(self, others: TopLists) -> TopLists:
        """Each list with the other one of its number behind it."""
        order = np.argsort(np.concatenate([self.rows, others.rows]), kind="stable")
        entries = Entries.joined([self.entries, others.entries])
        return TopLists(entries.take(order), _offsets(self.lengths + others.lengths))

    def falling(self) -> TopLists:
        """The same lists, each by falling log-probability, equals in their order; none is NaN."""
        return TopLists(self.entries.take(np.lexsort((-self.entries.logprobs, self.rows))), self.offsets)

    def part(self, start: int, stop: int) -> TopLists:
        """The lists from one number to another."""
        offsets = self.offsets[start : stop + 1]
        return TopLists(self.entries.part(int(offsets[0]), int(offsets[-1])), offsets - offsets[0])

    def replaced(self, rows: IntArray, others: TopLists) -> TopLists:
        """The same with other lists in the place of some."""
        order = np.arange(len(self), dtype=np.int64)
        order[rows] = len(self) + np.arange(len(others))
        return TopLists.joined([self, others]).take(order)

    def kept(self, mask: BoolArray) -> TopLists:
        """The same lists with some of their entries; shape of the mask (E,)."""
        if mask.all():
            return self
        return TopLists(
            self.entries.take(np.flatnonzero(mask)), _offsets(np.bincount(self.rows[mask], minlength=len(self)))
        )

    def first(self) -> FloatArray:
        """The first log-probability of each list, shape (N,); NaN of an empty one."""
        filled = self.lengths > 0
        values = np.full(len(self), np.nan)
        values[filled] = self.entries.logprobs[self.offsets[:-1][filled]]
        return values

    def last(self) -> FloatArray:
        """The last log-probability of each list, shape (N,); NaN of an empty one."""
        filled = self.lengths > 0
        values = np.full(len(self), np.nan)
        values[filled] = self.entries.logprobs[self.offsets[1:][filled] - 1]
        return values

    def padded(self, values: NDArray[Any], fill: float) -> NDArray[Any]:
        """Values of the entries as rows, shape (N, K) with the largest length K, at least 1."""
        lengths = self.lengths
        if len(lengths) and lengths[0] and (lengths == lengths[0]).all():
            return values.reshape(len(lengths), -1)
        table = np.full((len(self), max(int(lengths.max(initial=1)), 1)), fill, dtype=values.dtype)
        table[np.arange(table.shape[1]) < lengths[:, None]] = values
        return table


_NONE = np.zeros(0, dtype=np.int64)


def _offsets(lengths: Sequence[int] | IntArray) -> IntArray:
    if isinstance(lengths, np.ndarray):
        return np.concatenate(([0], np.cumsum(lengths))).astype(np.int64)
    return np.array([0, *accumulate(lengths)], dtype=np.int64)


def _whole(entries: Entries) -> tuple[Candidate, ...]:
    return tuple(candidate for candidate in entries.candidates() if candidate is not None)


@dataclass(frozen=True, slots=True, eq=False)
class Positions(Sequence[Position]):
    """The positions of a response as columns; as a sequence, their objects.

    Attributes
    ----------
    sampled : Entries, of T
    tops : TopLists, of T
    n_dropped : int64, shape (T,)
    defects : mapping
        Position → why it cannot be used.
    may_lack : bool, shape (T,)
    """

    sampled: Entries
    tops: TopLists
    n_dropped: IntArray
    may_lack: BoolArray
    defects: Mapping[int, Defect] = field(default_factory=dict[int, Defect])

    @classmethod
    def of(cls, positions: Sequence[Position]) -> Positions:
        """Of objects, unless they are columns already."""
        if isinstance(positions, Positions):
            return positions
        return cls(
            Entries.of([item.sampled for item in positions]),
            TopLists.of([item.top for item in positions]),
            np.array([item.n_dropped for item in positions], dtype=np.int64),
            np.array([item.may_lack for item in positions], dtype=np.bool_),
            {t: item.defect for t, item in enumerate(positions) if item.defect is not None},
        )

    def __len__(self) -> int:
        return len(self.sampled)

    @overload
    def __getitem__(self, at: int) -> Position: ...
    @overload
    def __getitem__(self, at: slice) -> tuple[Position, ...]: ...
    def __getitem__(self, at: int | slice) -> Position | tuple[Position, ...]:
        if isinstance(at, slice):
            return tuple(self[t] for t in range(*at.indices(len(self))))
        t = range(len(self))[at]
        (sampled,) = _whole(self.sampled.take(np.array([t])))
        return Position(sampled, self.tops[t], int(self.n_dropped[t]), self.defects.get(t), bool(self.may_lack[t]))

    def __iter__(self) -> Iterator[Position]:
        numbers, may_lack = self.n_dropped.tolist(), self.may_lack.tolist()
        columns = zip(self.sampled.candidates(), self.tops, numbers, may_lack, strict=True)
        for t, (sampled, top, n_dropped, lacks) in enumerate(columns):
            assert sampled is not None, "a position has a sampled token"
            yield Position(sampled, top, n_dropped, self.defects.get(t), lacks)

    def text_lengths(self) -> IntArray:
        """Characters of each sampled token, shape (T,)."""
        return np.array([len(token) for token in self.sampled.texts()], dtype=np.int64)

    def part(self, start: int, stop: int) -> Positions:
        """The positions from one number to another."""
        return Positions(
            self.sampled.part(start, stop),
            self.tops.part(start, stop),
            self.n_dropped[start:stop],
            self.may_lack[start:stop],
            {t - start: defect for t, defect in self.defects.items() if start <= t < stop},
        )

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Positions | tuple | list):
            return [*self] == [*cast("Sequence[Position]", other)]
        return NotImplemented

    __hash__ = None  # type: ignore[assignment]
