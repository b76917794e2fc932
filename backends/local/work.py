"""Chunks of contexts on their way to scores: those of all requests under way go through a model together.

Figures do not depend on what is computed together (`backends.local.engine`), so that only the time does.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Sequence
from operator import attrgetter

from backends.local.candidates import candidates_of, top_candidates
from backends.local.contexts import Asked
from backends.local.engine import (
    AT_ONCE,
    CHUNK,
    Chunk,
    blas_threads,
    in_threads,
    log_softmax,
    one_blas_thread,
    shares_of,
)
from backends.local.gguf import FloatArray
from backends.local.jobs import Jobs
from backends.local.models import LocalModel
from backends.local.units import Prepared, Side, Unit, units_of
from kl.estimators.divergence import exact_pair
from kl.records import ExactPair, Score, ScoreFailure


def start_of(asked: Asked) -> int:
    """The first row of the chunk that a context's last token is in."""
    return (asked.length - 1) // CHUNK * CHUNK


def _chunk(side: Side[LocalModel]) -> Chunk:
    """Of the longest context: the others are beginnings of it, up to the chunk's start at least."""
    longest = max(side.asked, key=attrgetter("length"))
    return Chunk(longest.ids[: longest.length], start_of(longest))


@functools.cache
def _jobs(process_id: int) -> Jobs[LocalModel]:
    return Jobs(_scores, size=lambda unit: 1, room=lambda unit: AT_ONCE * blas_threads())


def steps(prepared: Sequence[Prepared[LocalModel]]) -> Iterator[list[Score | ScoreFailure]]:
    """The scores of some requests, step by step; all steps of a process are made in one thread."""
    for job in _jobs(os.getpid()).steps(units_of(prepared, start_of)):
        yield from job


def _scores(units: Sequence[Unit[LocalModel]]) -> list[list[Score]]:
    by_side = [
        model.engine.hidden([_chunk(unit.sides[at]) for unit in units]) for at, model in enumerate(units[0].models)
    ]
    work = list(zip(units, zip(*by_side, strict=True), strict=True))
    shares = shares_of(work, blas_threads())
    with one_blas_thread():
        found = in_threads(lambda share: [_scores_of(unit, hidden) for unit, hidden in share], shares)
    return [scores for share in found for scores in share]


def _scores_of(unit: Unit[LocalModel], hidden: Sequence[FloatArray]) -> list[Score]:
    logits = [side.model.engine.logits(rows) for side, rows in zip(unit.sides, hidden, strict=True)]
    scores: list[Score] = []
    for pair in zip(*(side.asked for side in unit.sides), strict=True):
        logprobs = [
            log_softmax(rows[asked.length - 1 - start_of(asked)]) for rows, asked in zip(logits, pair, strict=True)
        ]
        exact: list[ExactPair | None] = [None]
        if len(logprobs) == 2 or unit.of_itself:
            figures = exact_pair(logprobs[0], logprobs[-1], pair[-1].key)
            exact = [figures] if len(pair) == 1 else [figures, figures.turned(pair[0].key)]
        scores += [_score(*one) for one in zip(unit.sides, pair, logprobs, exact, strict=True)]
    return scores


def _score(side: Side[LocalModel], asked: Asked, logprobs: FloatArray, exact: ExactPair | None) -> Score:
    request, model = side.request, side.model
    top = top_candidates(logprobs, request.top_logprobs, model.tokenizer)
    return Score(
        key=asked.key,
        top=top,
        model_version=model.source.version,
        input_tokens=asked.length,
        output_tokens=1,
        full_logprobs=logprobs if request.full_vocabulary and not request.counterparts else None,
        exact=exact,
        wanted=candidates_of(asked.wanted, top, logprobs, model.tokenizer),
    )
