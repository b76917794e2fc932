"""Brings the text of a response and the texts of its tokens together.

Every prefix that Q is asked about is made of token texts, so these must add up to ``text`` exactly.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from kl.input.hidden import cut, prefix_gaps
from kl.input.problems import Notes, is_encodable, show
from kl.pieces import ESCAPES, REPLACEMENT, byte_level, escaped_bytes, is_special, own_bytes, sentence_piece
from kl.records import END_TOKENS, Candidate

_CONTEXT = 20  # characters shown of each side where two texts part
# How services say that the model itself ended its turn, or wrote what it was to stop at.
_STOPPED = frozenset(
    "stop end_turn end_of_turn eos eos_token eot eot_token stop_token stop_sequence stop_str end complete completed "
    "finished done natural".split()
)
_CUT = frozenset("length max_tokens max_output_tokens max_length model_length token_limit".split())


class Settled(NamedTuple):
    """The text of a response in its tokens.

    ``tokens``, joined, are ``text``; with ``has_stop`` the last one is the end of the turn, which need not be in it.
    Further tokens of the source are no part of the response. ``gaps`` are (position, reason) of the positions whose
    prefix no text says. ``pieces`` are the tokens' bytes where they were written as raw pieces.
    """

    text: str
    tokens: list[str]
    has_stop: bool
    gaps: tuple[tuple[int, str], ...]
    pieces: list[bytes] | None = None


class _Fit(NamedTuple):
    """Tokens that are the text, the repair that this is (kind, what), and what is not certain of them."""

    tokens: list[str]
    repairs: tuple[tuple[str, str], ...] = ()
    shown: frozenset[int] = frozenset()
    doubtful: frozenset[int] = frozenset()
    pieces: list[bytes] | None = None
    cuts: list[bytes] | None = None


_FROM_BYTES = ("text-from-bytes", "tokens split a character; their texts were made again from their bytes")
_STRIPPED = ("stripped-text", "`text` lacks white space that the tokens have; taken from the tokens")
_CUT_TEXT = ("cut-text", "`text` ends before the sequence that the response was stopped at; taken from the tokens")
_RAW = ("raw-pieces", "the tokens are raw pieces of a tokenizer; their texts were made from the bytes they stand for")
_HIDDEN = ("hidden-text", "tokens do not say their text; it was cut out of `text` between their neighbours")


def settle_text(text: str, sampled: Sequence[Candidate], finish_reason: str | None, notes: Notes) -> Settled | None:
    """Texts of the tokens to keep, which joined are what the model wrote; None where a defect was noted.

    Differences that have one explanation only are repaired: tokens that split a character, where all bytes are known
    or the text says what they hide; raw pieces of a tokenizer; one token beyond ``text`` that ends the turn; white
    space stripped from ``text``, or a stop sequence cut from it.
    """
    readings = list(_readings(sampled, finish_reason))
    plain = _is_plain(sampled)
    found = next(
        (
            (fit, n)
            for way in (_as_plain if plain else _as_written, _as_pieces, _as_hidden)
            for n in readings
            if (fit := way(text, sampled[:n])) is not None
        ),
        None,
    )
    if found is None and (fit := _stopped_within(text, sampled, finish_reason)) is not None:
        found = fit, len(sampled)
    if found is None:
        return _note_mismatch(text, [candidate.token for candidate in sampled], notes)
    fit, n = found
    for kind, what in fit.repairs:
        notes.repair(kind, what)
    tokens, joined = list(fit.tokens), "".join(fit.tokens)
    has_stop = n < len(sampled) or _ends_itself(sampled, tokens, finish_reason)
    if n < len(sampled):
        tokens.append(sampled[n].token)
    for position in range(n + 1, len(sampled)):
        notes.repair("end-token", "the token comes after the end of the turn; position dropped", position)
    if plain and fit.pieces is fit.cuts is None and "" not in tokens[:-1]:
        return Settled(joined, tokens, has_stop, ())  # every prefix is its tokens' texts
    said = sampled[:-1] if has_stop else sampled[:n]
    empty = {t for t, c in enumerate(said) if c.token == "" and own_bytes(c.token, c.token_bytes) is None}
    gaps = prefix_gaps(tokens, _known_bytes(fit, said), fit.shown, fit.doubtful, empty)
    return Settled(joined, tokens, has_stop, gaps, fit.pieces)


def _is_plain(sampled: Sequence[Candidate]) -> bool:
    """Whether no token has or hides other bytes than those of its text."""
    joined = "".join([candidate.token for candidate in sampled])
    if REPLACEMENT in joined or any(mark in joined for mark in ESCAPES) or not is_encodable(joined):
        return False
    return all(c.token_bytes is None or c.token_bytes == c.token.encode() for c in sampled)


def _known_bytes(fit: _Fit, said: Sequence[Candidate]) -> Sequence[bytes | None]:
    """What bytes the tokens of a text stand for, as far as these are known; ``<0xE2>`` may be what the model wrote."""
    return (
        fit.pieces
        or fit.cuts
        or [
            own_bytes(c.token, c.token_bytes) if token != c.token or escaped_bytes(token) is None else token.encode()
            for token, c in zip(fit.tokens, said, strict=False)
        ]
    )


def _readings(sampled: Sequence[Candidate], finish_reason: str | None) -> Iterator[int]:
    """How many of the tokens may be the text: all, or all before the end of the turn."""
    n = len(sampled)
    yield n
    reason = _reason(finish_reason)
    special = [candidate.token != "" and is_special(candidate.token) for candidate in sampled[-2:]]
    if sampled[-1].token in END_TOKENS or reason in _STOPPED or (reason not in _CUT and special[-1]):
        yield n - 1
    if special == [True, True]:
        yield n - 2


def was_cut(finish_reason: str | None) -> bool:
    """Whether a response ended because there was no room for more, so that it has no stop."""
    return _reason(finish_reason) in _CUT


def _reason(finish_reason: str | None) -> str:
    name = (finish_reason or "").lower().rsplit(".", 1)[-1]
    return name.removeprefix("finish_reason_").replace("-", "_").replace(" ", "_")


def _ends_itself(sampled: Sequence[Candidate], tokens: Sequence[str], finish_reason: str | None) -> bool:
    """Whether the last of the tokens that are the text ends the turn: it has no text, or the text shows its name."""
    last = sampled[-1]
    nameless = tokens[-1] == last.token == "" and own_bytes(last.token, last.token_bytes) is None
    return _reason(finish_reason) in _STOPPED and (nameless or last.token in END_TOKENS)


def _as_plain(text: str, sampled: Sequence[Candidate]) -> _Fit | None:
    return _fit(text, [candidate.token for candidate in sampled])


def _as_written(text: str, sampled: Sequence[Candidate]) -> _Fit | None:
    written = [candidate.token for candidate in sampled]
    exact = "".join(written) == text
    suspicious = not exact or REPLACEMENT in text or any(escaped_bytes(token) is not None for token in written)
    rebuilt = _from_bytes(sampled) if suspicious else None
    if exact and rebuilt is None:
        return _Fit(written)
    # Bytes first: where they are known and tell another story than the tokens' texts, these are the lossy ones.
    fit = None if rebuilt is None else _fit_rebuilt(text, written, rebuilt)
    if fit is not None:
        return fit._replace(repairs=(_FROM_BYTES, *fit.repairs))
    return _fit(text, written)


def _from_bytes(sampled: Sequence[Candidate]) -> list[str] | None:
    """Each token's text from its bytes, a character with the token that completes it; None where that adds nothing."""
    pieces = [own_bytes(candidate.token, candidate.token_bytes) for candidate in sampled]
    tokens = _decoded([piece for piece in pieces if piece is not None]) if None not in pieces else None
    return None if tokens == [candidate.token for candidate in sampled] else tokens


