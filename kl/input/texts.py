"""Brings the text of a response and the texts of its tokens together.

Every prefix that Q is asked about is made of token texts, so these must add up to ``text`` exactly.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from kl.input.problems import Notes, is_encodable, show
from kl.records import END_TOKENS, Candidate, Response

_REPLACEMENT = "\ufffd"
_CONTEXT = 20  # characters shown of each side where two texts part


class _Fit(NamedTuple):
    tokens: list[str]
    is_stripped: bool


def settle_text(text: str, sampled: Sequence[Candidate], notes: Notes) -> list[str] | None:
    """Texts of the tokens to keep, which joined are what the model wrote; None where a defect was noted.

    Three differences have one explanation only and are repaired: tokens that split a character, where all bytes are
    known; one token beyond ``text`` that ends the turn (its position is dropped); white space stripped from ``text``.
    """
    written = [candidate.token for candidate in sampled]
    exact = "".join(written) == text
    rebuilt = _from_bytes(sampled) if not exact or _REPLACEMENT in text else None
    if exact and rebuilt is None:
        return _checked(written, notes)
    # Bytes first: where they are known and tell another story than the tokens' texts, these are the lossy ones.
    fit = None if rebuilt is None else _fit_rebuilt(text, written, rebuilt)
    if fit is not None:
        notes.repair("text-from-bytes", "tokens split a character; their texts were made again from their bytes")
    else:
        fit = _fit(text, written)
    if fit is None:
        return _note_mismatch(text, written, notes)
    _note_fit(fit, len(written), notes)
    return _checked(fit.tokens, notes)


def _from_bytes(sampled: Sequence[Candidate]) -> list[str] | None:
    """Each token's text from its bytes, a character with the token that completes it; None where that adds nothing."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    tokens: list[str] = []
    for candidate in sampled:
        if candidate.token_bytes is None:
            return None
        try:
            tokens.append(decoder.decode(candidate.token_bytes))
        except UnicodeDecodeError:
            return None
    return None if tokens == [candidate.token for candidate in sampled] else tokens


def _fit_rebuilt(text: str, written: list[str], rebuilt: list[str]) -> _Fit | None:
    # A response that was cut inside a character may show the rest as U+FFFD, or leave it out.
    for wanted in dict.fromkeys((text, text.rstrip(_REPLACEMENT))):
        fit = _fit(wanted, rebuilt)
        if fit is not None:
            return fit
    joined = "".join(rebuilt)
    is_lossy_copy = "".join(written) == text and _REPLACEMENT not in joined
    whole_ones_agree = all(w == r for w, r in zip(written, rebuilt, strict=True) if _REPLACEMENT not in w)
    return _Fit(rebuilt, is_stripped=False) if is_lossy_copy and whole_ones_agree else None


def _fit(text: str, tokens: list[str]) -> _Fit | None:
    """The tokens, or all but an end token, if they are ``text`` with at most white space around it."""
    kept = tokens
    while True:
        joined = "".join(kept)
        if joined == text:
            return _Fit(kept, is_stripped=False)
        if joined.strip() == text.strip() and text in joined:
            return _Fit(kept, is_stripped=True)
        if len(kept) < len(tokens) or not kept or kept[-1] not in END_TOKENS:
            return None
        kept = tokens[:-1]


def _note_fit(fit: _Fit, n_written: int, notes: Notes) -> None:
    if len(fit.tokens) < n_written:
        position = n_written - 1
        notes.repair("end-token", "the token ends the turn and is not part of `text`; position dropped", position)
    if fit.is_stripped:
        notes.repair("stripped-text", "`text` lacks white space that the tokens have; taken from the tokens")


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


def _checked(tokens: list[str], notes: Notes) -> list[str] | None:
    if not tokens:
        return notes.defect("empty-response", "the response has no token but the one that ends the turn")
    return tokens


def positions_inside_a_character(response: Response) -> tuple[int, ...]:
    """Positions whose prefix ends inside a character, so that no text can say it.

    Q asked with ``text[:prefix_ends[t]]`` would continue another prefix than P did; only token ids can ask there. Known
    where the bytes of all tokens before the position are stated.
    """
    return tuple(_inside(position.sampled.token_bytes for position in response.positions))


def _inside(token_bytes: Iterable[bytes | None]) -> list[int]:
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    inside: list[int] = []
    for position, piece in enumerate(token_bytes):
        if decoder.getstate()[0]:
            inside.append(position)
        if piece is None:
            break
        decoder.decode(piece)
    return inside
