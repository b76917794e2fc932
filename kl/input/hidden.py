"""Tokens whose source does not say their text: what the text of the response tells of them.

Every prefix that Q is asked about as text must be what P wrote. Where tokens before a position hide theirs, the text
around them may still say it in exactly one way.
"""

from __future__ import annotations

import codecs
from collections.abc import Collection, Sequence
from itertools import pairwise
from typing import NamedTuple

from kl.pieces import REPLACEMENT

PARTIAL = "partial-character"
UNKNOWN = "unknown-prefix"
_CONTINUING = bytes(range(0x80, 0xC0))  # no character begins with one of these


class Cut(NamedTuple):
    """A text cut into tokens, some of which hide theirs.

    ``tokens`` joined are the text, ``pieces`` its bytes. A run of hidden tokens has its text at the last one. ``shown``
    are the hidden tokens that end where the text says for certain that their run wrote something; ``doubtful`` the
    positions whose prefix may end in several places.
    """

    tokens: list[str]
    pieces: list[bytes]
    shown: frozenset[int]
    doubtful: frozenset[int]


class _Run(NamedTuple):
    """Neighbours ``first`` to ``last`` (exclusive) that are all known, with their bytes, or all hidden (None)."""

    first: int
    last: int
    known: bytes | None


def cut(text: str, pieces: Sequence[bytes | None]) -> Cut | None:
    """Place tokens of known bytes in a text, with room for the hidden ones (None) between them; None if none fits.

    Known runs are placed as far left as they go, and as far right; where both places are one there is no other.
    """
    whole = text.encode()
    runs = _runs(pieces)
    left, right = _leftmost(whole, runs), _rightmost(whole, runs)
    if left is None or right is None:
        return None
    ends: list[int] = []
    shown: set[int] = set()
    doubtful: set[int] = set()
    for at, run in enumerate(runs):
        if run.known is None:
            before = right[at - 1] + len(runs[at - 1].known or b"") if at else 0
            after = left[at + 1] if at + 1 < len(runs) else len(whole)
            start = left[at - 1] + len(runs[at - 1].known or b"") if at else 0
            ends += [start] * (run.last - run.first - 1) + [after]
            if before < after:
                shown.add(run.last - 1)
            elif start < after:  # or it wrote nothing, and is not in the text
                doubtful |= set(range(run.first + 1, len(pieces)))
            if at and left[at - 1] != right[at - 1]:
                doubtful.add(run.first)
        else:
            lengths = (len(piece or b"") for piece in pieces[run.first : run.last])
            for length in lengths:
                ends.append((left[at] if len(ends) == run.first else ends[-1]) + length)
            doubtful |= set(range(run.first, run.last)) if left[at] != right[at] else set()
    decoder = codecs.getincrementaldecoder("utf-8")()
    parts = [whole[start:end] for start, end in pairwise([0, *ends])]
    return Cut([decoder.decode(part) for part in parts], parts, frozenset(shown), frozenset(doubtful))


def _runs(pieces: Sequence[bytes | None]) -> list[_Run]:
    runs: list[_Run] = []
    for at, piece in enumerate(pieces):
        if runs and (runs[-1].known is None) == (piece is None):
            known = None if piece is None else (runs[-1].known or b"") + piece
            runs[-1] = _Run(runs[-1].first, at + 1, known)
        else:
            runs.append(_Run(at, at + 1, piece))
    return runs


def _leftmost(whole: bytes, runs: Sequence[_Run]) -> dict[int, int] | None:
    """Where each known run begins if all are as far left as they go; the last one ends the text if nothing follows."""
    starts: dict[int, int] = {}
    end = 0
    for at, run in enumerate(runs):
        if run.known is None:
            continue
        if at == len(runs) - 1:
            start = len(whole) - len(run.known)
            found = start >= end and (at > 0 or start == 0) and whole.endswith(run.known)
        else:
            start = whole.find(run.known, end) if at else 0
            found = start >= 0 and whole.startswith(run.known, start)
        if not found:
            return None
        starts[at], end = start, start + len(run.known)
    return starts