def _decoded(pieces: Sequence[bytes]) -> list[str] | None:
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        return [decoder.decode(piece) for piece in pieces]
    except UnicodeDecodeError:
        return None


def _fit_rebuilt(text: str, written: list[str], rebuilt: list[str]) -> _Fit | None:
    # A response that was cut inside a character may show the rest as U+FFFD, or leave it out.
    for wanted in dict.fromkeys((text, text.rstrip(REPLACEMENT))):
        fit = _fit(wanted, rebuilt)
        if fit is not None:
            return fit
    joined = "".join(rebuilt)
    is_lossy_copy = "".join(written) == text and REPLACEMENT not in joined
    lossy = (REPLACEMENT in token or escaped_bytes(token) is not None for token in written)
    whole_ones_agree = all(w == r or is_lossy for w, r, is_lossy in zip(written, rebuilt, lossy, strict=True))
    return _Fit(rebuilt) if is_lossy_copy and whole_ones_agree else None


def _fit(text: str, tokens: list[str]) -> _Fit | None:
    """The tokens, if they are ``text`` with at most white space around it."""
    joined = "".join(tokens)
    if joined == text:
        return _Fit(tokens)
    if joined.strip() == text.strip() and text in joined:
        return _Fit(tokens, (_STRIPPED,))
    return None


