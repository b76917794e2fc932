"""The bytes that the tokens of many responses stand for, as numbers: equal bytes, and only those, have one number.

What a token's bytes are depends on how its side of its response writes tokens (`kl.estimators.token_bytes`). Plain text
with or without hidden parts of characters is seen at a glance; any other response is read token by token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray

from kl.columns import BoolArray, Entries, IntArray, TopLists
from kl.estimators.matching.texts import (
    BLANK,
    EMPTY,
    ESCAPED,
    HEX,
    LOSSY,
    OTHER,
    RAW_BYTES,
    RAW_PIECE,
    TEXTS,
    UNNAMED,
    UNSURE,
    WORD,
    TextSigns,
)
from kl.estimators.rows import n_responses
from kl.estimators.token_bytes import BytesOf, byte_functions, is_part, plain_reader
from kl.records import Candidate

NO_KEY = -1
_PARTIAL = 1 << 30  # numbers from here on are of bytes that are no text
Codes = NDArray[np.int32]


class Sides(NamedTuple):
    """T positions of P and Q: lists, sampled tokens (null where there is none), and the response of each position."""

    lists_p: TopLists
    lists_q: TopLists
    sampled_p: Entries
    sampled_q: Entries
    response: IntArray

    def parts(self) -> tuple[Entries, Entries, Entries, Entries]:
        """The listed tokens of P and of Q, the sampled ones of P and of Q."""
        return self.lists_p.entries, self.lists_q.entries, self.sampled_p, self.sampled_q

    @property
    def n_responses(self) -> int:
        """Of how many responses the positions are, counted to the last one."""
        return n_responses(self.response)

    @property
    def starts(self) -> IntArray:
        """The first position of each response that has one, rising."""
        return np.flatnonzero(np.diff(self.response, prepend=-1))

    def responses_with(self, flags: BoolArray, lists: TopLists) -> BoolArray:
        """Which responses have a flag, shape (R,), from the flags of the entries of one side's lists."""
        found = np.zeros(self.n_responses, dtype=np.bool_)
        if flags.any():
            starts = self.starts
            found[self.response[starts]] = np.bitwise_or.reduceat(flags, lists.offsets[starts])
        return found

    def slice_of(self, response: int) -> slice:
        """The positions of one response."""
        first, end = np.searchsorted(self.response, [response, response + 1])
        return slice(int(first), int(end))


@dataclass(frozen=True, slots=True)
class KeyCodes:
    """What every listed and sampled token is known by: int32 numbers, `NO_KEY` for none.

    ``readers`` are, by response, what gives the bytes of a candidate of P and of Q. ``is_whole``, shape (T,), is
    `kl.pieces.is_whole` of the token that P sampled; False for none.
    """

    p: Codes
    q: Codes
    sampled_p: Codes
    sampled_q: Codes
    readers: Sequence[tuple[BytesOf, BytesOf]]
    numbers: Numbers
    is_whole: BoolArray


@dataclass(slots=True)
class Numbers:
    """Bytes by number and back; a text has the number that it has as a token."""

    _texts: dict[int, bytes] = field(default_factory=dict[int, bytes])
    _codes: dict[bytes, int] = field(default_factory=dict[bytes, int])

    def of(self, known: Sequence[bytes | None]) -> Codes:
        """The number of each; `NO_KEY` for None."""
        new = [item for item in dict.fromkeys(known) if item is not None and item not in self._codes]
        texts = [item for item in new if not is_part(item)]
        for item, code in zip(texts, text_codes([item.decode() for item in texts]).tolist(), strict=True):
            self._codes[item] = code
            self._texts[code] = item
        for item in new:
            if item not in self._codes:
                self._codes[item] = _PARTIAL + len(self._codes)
                self._texts[self._codes[item]] = item
        return np.array([NO_KEY if item is None else self._codes[item] for item in known], dtype=np.int32)

    def bytes_of(self, codes: IntArray) -> list[bytes]:
        """What numbers stand for, each once."""
        if not self._texts:
            return TEXTS.bytes_of(codes)
        made = np.isin(codes, np.array([*self._texts], dtype=np.int64))
        return [*TEXTS.bytes_of(codes[~made]), *(self._texts[code] for code in map(int, codes[made]))]


