"""Exact divergences per position, from what is on disk of both models' vocabularies: figures, or all their values."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np

from backends.base import ScoreRequest
from backends.scores.store import ScoreStore
from flows.folder.answers import StoredAnswers
from kl.estimators.align import align
from kl.estimators.divergence import PADDING_MASS, ExactDivergences, exact_pair
from kl.estimators.token_keys import listed, logprob_of
from kl.input.logprobs import is_same_token
from kl.records import ExactPair, Response, Score, ScoreFailure

Answer = Score | ScoreFailure | None

# Full vocabularies are compared so many positions at a time: two float32 arrays of this many rows are in memory.
_FULL_CHUNK = 64
# How far a value that P gives now may be from the one on record before another model must have written it.
_SAME_MODEL_NATS = 0.01
# Of the values compared, the share that may be wrong numbers in the file.
_WRONG_VALUES = 0.1


class Exact(NamedTuple):
    """Exact divergences per position, shape (T,), NaN where not known; how many tokens P has, if they were all seen."""

    divergences: ExactDivergences | None
    vocabulary: int | None


def exact_divergences(
    response: Response,
    stored: StoredAnswers,
    scores: ScoreStore,
    note: Callable[[Response, Sequence[int], str], None],
) -> Exact:
    """What full vocabularies say; of answered positions of which they say nothing, ``note`` is told which and why."""
    values = np.full((4, len(response.positions)), np.nan)
    vocabulary = None
    request_p, request_q = stored.requests[response.name, "p"], stored.requests[response.name, "q"]
    assert request_q is not None, "Q always has a name"
    keys_q = dict(zip(request_q.positions, request_q.keys, strict=True))
    answered = [position for position in keys_q if isinstance(stored.get(keys_q[position]), Score)]
    other = None if request_p is None else _other_writer(response, request_p, stored)
    if request_p is None or other is not None:
        note(response, answered, other or "the file names no model that this backend has")
        return Exact(ExactDivergences(*values), None)
    keys_p = dict(zip(request_p.positions, request_p.keys, strict=True))
    numbering = _numbering([(stored.get(keys_p.get(t, "")), stored.get(keys_q[t])) for t in answered])
    pairs = {position: (keys_p.get(position, ""), keys_q[position]) for position in answered}
    for position, compared in _compared(pairs, scores, response.prompt.prompt_id):
        why = compared if isinstance(compared, str) else _no_exact_value(compared, numbering)
        if not isinstance(compared, str) and why is None:
            vocabulary = compared.vocabulary
            values[:, position] = compared.kl, compared.reverse_kl, compared.js, compared.tv
            if np.isnan(compared.kl):
                why = _OTHER_VOCABULARY.format(compared.vocabulary, compared.vocabulary_versus)
        if why is not None:
            note(response, [position], why)
    return Exact(ExactDivergences(*values), vocabulary)


_OTHER_VOCABULARY = (
    f"P has {{}} tokens and Q {{}}, and those that one has alone hold more than {PADDING_MASS:g} of its probability"
)


def _compared(
    pairs: Mapping[int, tuple[str, str]], scores: ScoreStore, prompt_id: str
) -> Iterator[tuple[int, ExactPair | str]]:
    """What the vocabularies behind P's and Q's key at each position say of P from Q, or which of them is not there."""
    known = scores.load_exact(prompt_id, {key for pair in pairs.values() for key in pair})
    rest: list[int] = []
    for position, (key_p, key_q) in pairs.items():
        if (key_p, key_q) in known:
            yield position, known[key_p, key_q]
        elif (key_q, key_p) in known:
            yield position, known[key_q, key_p].turned(key_q)
        else:
            rest.append(position)
    for start in range(0, len(rest), _FULL_CHUNK):
        some = rest[start : start + _FULL_CHUNK]
        full = scores.load_full(prompt_id, [key for position in some for key in pairs[position] if key])
        for position in some:
            key_p, key_q = pairs[position]
            missing = next((side for side, key in (("P", key_p), ("Q", key_q)) if key not in full), None)
            if missing is not None:
                yield position, f"the whole vocabulary of {missing} is not there"
            else:
                yield position, exact_pair(full[key_p], full[key_q], key_q)


def _no_exact_value(compared: ExactPair, numbering: Literal["one", "two"] | None) -> str | None:
    """Why two vocabularies of a position are not comparable, if they are not."""
    if numbering == "two":
        return "the ids of the two vocabularies name different tokens"
    n_p, n_q = compared.vocabulary, compared.vocabulary_versus
    if n_p != n_q and numbering is None:
        return f"P has {n_p} tokens and Q {n_q}, and no ids show that their first ones are the same"
    return None


def _numbering(answers: Sequence[tuple[Answer, Answer]]) -> Literal["one", "two"] | None:
    """Whether P's and Q's ids number one vocabulary; None where their lists do not show it."""
    pairs = [(listed(p.top).candidates, listed(q.top).candidates) for p, q in answers
             if isinstance(p, Score) and isinstance(q, Score)]  # fmt: skip
    usable = [(top_p, top_q) for top_p, top_q in pairs if top_p and top_q]
    if not usable:
        return None
    choice = align([top_p for top_p, _ in usable], [top_q for _, top_q in usable]).choice
    if choice.key == "id":
        return "one"
    return "two" if choice.n_mismatches else None


def _other_writer(response: Response, request: ScoreRequest, stored: StoredAnswers) -> str | None:
    """Why the model that the file names may not have written the response; None if it gives the values on record.

    Single values that differ are wrong numbers of the file; those of another model differ everywhere.
    """
    n_alike = n_other = 0
    for position, key in zip(request.positions, request.keys, strict=True):
        score = stored.get(key)
        if not isinstance(score, Score):
            continue
        for candidate in response.positions[position].top[:3]:
            again = next(
                (other for other in score.top if other.logprob is not None and is_same_token(candidate, other)), None
            )
            alike = again is not None and abs(logprob_of(candidate) - logprob_of(again)) <= _SAME_MODEL_NATS
            n_alike, n_other = n_alike + alike, n_other + (not alike)
    if n_other > _WRONG_VALUES * (n_alike + n_other):
        values = "gives other values than those on record"
        return f"{request.model} {values if n_alike else values + ', or the file writes tokens in another way'}"
    return None
