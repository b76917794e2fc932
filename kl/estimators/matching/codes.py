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
from kl.estimators.rows import n_responses
from kl.estimators.token_bytes import BytesOf, byte_functions, is_part, plain_reader
from kl.pieces import REPLACEMENT
from kl.records import Candidate

NO_KEY = -1
_PARTIAL = 1 << 30  # numbers from here on are of bytes that are no text
_ESCAPES = "^(?:<0x|bytes:)"  # how tokens begin that may be written as their bytes
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

    def slice_of(self, response: int) -> slice:
        """The positions of one response."""
        first, end = np.searchsorted(self.response, [response, response + 1])
        return slice(int(first), int(end))


@dataclass(frozen=True, slots=True)
class KeyCodes:
    """What every listed and sampled token is known by: int32 numbers, `NO_KEY` for none.

    ``readers`` are, by response, what gives the bytes of a candidate of P and of Q.
    """

    p: Codes
    q: Codes
    sampled_p: Codes
    sampled_q: Codes
    readers: Sequence[tuple[BytesOf, BytesOf]]
    numbers: Numbers


@dataclass(slots=True)
class Numbers:
    """Bytes by number and back: ``texts`` are those of tokens, whose numbers are ``token_codes``."""

    texts: pl.Series
    token_codes: IntArray
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

    def bytes_of(self, codes: Codes) -> list[bytes]:
        """What numbers stand for, each once."""
        made = np.isin(codes, np.array([*self._texts], dtype=np.int64))
        place = np.full(int(self.token_codes.max(initial=-1)) + 1, 0, dtype=np.int64)
        place[self.token_codes] = np.arange(len(self.token_codes))
        texts = self.texts.cast(pl.Binary).gather(pl.Series(place[codes[~made]], dtype=pl.UInt32)).to_list()
        return [*texts, *(self._texts[code] for code in map(int, codes[made]))]


def text_codes(texts: Sequence[str]) -> IntArray:
    """The numbers that texts have as tokens of `kl.columns.Entries`."""
    return Entries.from_lists(texts, [None] * len(texts)).codes()


def is_whole_text(tokens: pl.Series) -> BoolArray:
    """`kl.pieces.is_whole` of each token; False for none."""
    texts = tokens.cast(pl.String)
    return ((texts != "") & ~texts.str.contains(REPLACEMENT, literal=True)).fill_null(False).to_numpy()


def key_codes(sides: Sides) -> KeyCodes:
    """What the tokens of both sides are known by if texts and bytes count."""
    parts = sides.parts()
    kinds = _Kinds.of(Entries.joined(list(parts)))
    ends = np.cumsum([len(part) for part in parts])
    of_p, of_q, of_sampled_p, of_sampled_q = np.split(kinds.of_entry, ends[:-1])
    numbers = Numbers(kinds.texts, kinds.token_codes)
    response_p, response_q = sides.response[sides.lists_p.rows], sides.response[sides.lists_q.rows]
    signs_p = _Signs.of(kinds, of_p, response_p, sides.n_responses)
    signs_q = _Signs.of(kinds, of_q, response_q, sides.n_responses)
    keys = [kinds.plain_keys(numbers, hides=hides) for hides in (False, True)]
    found = [
        np.where(hides[response], keys[1][of_entry], keys[0][of_entry])
        for of_entry, hides, response in (
            (of_p, signs_p.hides, response_p),
            (of_q, signs_q.hides, response_q),
            (of_sampled_p, signs_p.hides, sides.response),
            (of_sampled_q, signs_q.hides, sides.response),
        )
    ]
    plain: tuple[BytesOf, BytesOf] = plain_reader(hides=False), plain_reader(hides=True)
    readers = [
        (plain[int(p)], plain[int(q)]) for p, q in zip(signs_p.hides.tolist(), signs_q.hides.tolist(), strict=True)
    ]
    for response in np.flatnonzero(~_at_a_glance(signs_p, signs_q)).tolist():
        rows = sides.slice_of(response)
        places = [
            slice(int(sides.lists_p.offsets[rows.start]), int(sides.lists_p.offsets[rows.stop])),
            slice(int(sides.lists_q.offsets[rows.start]), int(sides.lists_q.offsets[rows.stop])),
            rows,
            rows,
        ]
        seen = [of[place] for of, place in zip((of_p, of_q, of_sampled_p, of_sampled_q), places, strict=True)]
        readers[response] = byte_functions([kinds.candidates(seen[0])], [kinds.candidates(seen[1])])
        for side, (target, place, of) in enumerate(zip(found, places, seen, strict=True)):
            target[place] = kinds.read(of, readers[response][side % 2], numbers)
    return KeyCodes(found[0], found[1], found[2], found[3], readers, numbers)


