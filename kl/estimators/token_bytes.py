"""The bytes that a listed token stands for, where its source says so for certain.

A source writes a token as text, as a raw piece of byte-level BPE (``Ġthe``), as a raw piece of SentencePiece (``▁the``)
or, a part of a character, as nothing that says which. All tokens of a side together show which way it is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Literal

from kl.pieces import REPLACEMENT, byte_level, escaped_bytes, is_whole, sentence_piece
from kl.records import Candidate

Writing = Literal["text", "byte-level", "sentence-piece", "unknown"]
Candidates = Sequence[Candidate]
BytesOf = Callable[[Candidate], bytes | None]

_ESCAPES = re.compile(r"(?:\\x[0-9A-Fa-f]{2})+")  # OpenAI shows a part of a character so, and states its bytes
_NUMBER = re.compile(r"token_id:\d+")  # vLLM, on request, in place of a text


def writing_of(lists: Sequence[Candidates]) -> Writing:
    """How a side writes its tokens; ``unknown`` where nothing shows it or the signs disagree."""
    tokens = {candidate.token for candidates in lists for candidate in candidates}
    if any(token[:1] == " " and not token.isspace() for token in tokens) or _states_parts(lists):
        return "text"
    pieces = [token for token in tokens if is_whole(token) and not _is_control(token)]
    starts = {token[0] for token in pieces}
    # Blanks alone may be an added token, which is written as it is; nothing else is, outside the 256 characters.
    is_other = any(byte_level(token) is None for token in pieces if token.strip(" "))
    if not starts.isdisjoint("ĠĊ"):
        return "unknown" if is_other else "byte-level"
    if "▁" in starts:
        return "sentence-piece"
    return "text" if is_other else "unknown"


def _states_parts(lists: Sequence[Candidates]) -> bool:
    """Whether a source knows the bytes of parts of characters: what it states is then no copy of what it shows."""
    stated = {candidate.token_bytes for candidates in lists for candidate in candidates if candidate.token_bytes}
    return any(is_part(token_bytes) for token_bytes in stated)


def is_part(token_bytes: bytes) -> bool:
    """Whether bytes are no text by themselves."""
    try:
        token_bytes.decode()
    except UnicodeDecodeError:
        return True
    return False


def _is_control(token: str) -> bool:
    """Whether a token looks like a control token, whose name is written as it is on all sides."""
    return len(token) > 2 and token[0] == "<" and token[-1] == ">"


def byte_functions(lists_p: Sequence[Candidates], lists_q: Sequence[Candidates]) -> tuple[BytesOf, BytesOf]:
    """How the bytes of each side's candidates are found; ``None`` where a candidate's are not certain."""
    written_p, written_q = writing_of(lists_p), writing_of(lists_q)
    hides_p, hides_q = _hides_parts(lists_p), _hides_parts(lists_q)
    read_p, read_q = _Reader(written_p, hides_p), _Reader(written_q, hides_q)
    known_p, known_q = _all_known(read_p, lists_p), _all_known(read_q, lists_q)
    cut_p, cut_q = _cut_texts(written_p, lists_p, known_q), _cut_texts(written_q, lists_q, known_p)
    read_p, read_q = _Reader(written_p, hides_p, cut_p), _Reader(written_q, hides_q, cut_q)
    if not (_shows_bytes(lists_p) or _shows_bytes(lists_q)):
        return read_p, read_q
    # In a vocabulary of longer parts, <0xF0> may be how a source cuts any of those that begin so.
    longer = any(len(known) > 1 and is_part(known) for known in known_p | known_q)
    if longer or "byte-level" in (written_p, written_q):
        return read_p, read_q
    single_p, single_q = _single_bytes(written_p, known_p), _single_bytes(written_q, known_q)
    return _Reader(written_p, hides_p, cut_p, single_p), _Reader(written_q, hides_q, cut_q, single_q)


def plain_reader(*, hides: bool, is_text: bool = True) -> BytesOf:
    """`byte_functions` of a side that writes texts, or nothing shows how, and of which the other names no cut one."""
    return _Reader("text" if is_text else "unknown", hides)


def _cut_texts(writing: Writing, lists: Sequence[Candidates], others: set[bytes]) -> frozenset[str]:
    """What a side that shows no parts of characters may show of tokens that the other side names by their bytes.

    A blank with the first byte of a character would be a blank, as it is where the two sides are one model.
    """
    if writing in ("byte-level", "sentence-piece") or _shows_parts(lists):
        return frozenset()
    return frozenset(known.decode("utf-8", "ignore") for known in others if is_part(known))


def _shows_parts(lists: Sequence[Candidates]) -> bool:
    tokens = {candidate.token for candidates in lists for candidate in candidates}
    shown = (REPLACEMENT in token or escaped_bytes(token) or _ESCAPES.fullmatch(token) for token in tokens)
    return any(shown) or _states_parts(lists)


def _hides_parts(lists: Sequence[Candidates]) -> bool:
    """Whether a side leaves parts of characters out of what it shows."""
    return any(candidate.token == "" and not candidate.token_bytes for candidates in lists for candidate in candidates)


def _shows_bytes(lists: Sequence[Candidates]) -> bool:
    return any(candidate.token.startswith("<0x") for candidates in lists for candidate in candidates)


def _all_known(read: BytesOf, lists: Sequence[Candidates]) -> set[bytes]:
    return {known for candidates in lists for known in map(read, candidates) if known is not None}


def _single_bytes(writing: Writing, known: set[bytes]) -> frozenset[bytes]:
    """The bytes that ``<0xHH>`` names: those that are no character, and others that no piece of the side stands for."""
    least = 0 if writing == "sentence-piece" else 0x80
    return frozenset(bytes([value]) for value in range(least, 256)) - known


class _Reader:
    """The bytes of one side's candidates, each kind of candidate looked at once."""

    def __init__(
        self,
        writing: Writing,
        hides: bool,
        cut: frozenset[str] = frozenset(),
        single: frozenset[bytes] = frozenset(),
    ) -> None:
        self._writing = writing
        self._hides = hides
        self._cut = cut
        self._single = single
        self._known: dict[tuple[str, bytes | None], bytes | None] = {}

    def __call__(self, candidate: Candidate) -> bytes | None:
        entry = candidate.token, candidate.token_bytes
        if entry not in self._known:
            self._known[entry] = self._read(*entry)
        return self._known[entry]

    def _read(self, token: str, stated: bytes | None) -> bytes | None:
        if token in self._cut or (self._hides and not token.strip(" ")):
            return None  # a blank with the first byte of a character is shown, and stated, as a blank
        known = _bytes_of(self._writing, token, stated or None)
        if token.startswith("<0x") and (not stated or stated == _named(token)) and known == escaped_bytes(token):
            return known if known in self._single else None
        return known


