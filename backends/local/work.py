"""Contexts on their way to scores: those of all requests under way go through a model together.

Figures do not depend on what is computed together (`backends.local.engine`), so that only the time does.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Sequence
from itertools import chain
from operator import attrgetter
from typing import NamedTuple

import numpy as np

from backends.local.blas import CHUNK, blas_threads, in_threads, one_blas_thread, shares_of
from backends.local.candidates import candidates_of, top_candidates
from backends.local.contexts import Asked
from backends.local.engine import AT_ONCE, log_softmax
from backends.local.gguf import FloatArray
from backends.local.jobs import Jobs
from backends.local.models import LocalModel
from backends.local.rows import Chunk
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


def _sized(units: Sequence[Unit[LocalModel]]) -> list[Unit[LocalModel]]:
    """The units with the rows that one side computes for each: from the end of the one before in its list of ids on.

    Those of a prompt that others share are counted with each.
    """
    ends: dict[int, int] = {}
    sized: list[Unit[LocalModel]] = []
    for unit in units:
        chunk = _chunk(unit.sides[0])
        own = id(unit.sides[0].asked[0].ids)
        sized.append(unit._replace(size=max(chunk.end - ends.get(own, 0), 1)))
        ends[own] = max(ends.get(own, 0), chunk.end)
    return sized


@functools.cache
def _jobs(process_id: int) -> Jobs[LocalModel]:
    return Jobs(_scores, size=attrgetter("size"), room=lambda unit: AT_ONCE * CHUNK * blas_threads())


def steps(groups: Sequence[Sequence[Prepared[LocalModel]]]) -> Iterator[Iterator[list[Score | ScoreFailure]]]:
    """For each group of requests its scores, step by step; all steps of a process are made in one thread."""
    return _jobs(os.getpid()).steps(*(_sized(units_of(prepared, start_of)) for prepared in groups))


def _scores(units: Sequence[Unit[LocalModel]]) -> list[list[Score]]:
    """By unit."""
    contexts = [
        _Context(unit, pair) for unit in units for pair in zip(*(side.asked for side in unit.sides), strict=True)
    ]
    hidden = [_hidden(units, at) for at in range(len(units[0].sides))]

    def of_share(share: Sequence[int]) -> list[list[Score]]:
        return _scores_of([contexts[at] for at in share], [rows[share] for rows in hidden])

    with one_blas_thread():
        shares = in_threads(of_share, shares_of(range(len(contexts)), blas_threads()))
    found = chain.from_iterable(shares)
    return [[score for _ in unit.sides[0].asked for score in next(found)] for unit in units]


class _Context(NamedTuple):
    """What one model is asked, or the two that are compared there."""

    unit: Unit[LocalModel]
    asked: tuple[Asked, ...]


def _hidden(units: Sequence[Unit[LocalModel]], at: int) -> FloatArray:
    """What the last layer of one side's model gives for its contexts, shape (n, width)."""
    sides = [unit.sides[at] for unit in units]
    outputs = sides[0].model.engine.hidden([_chunk(side) for side in sides])
    return np.concatenate(
        [
            rows[[asked.length - 1 - start_of(asked) for asked in side.asked]]
            for side, rows in zip(sides, outputs, strict=True)
        ]
    )


def _scores_of(contexts: Sequence[_Context], hidden: Sequence[FloatArray]) -> list[list[Score]]:
    """By context, from the rows of each side."""
    logits = [
        side.model.engine.logits(rows, [context.asked[at].length - 1 for context in contexts])
        for at, (side, rows) in enumerate(zip(contexts[0].unit.sides, hidden, strict=True))
    ]
    return [
        _of_context(context, [log_softmax(row) for row in rows])
        for context, rows in zip(contexts, zip(*logits, strict=True), strict=True)
    ]


def _of_context(context: _Context, logprobs: Sequence[FloatArray]) -> list[Score]:
    unit, pair = context
    exact: list[ExactPair | None] = [None]
    if len(logprobs) == 2 or unit.of_itself:
        figures = exact_pair(logprobs[0], logprobs[-1], pair[-1].key)
        exact = [figures] if len(pair) == 1 else [figures, figures.turned(pair[0].key)]
    return [_score(*one) for one in zip(unit.sides, pair, logprobs, exact, strict=True)]


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