def text_codes(texts: Sequence[str]) -> IntArray:
    """The numbers that texts have as tokens of `kl.columns.Entries`."""
    return Entries.from_lists(texts, [None] * len(texts)).codes()


def key_codes(sides: Sides) -> KeyCodes:
    """What the tokens of both sides are known by if texts and bytes count."""
    tokens = [_Tokens.of(part) for part in sides.parts()]
    signs = [_Signs.of(of, lists, sides) for of, lists in zip(tokens, (sides.lists_p, sides.lists_q), strict=False)]
    every = np.ones(len(sides.response), dtype=np.int64)
    n_tokens = (sides.lists_p.lengths, sides.lists_q.lengths, every, every)
    numbers = Numbers()
    found = [
        of.plain_keys(numbers, side.hides[sides.response], side.unsure[sides.response], n)
        for of, side, n in zip(tokens, signs * 2, n_tokens, strict=True)
    ]
    plain = [plain_reader(hides=hides, is_text=is_text) for hides in (False, True) for is_text in (True, False)]
    kinds_p, kinds_q = (side.plain_kind.tolist() for side in signs)
    readers = [(plain[int(p)], plain[int(q)]) for p, q in zip(kinds_p, kinds_q, strict=True)]
    for response in np.flatnonzero(~_at_a_glance(*signs)).tolist():
        rows = sides.slice_of(response)
        places = [
            slice(int(sides.lists_p.offsets[rows.start]), int(sides.lists_p.offsets[rows.stop])),
            slice(int(sides.lists_q.offsets[rows.start]), int(sides.lists_q.offsets[rows.stop])),
            rows,
            rows,
        ]
        kinds = [of.kinds(np.arange(place.start, place.stop)) for of, place in zip(tokens, places, strict=True)]
        readers[response] = byte_functions([kinds[0].known()], [kinds[1].known()])
        for side, (target, place, of) in enumerate(zip(found, places, kinds, strict=True)):
            target[place] = of.read(readers[response][side % 2], numbers)
    return KeyCodes(found[0], found[1], found[2], found[3], readers, numbers, tokens[2].is_whole)


class _Kinds(NamedTuple):
    """Distinct tokens by text and stated bytes, and which of them each of some tokens is; None is no token."""

    candidates: list[Candidate | None]
    of_token: IntArray

    def known(self) -> list[Candidate]:
        """Without no token."""
        return [candidate for candidate in self.candidates if candidate is not None]

    def read(self, read: BytesOf, numbers: Numbers) -> Codes:
        """The keys of the tokens by what gives their bytes."""
        return numbers.of([item if item is None else read(item) for item in self.candidates])[self.of_token]


@dataclass(frozen=True, slots=True)
class _Tokens:
    """Some tokens, E of them, with the numbers of their texts and what these show; -1 and an empty text of no token.

    ``stating`` are those that state bytes which are not those of their text, and so say more, by number and rising;
    ``stated`` numbers these bytes, from 1 on. Both have shape (M,).
    """

    entries: Entries
    codes: IntArray
    signs: TextSigns
    stating: IntArray
    stated: IntArray

    @classmethod
    def of(cls, entries: Entries) -> _Tokens:
        codes = entries.codes()
        return cls(entries, codes, TEXTS.signs(entries.tokens, codes), *_stating(entries))

    @property
    def is_whole(self) -> BoolArray:
        """`kl.pieces.is_whole` of each; False for no token."""
        return (self.signs & (EMPTY | LOSSY)) == 0

    def kinds(self, at: IntArray) -> _Kinds:
        """Of some of the tokens, by number and rising."""
        numbers = self.codes[at]
        among = np.isin(self.stating, at)
        numbers[np.searchsorted(at, self.stating[among])] += self.stated[among] << 32
        _, first, inverse = np.unique(numbers, return_index=True, return_inverse=True)
        return _Kinds(self.entries.take(at[first]).candidates(), inverse)

    def plain_keys(self, numbers: Numbers, hides: BoolArray, unsure: BoolArray, n_tokens: IntArray) -> Codes:
        """The key of each where their side writes texts, or shows not how; shape (E,).

        Parameters
        ----------
        hides, unsure, n_tokens : shape (T,)
            Of each position: those of `_Signs`, and how many of the tokens it has.
        """
        keys = self.codes.astype(np.int32)
        shown = int(np.bitwise_or.reduce(self.signs))
        if shown & UNNAMED:
            keys[(self.signs & UNNAMED) != 0] = NO_KEY
        if shown & UNSURE:
            keys[np.repeat(unsure, n_tokens) & ((self.signs & UNSURE) != 0)] = NO_KEY
        others = np.flatnonzero(self.signs & ESCAPED) if shown & ESCAPED else self.stating[:0]
        others = np.union1d(others, self.stating)
        if others.size:
            keys[others] = self.kinds(others).read(plain_reader(hides=False), numbers)
        if shown & BLANK:
            keys[np.repeat(hides, n_tokens) & ((self.signs & BLANK) != 0)] = NO_KEY
        return keys