def _as_pieces(text: str, sampled: Sequence[Candidate]) -> _Fit | None:
    """The tokens as raw pieces of byte-level BPE or of SentencePiece, which begins every text with a blank."""
    written = [candidate.token for candidate in sampled]
    levels = [byte_level(token) for token in written]
    pieces = [sentence_piece(token) for token in written]
    readings = [(pieces, [pieces[0].removeprefix(b" "), *pieces[1:]]), (pieces, pieces)] if pieces else []
    if None not in levels:
        whole = [piece for piece in levels if piece is not None]
        readings.insert(0, (whole, whole))
    for pieces, shown in readings:
        tokens = _decoded(shown)
        fit = None if tokens is None or tokens == written else _fit(text, tokens)
        if fit is not None:
            return fit._replace(repairs=(_RAW, *fit.repairs), pieces=pieces)
    return None


def _as_hidden(text: str, sampled: Sequence[Candidate]) -> _Fit | None:
    pieces = [own_bytes(candidate.token, candidate.token_bytes) for candidate in sampled]
    found = cut(text, pieces) if None in pieces and REPLACEMENT not in text else None
    return None if found is None else _Fit(found.tokens, (_HIDDEN,), found.shown, found.doubtful, cuts=found.pieces)


def _stopped_within(text: str, sampled: Sequence[Candidate], finish_reason: str | None) -> _Fit | None:
    """All tokens, where ``text`` is what stood before a stop sequence that begins and ends within them."""
    if not text or _reason(finish_reason) not in _STOPPED:
        return None
    tokens = _from_bytes(sampled) or [candidate.token for candidate in sampled]
    return _Fit(tokens, (_CUT_TEXT,)) if "".join(tokens).startswith(text) else None


def _note_mismatch(text: str, tokens: list[str], notes: Notes) -> None:
    halved = next((position for position, token in enumerate(tokens) if not is_encodable(token)), None)
    if halved is not None:
        return notes.defect("lone-surrogate", f"the sampled token is {show(tokens[halved])}", halved)
    joined = "".join(tokens)
    at = next((i for i, (a, b) in enumerate(zip(text, joined, strict=False)) if a != b), min(len(text), len(joined)))
    end = position = 0
    for position, token in enumerate(tokens):  # noqa: B007 (the last one, where all tokens lie before the difference)
        end += len(token)
        if end > at:
            break
    sides = f"the tokens have {show(joined[at : at + _CONTEXT])}, `text` has {show(text[at : at + _CONTEXT])}"
    return notes.defect("text-mismatch", f"the tokens do not add up to `text`: at character {at} {sides}", position)
