"""Exact KL per position, from the vocabularies of both models that are on disk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from backends.base import ScoreRequest
from backends.scores.store import ScoreStore
from flows.folder.answers import FileAnswers
from kl.estimators.align import align
from kl.estimators.divergence import PADDING_MASS, exact_kl_of_padded
from kl.estimators.token_keys import listed, logprob_of
from kl.input.logprobs import is_same_token
from kl.records import Response, Score, ScoreFailure

Answer = Score | ScoreFailure | None

# Full vocabularies are compared so many positions at a time: two float32 arrays of this many rows are in memory.
_FULL_CHUNK = 64
# How far a value that P gives now may be from the one on record before another model must have written it.
_SAME_MODEL_NATS = 0.01
# Of the values compared, the share that may be wrong numbers in the file.
_WRONG_VALUES = 0.1


class Exact(NamedTuple):
    """Exact KL per position, shape (T,), NaN where it is not known; how many tokens P has, if they were all seen."""

    kl: NDArray[np.float64] | None
    vocabulary: int | None


def exact_kl(
    response: Response,
    found: FileAnswers,
    scores: ScoreStore,
    note: Callable[[Response, Sequence[int], str], None],
) -> Exact:
    """What full vocabularies say; of answered positions of which they say nothing, ``note`` is told which and why."""
    values = np.full(len(response.positions), np.nan)
    vocabulary = None
    request_p, request_q = found.request(response, "p"), found.request(response, "q")
    assert request_q is not None, "Q always has a name"
    keys_q = dict(zip(request_q.positions, request_q.keys, strict=True))
    answered = [position for position in keys_q if isinstance(found.get(keys_q[position]), Score)]
    other = None if request_p is None else _other_writer(response, request_p, found)
    if request_p is None or other is not None:
        note(response, answered, other or "the file names no model that this backend has")
        return Exact(values, None)
    keys_p = dict(zip(request_p.positions, request_p.keys, strict=True))
    numbering = _numbering([(found.get(keys_p.get(t, "")), found.get(keys_q[t])) for t in answered])
    prompt_id = response.prompt.prompt_id
    for start in range(0, len(answered), _FULL_CHUNK):
        chunk = answered[start : start + _FULL_CHUNK]
        full_p = scores.load_full(prompt_id, [keys_p[position] for position in chunk if position in keys_p])
        full_q = scores.load_full(prompt_id, [keys_q[position] for position in chunk])
        for position in chunk:
            row_p, row_q = full_p.get(keys_p.get(position, "")), full_q.get(keys_q[position])
            why = _no_exact_value(row_p, row_q, numbering)
            if why is None and row_p is not None and row_q is not None:
                vocabulary = len(row_p)
                values[position] = exact_kl_of_padded(row_p[None, :], row_q[None, :])[0]
                why = _OTHER_VOCABULARY.format(len(row_p), len(row_q)) if np.isnan(values[position]) else None
            if why is not None:
                note(response, [position], why)
    return Exact(values, vocabulary)


_OTHER_VOCABULARY = (
    f"P has {{}} tokens and Q {{}}, and those that one has alone hold more than {PADDING_MASS:g} of its probability"
)


def _no_exact_value(
    row_p: NDArray[np.float32] | None, row_q: NDArray[np.float32] | None, numbering: Literal["one", "two"] | None
) -> str | None:
    """Why two vocabularies of a position are not compared, if they are not."""
    if row_p is None or row_q is None:
        return f"the whole vocabulary of {'P' if row_p is None else 'Q'} is not there"
    if numbering == "two":
        return "the ids of the two vocabularies name different tokens"
    if row_p.shape != row_q.shape and numbering is None:
        return f"P has {len(row_p)} tokens and Q {len(row_q)}, and no ids show that their first ones are the same"
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


def _other_writer(response: Response, request: ScoreRequest, found: FileAnswers) -> str | None:
    """Why the model that the file names may not have written the response; None if it gives the values on record.

    Single values that differ are wrong numbers of the file; those of another model differ everywhere.
    """
    n_alike = n_other = 0
    for position, key in zip(request.positions, request.keys, strict=True):
        score = found.get(key)
        for candidate in response.positions[position].top[:3] if isinstance(score, Score) else ():
            again = next(
                (other for other in score.top if other.logprob is not None and is_same_token(candidate, other)), None
            )
            alike = again is not None and abs(logprob_of(candidate) - logprob_of(again)) <= _SAME_MODEL_NATS
            n_alike, n_other = n_alike + alike, n_other + (not alike)
    if n_other > _WRONG_VALUES * (n_alike + n_other):
        values = "gives other values than those on record"
        return f"{request.model} {values if n_alike else values + ', or the file writes tokens in another way'}"
    return None