def _stating(entries: Entries) -> tuple[IntArray, IntArray]:
    """`_Tokens.stating` and `_Tokens.stated`."""
    nothing = np.zeros(0, dtype=np.int64)
    if entries.stated is None:
        return nothing, nothing
    own = entries.tokens.cast(pl.String).cast(pl.Binary)
    differs = (entries.stated.bin.size() > 0) & (entries.stated != own)
    at = np.flatnonzero(differs.fill_null(False).to_numpy())
    if not at.size:
        return nothing, nothing
    shown = entries.stated[pl.Series(at.astype(np.uint32))].bin.encode("hex").cast(pl.Categorical)
    return at, shown.to_physical().to_numpy().astype(np.int64) + 1


class _Signs(NamedTuple):
    """Of one side of R responses, shape (R,): what its tokens show of how it writes them.

    ``raw``: it writes pieces of a vocabulary. ``unsure``: these or texts. ``hides``: it leaves parts of characters out.
    ``odd``: a token looks like an escape. ``states``: it knows the bytes of parts. ``shows``: it shows or knows parts.
    """

    raw: BoolArray
    unsure: BoolArray
    hides: BoolArray
    odd: BoolArray
    states: BoolArray
    shows: BoolArray

    @property
    def plain_kind(self) -> IntArray:
        """Which of four kinds of readers reads the side where it writes no pieces, shape (R,)."""
        return 2 * self.hides.astype(np.int64) + self.unsure

    @classmethod
    def of(cls, tokens: _Tokens, lists: TopLists, sides: Sides) -> _Signs:
        signs, states = tokens.signs, np.zeros(len(tokens.signs), dtype=np.bool_)
        if tokens.stating.size:
            signs = signs.copy()
            signs[tokens.stating] &= ~np.uint16(EMPTY)
            kinds = tokens.kinds(tokens.stating)
            parts = np.array([is_part(item.token_bytes or b"") for item in kinds.known()], dtype=np.bool_)
            states[tokens.stating] = parts[kinds.of_token]
        shown = np.zeros(sides.n_responses, dtype=signs.dtype)
        starts = sides.starts
        shown[sides.response[starts]] = np.bitwise_or.reduceat(signs, lists.offsets[starts])
        text, other, raw_bytes, raw_piece, hides, odd, shows = (
            (shown & bits) != 0 for bits in (WORD, OTHER, RAW_BYTES, RAW_PIECE, EMPTY, ESCAPED, LOSSY | HEX)
        )
        stated = sides.responses_with(states, lists)
        # As `kl.estimators.token_bytes.writing_of` has it.
        is_raw = (raw_bytes & ~other) | (~raw_bytes & raw_piece)
        is_text = text | stated | (other & ~raw_bytes & ~raw_piece)
        return cls(is_raw & ~is_text, ~is_raw & ~is_text, hides, odd, stated, shows | stated)


def _at_a_glance(p: _Signs, q: _Signs) -> BoolArray:
    """Where neither side writes pieces or escapes, nor can have cut a token that the other states."""
    uncut = (p.shows | ~q.states) & (q.shows | ~p.states)
    return ~p.raw & ~q.raw & ~p.odd & ~q.odd & uncut
