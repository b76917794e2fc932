"""What a listed token is known by: its id, or the bytes that it stands for.

Ids count where both sides give ids of one tokenizer and the texts prove it, else bytes, stated or those of a text that
is whole. An entry without either may be any token, also one that the other side names: it has no key.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, TypeGuard

from kl.estimators.token_bytes import BytesOf, Candidates
from kl.records import END_TOKENS, UNKNOWN_LOGPROB, Candidate

AlignKey = Literal["id", "bytes", "text"]
Key = int | bytes
KeyFunction = Callable[[Candidate], Key | None]

MAX_ID_MISMATCH = 0.01  # share of equal texts with different ids above which the tokenizers differ
END_KEY = b"\x00end"  # no token's bytes start with NUL and go on
_END_KEYS = frozenset(token.encode() for token in END_TOKENS)


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


def choose_key(
    lists_p: Sequence[Candidates], lists_q: Sequence[Candidates], bytes_p: BytesOf, bytes_q: BytesOf
) -> KeyChoice:
    """Decide what to match by, from all lists of a response or of a data set.

    Token ids count only when they are shown to come from one tokenizer: there are tokens that both sides list with the
    same text, and at most 1 % of them have different ids. ``text`` stands for the bytes of texts, where not every entry
    states its own.

    Parameters
    ----------
    lists_p, lists_q : sequences of candidate lists, one per position, as `listed` returns them
    bytes_p, bytes_q : from `kl.estimators.token_bytes.byte_functions`
    """
    sides = (lists_p, lists_q)
    has_ids = all(candidate.token_id is not None for side in sides for cands in side for candidate in cands)
    n_pairs, n_mismatches = _id_evidence(lists_p, lists_q, bytes_p, bytes_q) if has_ids else (0, 0)
    if n_pairs and n_mismatches <= MAX_ID_MISMATCH * n_pairs:
        return KeyChoice("id", n_pairs, n_mismatches)
    has_bytes = all(candidate.token_bytes is not None for side in sides for cands in side for candidate in cands)
    return KeyChoice("bytes" if has_bytes else "text", n_pairs, n_mismatches)


class IdEvidence(NamedTuple):
    """Tokens of one text that both sides list, and those of them whose ids differ."""

    n_pairs: int
    n_mismatches: int


def _id_evidence(
    lists_p: Sequence[Candidates], lists_q: Sequence[Candidates], bytes_p: BytesOf, bytes_q: BytesOf
) -> IdEvidence:
    found = [paired_texts(*lists, bytes_p, bytes_q) for lists in zip(lists_p, lists_q, strict=True)]
    n_pairs = sum(item.n_pairs for item in found)
    if n_pairs:
        return IdEvidence(n_pairs, sum(item.n_mismatches for item in found))
    # No text in common, yet ids in common: the ids number different vocabularies.
    n_other_text = sum(
        len(set(_clear_ids(cands_p, bytes_p).values()) & set(_clear_ids(cands_q, bytes_q).values()))
        for cands_p, cands_q in zip(lists_p, lists_q, strict=True)
    )
    return IdEvidence(n_other_text, n_other_text)


def paired_texts(cands_p: Candidates, cands_q: Candidates, bytes_p: BytesOf, bytes_q: BytesOf) -> IdEvidence:
    """What the texts of one position, whose entries all have ids, say of these."""
    ids_p, ids_q = _clear_ids(cands_p, bytes_p), _clear_ids(cands_q, bytes_q)
    shared = ids_p.keys() & ids_q.keys()
    return IdEvidence(len(shared), sum(ids_p[text] != ids_q[text] for text in shared))


def _clear_ids(candidates: Candidates, bytes_of: BytesOf) -> dict[bytes, int | None]:
    """Bytes → id of the candidates whose bytes name one token of the list."""
    known = [bytes_of(candidate) for candidate in candidates]
    ids = {key: candidate.token_id for key, candidate in zip(known, candidates, strict=True) if key is not None}
    if len(ids) < len(candidates):
        ids = {key: number for key, number in ids.items() if known.count(key) == 1}
    return ids


def id_key(candidate: Candidate) -> Key | None:
    """The key of a candidate whose id is of the tokenizer of both sides."""
    return candidate.token_id


def contradicted_ids(
    cands_p: Candidates, cands_q: Candidates, bytes_p: BytesOf, bytes_q: BytesOf
) -> frozenset[Key | None]:
    """Ids of one position that its texts speak against: one id for two texts, or two ids for one."""
    by_id_p = {candidate.token_id: candidate for candidate in cands_p}
    by_id_q = {candidate.token_id: candidate for candidate in cands_q}
    shared = by_id_p.keys() & by_id_q.keys()
    doubted: set[Key | None] = set()
    for number in shared:
        one, other = by_id_p[number], by_id_q[number]
        if one.token != other.token and (known := bytes_p(one)) is not None and bytes_q(other) not in (None, known):
            doubted.add(number)
    only_q = {bytes_q(candidate): number for number, candidate in by_id_q.items() if number not in shared}
    for number, candidate in by_id_p.items():
        if number not in shared and (known := bytes_p(candidate)) is not None and known in only_q:
            doubted |= {number, only_q[known]}
    return frozenset(doubted)


def known_ends(keys: Sequence[Key | None]) -> frozenset[Key]:
    """The keys that are known to end turns."""
    return frozenset[Key](_END_KEYS.intersection(key for key in keys if isinstance(key, bytes)))


def end_roles(keys_p: list[Key | None], keys_q: list[Key | None]) -> frozenset[Key]:
    """The end tokens of both lists, if each names its own: they mean the same, that the response is over."""
    ends_p, ends_q = known_ends(keys_p), known_ends(keys_q)
    return frozenset[Key](ends_p | ends_q) if ends_p and ends_q and not ends_p & ends_q else frozenset[Key]()


def role_key(key: Key | None, ends: frozenset[Key]) -> Key | None:
    """The key itself, or the one key of all end tokens that are matched by their role."""
    return END_KEY if key in ends else key