def _rightmost(whole: bytes, runs: Sequence[_Run]) -> dict[int, int] | None:
    starts: dict[int, int] = {}
    end = len(whole)
    for at, run in reversed(list(enumerate(runs))):
        if run.known is None:
            continue
        last = at == len(runs) - 1
        start = 0 if at == 0 else end - len(run.known) if last else whole.rfind(run.known, 0, end)
        if start < 0 or start + len(run.known) > end:
            return None
        starts[at] = end = start
    return starts


def prefix_gaps(
    tokens: Sequence[str],
    pieces: Sequence[bytes | None],
    shown: Collection[int] = (),
    doubtful: Collection[int] = (),
    empty: Collection[int] = (),
) -> tuple[tuple[int, str], ...]:
    """(position, reason) of each position whose prefix the tokens before it do not say as text.

    ``pieces`` are the tokens' bytes where they are known, which show a prefix that ends inside a character (`PARTIAL`)
    whatever the texts look like. A token without text is a part of the character that a later one completes, if that
    character has bytes enough for all of them: between them the prefix ends inside it, after it the text is whole
    again. Any other token without text is not in the text at all, so that nothing after it can be said (`UNKNOWN`).

    A source that leaves parts of characters out (``empty`` are its tokens without text and bytes) may leave out the end
    of a token, too, such as of a blank with the first byte of what follows: where the bytes of the character do not
    account for all of the tokens that show nothing, the prefix before these is not certain either.
    """
    gaps: dict[int, str] = _inside_characters(pieces[: len(tokens)]) | _after_cut_tokens(tokens, empty)
    waiting = 0  # tokens without text since the last whole prefix
    lost = False
    for position, token in enumerate(tokens):
        if lost or position in doubtful:
            gaps[position] = UNKNOWN
        elif waiting:
            gaps.setdefault(position, PARTIAL)
        if REPLACEMENT in token:
            lost = True
        elif not token:
            waiting += 1
        elif waiting:
            lost = lost or not (position in shown or len(token[0].encode()) > waiting)
            if lost or (position in shown and len(token) > 1):
                gaps |= dict.fromkeys(range(position - waiting + 1, position + 1), UNKNOWN)
            waiting = 0
    return tuple(sorted(gap for gap in gaps.items() if gap[0] < len(tokens)))


def _inside_characters(pieces: Sequence[bytes | None]) -> dict[int, str]:
    """The positions before which bytes of a character are missing, or after which no text has the bytes."""
    gaps: dict[int, str] = {}
    unfinished = b""
    for position, piece in enumerate(pieces):
        if unfinished or (piece is not None and piece.lstrip(_CONTINUING) != piece):
            gaps[position] = PARTIAL
        if piece is None:
            unfinished = b""
            continue
        rest = _unfinished(unfinished + piece)
        if rest is None and piece.startswith(unfinished):  # begun by a hidden token, or stated with what began it
            rest = _unfinished(piece.lstrip(_CONTINUING))
        if rest is None:
            return gaps | dict.fromkeys(range(position + 1, len(pieces) + 1), UNKNOWN)
        unfinished = rest
    return gaps | ({len(pieces): PARTIAL} if unfinished else {})


def _unfinished(data: bytes) -> bytes | None:
    """The bytes of a character that the data end inside of; None if they are not UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        decoder.decode(data)
    except UnicodeDecodeError:
        return None
    return decoder.getstate()[0]


def _after_cut_tokens(tokens: Sequence[str], empty: Collection[int]) -> dict[int, str]:
    gaps: dict[int, str] = {}
    for position in range(1, len(tokens)) if empty else ():
        begins = position in empty and position - 1 not in empty
        if begins:
            whole = next((at for at in range(position, len(tokens)) if tokens[at]), None)
            bare = whole is not None and len(tokens[whole][0].encode()) == whole - position + 1
            if not bare and whole is not None:
                gaps[position] = UNKNOWN
        elif tokens[position - 1].isspace() and not tokens[position][:1].isascii():
            gaps[position] = UNKNOWN
    return gaps
