"""What the texts of tokens show of themselves, each text of a process looked at once."""

from __future__ import annotations

from threading import Lock
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from kl.columns import BoolArray, IntArray
from kl.pieces import visible_bytes

# What a text is, one bit each, by the rules of `kl.estimators.token_bytes`. From WORD on it is what a text says of how
# its side writes tokens; where that is not known, an UNSURE one may be a text or a piece of a vocabulary.
EMPTY, LOSSY, HEX, NUMBER, ESCAPED, BLANK, WORD, OTHER, RAW_BYTES, RAW_PIECE, UNSURE, _SEEN = (
    1 << bit for bit in range(12)
)
_BYTE_LEVEL = "[" + "".join(f"\\x{{{ord(character):X}}}" for character in visible_bytes()) + "]"
_PATTERNS = {
    EMPTY: "^$",
    LOSSY: r"\x{FFFD}",
    HEX: r"^(?:\\x[0-9A-Fa-f]{2})+$",
    NUMBER: r"^token_id:\d+$",
    ESCAPED: "^(?:<0x|bytes:)",  # how tokens begin that may be written as their bytes
    BLANK: "^ *$",
    WORD: r"^ .*[^\s\x1C-\x1F]",  # a blank, and more than blanks: so begin words where texts are written
}
UNNAMED = EMPTY | LOSSY | HEX | NUMBER  # says not which token it is
TextSigns = NDArray[np.uint16]


def _signs_of(texts: pl.Series) -> TextSigns:
    def matches(pattern: str) -> BoolArray:
        return texts.str.contains(f"(?s){pattern}").to_numpy().astype(np.bool_)

    found = {sign: matches(pattern) for sign, pattern in _PATTERNS.items()}
    is_control, is_byte_level = matches("^<.+>$"), matches(f"^{_BYTE_LEVEL}*$")
    is_piece = ~(found[EMPTY] | found[LOSSY] | is_control)
    found[OTHER] = is_piece & ~found[BLANK] & ~is_byte_level
    found[RAW_BYTES] = is_piece & matches("^[ĠĊ]")
    found[RAW_PIECE] = is_piece & matches("^▁")
    found[UNSURE] = ~is_control & (matches("▁") | (is_byte_level & matches(r"[^\x00-\x7F]")))
    return sum((flags * np.uint16(sign) for sign, flags in found.items()), np.full(len(texts), _SEEN, dtype=np.uint16))


class Texts:
    """The texts met so far by their numbers (`kl.columns.Entries.codes`), which last as long as this does."""

    def __init__(self) -> None:
        self._numbering = pl.Series([""], dtype=pl.Categorical)  # Polars numbers anew when no series is left
        self._signs = np.array([_SEEN | EMPTY], dtype=np.uint16)  # the last one is that of no token
        self._bytes: NDArray[Any] = np.empty(0, dtype=object)
        self._lock = Lock()

    def signs(self, tokens: pl.Series, codes: IntArray) -> TextSigns:
        """What each token's text is, from the tokens and their numbers; no token counts as an empty text."""
        self._make_room(int(codes.max(initial=-1)))
        found = self._signs[codes]
        if not found.all():
            self._learn(tokens, codes, np.flatnonzero(found == 0))
            found = self._signs[codes]
        return found

    def bytes_of(self, codes: IntArray) -> list[bytes]:
        """The texts of numbers that `signs` has met."""
        return self._bytes[codes].tolist()

    def _make_room(self, largest: int) -> None:
        if largest < len(self._bytes):
            return
        with self._lock:
            more = max(2 * len(self._bytes), largest + 1) - len(self._bytes)
            self._signs = np.concatenate([self._signs[:-1], np.zeros(more, dtype=np.uint16), self._signs[-1:]])
            self._bytes = np.append(self._bytes, np.empty(more, dtype=object))  # last: others go by its length

    def _learn(self, tokens: pl.Series, codes: IntArray, at: IntArray) -> None:
        new, first = np.unique(codes[at], return_index=True)
        texts = tokens[pl.Series(at[first].astype(np.uint32))].cast(pl.String)
        signs = _signs_of(texts)
        with self._lock:
            self._bytes[new] = texts.cast(pl.Binary).to_list()
            self._signs[new] = signs  # last: what has signs has bytes


TEXTS = Texts()
