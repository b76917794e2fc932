"""What a listed token is known by: its id, its bytes or its text.

Ids count where both sides give ids of one tokenizer, else bytes, else text. A text that does not name one token (empty,
or with U+FFFD for a part of a character) is no key.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, TypeGuard

from kl.records import END_TOKENS, UNKNOWN_LOGPROB, Candidate

AlignKey = Literal["id", "bytes", "text"]
Key = int | bytes | str
Candidates = Sequence[Candidate]
KeyFunction = Callable[[Candidate], Key | None]

MAX_ID_MISMATCH = 0.01  # share of equal texts with different ids above which the tokenizers differ
_END_KEY = "\x00end"  # no token text starts with NUL and goes on
_PIECES = str.maketrans({"▁": " ", "Ġ": " ", "Ċ": "\n"})
_END_KEYS = END_TOKENS | {token.translate(_PIECES) for token in END_TOKENS}  # as the text keys of either kind have them


class Listed(NamedTuple):
    """The usable part of a candidate list, by falling log-probability, and how many entries were left out."""

    candidates: tuple[Candidate, ...]
    n_dropped: int


def is_known(logprob: float | None) -> TypeGuard[float]:
    """Whether a reported log-probability is one; not if it is missing, NaN or a sentinel of -1000 or less."""
    return logprob is not None and logprob > UNKNOWN_LOGPROB


def logprob_of(candidate: Candidate) -> float:
    """The log-probability of a candidate that `listed` has kept."""
    assert candidate.logprob is not None
    return candidate.logprob


def listed(top: Candidates) -> Listed:
    """The part of a top-k list that can be relied on.

    Sentinels are left out. An entry without a log-probability ends the list: its probability may be anything below that
    of the entry before it, so that nothing after it bounds the tokens that are not listed.
    """
    kept: list[Candidate] = []
    for candidate in top:
        logprob = candidate.logprob
        if logprob is None or math.isnan(logprob):
            break
        if logprob > UNKNOWN_LOGPROB:
            kept.append(candidate)
    kept.sort(key=logprob_of, reverse=True)
    return Listed(tuple(kept), len(top) - len(kept))


class KeyChoice(NamedTuple):
    """What tokens are matched by, and the evidence.

    ``n_pairs`` counts tokens of one text that both sides list with an id, ``n_mismatches`` those whose ids differ.
    """

    key: AlignKey
    n_pairs: int
    n_mismatches: int


def shows_pieces(lists: Sequence[Candidates]) -> bool:
    """Whether a side writes raw tokenizer pieces (``▁the``, ``Ġthe``) in place of text (`` the``)."""
    starts = {candidate.token[:1] for candidates in lists for candidate in candidates}
    return " " not in starts and not starts.isdisjoint("▁Ġ")


def piece_text(token: str) -> str:
    """The text of a raw tokenizer piece."""
    return token.translate(_PIECES)


def choose_key(lists_p: Sequence[Candidates], lists_q: Sequence[Candidates]) -> KeyChoice:
    """Decide what to match by, from all lists of a response or of a data set.

    Token ids count only when they are shown to come from one tokenizer: among tokens that both sides list with the same
    text, at most 1 % have different ids.

    Parameters
    ----------
    lists_p, lists_q : sequences of candidate lists, one per position, as `listed` returns them
    """
    sides = (lists_p, lists_q)
    has_ids = all(candidate.token_id is not None for side in sides for cands in side for candidate in cands)
    n_pairs, n_mismatches = _id_evidence(lists_p, lists_q) if has_ids else (0, 0)
    if has_ids and n_mismatches <= MAX_ID_MISMATCH * n_pairs:
        return KeyChoice("id", n_pairs, n_mismatches)
    has_bytes = all(candidate.token_bytes is not None for side in sides for cands in side for candidate in cands)
    return KeyChoice("bytes" if has_bytes else "text", n_pairs, n_mismatches)


def _id_evidence(lists_p: Sequence[Candidates], lists_q: Sequence[Candidates]) -> tuple[int, int]:
    n_pairs = n_mismatches = n_other_text = 0
    text_p = piece_text if shows_pieces(lists_p) else str
    text_q = piece_text if shows_pieces(lists_q) else str
    for cands_p, cands_q in zip(lists_p, lists_q, strict=True):
        ids_p, ids_q = _clear_ids(cands_p, text_p), _clear_ids(cands_q, text_q)
        shared = ids_p.keys() & ids_q.keys()
        n_pairs += len(shared)
        n_mismatches += sum(ids_p[text] != ids_q[text] for text in shared)
        if not n_pairs:
            n_other_text += len(set(ids_p.values()) & set(ids_q.values()))
    # No text in common, yet ids in common: the ids number different vocabularies.
    return (n_pairs, n_mismatches) if n_pairs else (n_other_text, n_other_text)


def _clear_ids(candidates: Candidates, text: Callable[[str], str]) -> dict[str, int | None]:
    """Text → id of the candidates whose text names one token."""
    ids = {text(candidate.token): candidate.token_id for candidate in candidates if _is_clear(candidate.token)}
    if len(ids) < len(candidates):
        seen = [text(candidate.token) for candidate in candidates]
        ids = {token: number for token, number in ids.items() if seen.count(token) == 1}
    return ids


def _is_clear(token: str) -> bool:
    return token != "" and "\ufffd" not in token


def key_functions(
    key: AlignKey, lists_p: Sequence[Candidates], lists_q: Sequence[Candidates]
) -> tuple[KeyFunction, KeyFunction]:
    """How each side's candidates get their key; ``None`` where a candidate has none."""
    if key == "id":
        return _id_key, _id_key
    if key == "bytes":
        return _bytes_key, _bytes_key
    return _side_text_key(lists_p), _side_text_key(lists_q)


def _side_text_key(lists: Sequence[Candidates]) -> KeyFunction:
    return _piece_key if shows_pieces(lists) else _text_key


def _id_key(candidate: Candidate) -> Key | None:
    return candidate.token_id


def _bytes_key(candidate: Candidate) -> Key | None:
    return candidate.token_bytes or None


def _text_key(candidate: Candidate) -> Key | None:
    return candidate.token if _is_clear(candidate.token) else None


def _piece_key(candidate: Candidate) -> Key | None:
    return piece_text(candidate.token) if _is_clear(candidate.token) else None


def end_roles(keys_p: list[Key | None], keys_q: list[Key | None]) -> frozenset[Key]:
    """The end tokens of both lists, if each names its own: they mean the same, that the response is over."""
    ends_p = _END_KEYS.intersection(key for key in keys_p if isinstance(key, str))
    ends_q = _END_KEYS.intersection(key for key in keys_q if isinstance(key, str))
    return frozenset[Key](ends_p | ends_q) if ends_p and ends_q and not ends_p & ends_q else frozenset[Key]()


def role_key(key: Key | None, ends: frozenset[Key]) -> Key | None:
    """The key itself, or the one key of all end tokens that are matched by their role."""
    return _END_KEY if key in ends else key