# Responses hold the same tokens again and again.
@lru_cache(maxsize=1 << 16)
def _bytes_of(writing: Writing, token: str, stated: bytes | None) -> bytes | None:
    """The bytes of a token of a side that writes so, each ``<0xHH>`` taken for one byte."""
    if stated and stated != _named(token):
        return stated if _agree(token, stated) else None
    if not is_whole(token) or _ESCAPES.fullmatch(token) or _NUMBER.fullmatch(token):
        return None
    escaped = escaped_bytes(token)
    if escaped is not None:
        return escaped
    if writing == "byte-level":
        return byte_level(token) or _named(token)
    if writing == "text" or token.isascii() or _is_control(token):
        return _named(token)
    if writing == "sentence-piece":
        return sentence_piece(token)
    return None if "▁" in token or byte_level(token) is not None else _named(token)


def _named(token: str) -> bytes:
    return token.encode("utf-8", "surrogatepass")


def _agree(token: str, stated: bytes) -> bool:
    """Whether stated bytes can be those of the token that is shown in another form, or in part."""
    if REPLACEMENT.encode() in stated:
        return False
    if REPLACEMENT in token:
        parts = re.split(f"{REPLACEMENT}+", token)
        return re.fullmatch(b"[\x80-\xff]+".join(re.escape(_named(part)) for part in parts), stated) is not None
    if stated in (byte_level(token), sentence_piece(token), escaped_bytes(token)):
        return True
    if token.startswith("<0x") and escaped_bytes(token) is not None:
        return stated[:1] == escaped_bytes(token)
    if _ESCAPES.fullmatch(token):
        return stated == bytes.fromhex(token.replace("\\x", ""))
    # A text may leave out the parts of characters, or hold the whole character that this token completes.
    return stated.decode("utf-8", "ignore") == token or (is_part(stated) and _named(token).endswith(stated))