@dataclass(frozen=True, slots=True)
class _Kinds:
    """The distinct tokens by text and stated bytes, K of them; bytes that are those of the text say nothing more.

    ``of_entry`` numbers the entries' kinds, -1 for no token. ``texts``, ``token_codes`` and ``stated`` have length K.
    """

    of_entry: IntArray
    texts: pl.Series
    token_codes: IntArray
    stated: list[bytes | None]

    @classmethod
    def of(cls, entries: Entries) -> _Kinds:
        codes = entries.codes()
        kinds = codes.copy()
        others = np.zeros(0, dtype=np.int64)
        if entries.stated is not None:
            own = entries.tokens.cast(pl.String).cast(pl.Binary)
            differs = (entries.stated.bin.size() > 0) & (entries.stated != own)
            others = np.flatnonzero(differs.fill_null(False).to_numpy())
        if len(others) and entries.stated is not None:
            shown = entries.stated.gather(pl.Series(others, dtype=pl.UInt32)).bin.encode("hex").cast(pl.Categorical)
            pairs = (codes[others] << 32) | shown.to_physical().to_numpy()
            kinds[others] = int(codes.max(initial=-1)) + 1 + np.unique(pairs, return_inverse=True)[1]
        known = np.flatnonzero(kinds >= 0)
        first = np.full(int(kinds.max(initial=-1)) + 1, -1, dtype=np.int64)
        first[kinds[known][::-1]] = known[::-1]
        at = first[first >= 0]
        number = np.cumsum(first >= 0) - 1
        stated: list[bytes | None] = [None] * len(at)
        if len(others) and entries.stated is not None:
            is_other = np.zeros(len(codes), dtype=np.bool_)
            is_other[others] = True
            for kind in np.flatnonzero(is_other[at]).tolist():
                stated[kind] = entries.stated[int(at[kind])]
        distinct = entries.take(at)
        of_entry = np.where(kinds >= 0, number[kinds], -1) if len(number) else kinds
        return cls(of_entry, distinct.tokens.cast(pl.String), codes[at], stated)

    def candidates(self, of_entry: IntArray) -> list[Candidate]:
        """The kinds of some entries, each once."""
        kinds = np.unique(of_entry[of_entry >= 0])
        texts = self.texts.gather(pl.Series(kinds, dtype=pl.UInt32)).to_list() if len(kinds) else []
        return [
            Candidate(text, None, None, self.stated[kind]) for text, kind in zip(texts, kinds.tolist(), strict=True)
        ]

    def read(self, of_entry: IntArray, read: BytesOf, numbers: Numbers) -> Codes:
        """The keys of some entries by what gives their bytes."""
        kinds, inverse = np.unique(of_entry, return_inverse=True)
        known = numbers.of([read(candidate) for candidate in self.candidates(of_entry)])
        return np.concatenate([np.full(np.count_nonzero(kinds < 0), NO_KEY, dtype=np.int32), known])[inverse]

    def plain_keys(self, numbers: Numbers, *, hides: bool) -> Codes:
        """The key of each kind where a side writes texts; the last one is that of no token. Shape (K + 1,)."""
        named = ~_matches(self.texts, r"^(?:|.*\x{FFFD}.*|(?:\\x[0-9A-Fa-f]{2})+|token_id:\d+)$")
        keys = np.append(np.where(named, self.token_codes, NO_KEY), NO_KEY).astype(np.int32)
        read = plain_reader(hides=hides)
        is_escaped = _matches(self.texts, _ESCAPES).tolist()
        others = [kind for kind, stated in enumerate(self.stated) if stated is not None or is_escaped[kind]]
        texts = self.texts.gather(pl.Series(others, dtype=pl.UInt32)).to_list() if others else []
        known = [read(Candidate(text, None, None, self.stated[kind])) for text, kind in zip(texts, others, strict=True)]
        keys[others] = numbers.of(known)
        if hides:
            keys[:-1][_matches(self.texts, "^ *$")] = NO_KEY
        return keys


def _matches(texts: pl.Series, pattern: str) -> BoolArray:
    return texts.str.contains(f"(?s){pattern}").to_numpy().astype(np.bool_)


class _Signs(NamedTuple):
    """Of one side of R responses, shape (R,): what its tokens show of how it writes them.

    ``text``: it certainly writes texts. ``hides``: it leaves parts of characters out. ``odd``: a token looks like an
    escape. ``states``: it knows the bytes of parts. ``shows``: it shows or knows parts of characters.
    """

    text: BoolArray
    hides: BoolArray
    odd: BoolArray
    states: BoolArray
    shows: BoolArray

    @classmethod
    def of(cls, kinds: _Kinds, of_entry: IntArray, response: IntArray, n_responses: int) -> _Signs:
        texts = kinds.texts
        is_stated = np.array([stated is not None for stated in kinds.stated], dtype=np.bool_)
        states = np.array([stated is not None and is_part(stated) for stated in kinds.stated], dtype=np.bool_)

        def any_of(flags: BoolArray) -> BoolArray:
            return with_any(flags[of_entry], response, n_responses)

        return cls(
            any_of(_matches(texts, "^ .*[0-9A-Za-z]") | states),
            any_of((texts == "").to_numpy() & ~is_stated),
            any_of(_matches(texts, _ESCAPES)),
            any_of(states),
            any_of(_matches(texts, r"\x{FFFD}|^(?:\\x[0-9A-Fa-f]{2})+$") | states),
        )


def with_any(flags: BoolArray, response: IntArray, n_responses: int) -> BoolArray:
    """Which responses have a flag, shape (R,), from the flags of entries and the response of each."""
    found = np.zeros(n_responses, dtype=np.bool_)
    found[response[flags]] = True
    return found


def _at_a_glance(p: _Signs, q: _Signs) -> BoolArray:
    """Where both sides write texts, and neither can have cut one that the other states."""
    uncut = (p.shows | ~q.states) & (q.shows | ~p.states)
    return p.text & q.text & ~p.odd & ~q.odd & uncut
