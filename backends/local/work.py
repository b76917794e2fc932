"""Chunks of contexts on their way to scores: those of all requests under way go through a model together.

Each request that is scored is a `Job`, a list of units in order. Whoever asks for its job's next results has a step
made: the first units of that job and of the others that wait for the same models. Figures do not depend on what is
computed together (`backends.local.engine`), so that only the time does.
"""

from __future__ import annotations

import functools
import os
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import islice, takewhile
from operator import attrgetter
from typing import NamedTuple

from backends.base import ScoreRequest
from backends.local.candidates import top_candidates
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
from backends.local.models import LocalModel
from kl.estimators.divergence import exact_pair
from kl.records import ExactPair, Score


class Prepared(NamedTuple):
    """A request with what is computed for it: contexts of which one list's stand together."""

    request: ScoreRequest
    model: LocalModel
    asked: Sequence[Asked]


class Side(NamedTuple):
    """Contexts whose last tokens are in one chunk of what one model is asked."""

    request: ScoreRequest
    model: LocalModel
    asked: tuple[Asked, ...]

    @property
    def chunk(self) -> Chunk:
        """Of the longest context: the others are beginnings of it, up to the chunk's start at least."""
        longest = max(self.asked, key=attrgetter("length"))
        return Chunk(longest.ids[: longest.length], _start(longest))


def _start(asked: Asked) -> int:
    """The first row of the chunk that a context's last token is in."""
    return (asked.length - 1) // CHUNK * CHUNK


class Unit(NamedTuple):
    """What is computed together: contexts of one model, or with those of another that they are compared with.

    With ``of_itself`` a model is compared with itself: the two contexts, and their keys, are one.
    """

    sides: tuple[Side, ...]
    of_itself: bool = False

    @property
    def models(self) -> tuple[LocalModel, ...]:
        """The models, in the order of the sides."""
        return tuple(side.model for side in self.sides)


def units_of(prepared: Sequence[Prepared]) -> list[Unit]:
    """The work for some requests, chunk by chunk; contexts that are compared with each other are in one unit."""
    by_key = {asked.key: (number, asked) for number, each in enumerate(prepared) for asked in each.asked}
    of_itself = [each.request.counterparts == each.request.keys for each in prepared]
    units: dict[tuple[tuple[int, int, int], ...], list[tuple[Asked, ...]]] = {}
    for each in prepared:
        other_of = dict(zip(each.request.keys, each.request.counterparts, strict=False))
        for asked in each.asked:
            if asked.key not in by_key:
                continue  # beside its counterpart
            pair = [by_key.pop(key) for key in (asked.key, other_of.get(asked.key, "")) if key in by_key]
            place = tuple((number, id(one.ids), _start(one)) for number, one in pair)
            units.setdefault(place, []).append(tuple(one for _, one in pair))
    return [
        Unit(
            tuple(
                Side(prepared[number].request, prepared[number].model, asked)
                for (number, _, _), asked in zip(place, zip(*pairs, strict=True), strict=True)
            ),
            of_itself=of_itself[place[0][0]],
        )
        for place, pairs in units.items()
    ]


class Job:
    """The units of one request that are not computed, and the results that nobody has taken."""

    def __init__(self, units: Sequence[Unit]) -> None:
        self.units = deque(units)
        self.ready: list[Score] = []

    def next_units(self, models: tuple[LocalModel, ...], most: int) -> list[Unit]:
        """The first units, while they are for these models."""
        return list(takewhile(lambda unit: unit.models == models, islice(self.units, most)))


@functools.cache
def _jobs(process_id: int) -> list[Job]:
    return []


def steps(units: Sequence[Unit]) -> Iterator[list[Score]]:
    """The scores of some units, step by step; all steps of a process are made in one thread."""
    job, jobs = Job(units), _jobs(os.getpid())
    jobs.append(job)
    try:
        while job.units or job.ready:
            if not job.ready:
                _step(job, [other for other in jobs if other is not job])
            taken, job.ready = job.ready, []
            yield taken
    finally:
        jobs.remove(job)


def _step(job: Job, others: Sequence[Job]) -> None:
    """Compute the next units of a job, and with them those of others that are for the same models."""
    models, room = job.units[0].models, AT_ONCE * blas_threads()
    chosen: list[tuple[Job, Unit]] = []
    for each in (job, *others):
        chosen += [(each, unit) for unit in each.next_units(models, room - len(chosen))]
    try:
        found = _scores([unit for _, unit in chosen], models)
    except Exception:
        own = [(owner, unit) for owner, unit in chosen if owner is job]
        if len(own) == len(chosen):
            raise
        chosen = own  # what is wrong with another job is said when it is its turn
        found = _scores([unit for _, unit in chosen], models)
    for (owner, _), scores in zip(chosen, found, strict=True):
        owner.ready += scores
        owner.units.popleft()  # the first of those that are left is this one


def _scores(units: Sequence[Unit], models: tuple[LocalModel, ...]) -> list[list[Score]]:
    by_side = [model.engine.hidden([unit.sides[at].chunk for unit in units]) for at, model in enumerate(models)]
    work = list(zip(units, zip(*by_side, strict=True), strict=True))
    shares = shares_of(work, blas_threads())
    with one_blas_thread():
        found = in_threads(lambda share: [_scores_of(unit, hidden) for unit, hidden in share], shares)
    return [scores for share in found for scores in share]


def _scores_of(unit: Unit, hidden: Sequence[FloatArray]) -> list[Score]:
    logits = [side.model.engine.logits(rows) for side, rows in zip(unit.sides, hidden, strict=True)]
    scores: list[Score] = []
    for pair in zip(*(side.asked for side in unit.sides), strict=True):
        logprobs = [
            log_softmax(rows[asked.length - 1 - _start(asked)]) for rows, asked in zip(logits, pair, strict=True)
        ]
        exact: list[ExactPair | None] = [None]
        if len(logprobs) == 2 or unit.of_itself:
            figures = exact_pair(logprobs[0], logprobs[-1], pair[-1].key)
            exact = [figures] if len(pair) == 1 else [figures, figures.turned(pair[0].key)]
        scores += [_score(*one) for one in zip(unit.sides, pair, logprobs, exact, strict=True)]
    return scores


def _score(side: Side, asked: Asked, logprobs: FloatArray, exact: ExactPair | None) -> Score:
    request, model = side.request, side.model
    return Score(
        key=asked.key,
        top=top_candidates(logprobs, request.top_logprobs, model.tokenizer),
        model_version=model.source.version,
        input_tokens=asked.length,
        output_tokens=1,
        full_logprobs=logprobs if request.full_vocabulary and not request.counterparts else None,
        exact=exact,
    )
