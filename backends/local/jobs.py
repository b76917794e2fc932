"""Units of all requests under way go through a model together.

Each request that is scored is a job, a list of units in order. Whoever asks for its job's next results has a step made:
the first units of that job and of the others that wait for the same models. What is computed together must not matter
to the figures, so that only the time depends on it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Generic

from backends.local.units import M, Unit
from kl.records import Score, ScoreFailure


class _Job(Generic[M]):
    """The units of one request that are not computed, and the results that nobody has taken."""

    def __init__(self, units: Sequence[Unit[M]]) -> None:
        self.units = deque(units)
        self.ready: list[Score | ScoreFailure] = []


class Jobs(Generic[M]):
    """The jobs under way; all of their steps are made in one thread.

    Parameters
    ----------
    compute : callable
        The results of some units that are for the same models, unit by unit.
    size : callable
        What a unit takes of the room.
    room : callable
        How much may be computed together with a unit; the first unit of a step may be larger.
    """

    def __init__(
        self,
        compute: Callable[[Sequence[Unit[M]]], Sequence[Sequence[Score | ScoreFailure]]],
        size: Callable[[Unit[M]], int],
        room: Callable[[Unit[M]], int],
    ) -> None:
        self._compute, self._size, self._room = compute, size, room
        self._jobs: list[_Job[M]] = []

    def steps(self, *several: Sequence[Unit[M]]) -> Iterator[Iterator[list[Score | ScoreFailure]]]:
        """For each of several jobs, one after the other, the results of its units, step by step.

        Those whose turn has not come are computed with the others where there is room.
        """
        jobs = [_Job(units) for units in several]
        self._jobs += jobs
        try:
            for job in jobs:
                yield self._steps(job)
        finally:
            self._jobs = [job for job in self._jobs if job not in jobs]

    def _steps(self, job: _Job[M]) -> Iterator[list[Score | ScoreFailure]]:
        try:
            while job.units or job.ready:
                if not job.ready:
                    self._step(job)
                taken, job.ready = job.ready, []
                yield taken
        finally:  # also after an error: what is left of it is for nobody
            self._jobs = [each for each in self._jobs if each is not job]

    def _step(self, job: _Job[M]) -> None:
        """Compute the next units of a job, and with them those of others that are for the same models."""
        chosen = self._chosen(job)
        try:
            found = self._compute([unit for _, unit in chosen])
        except Exception:
            own = [(owner, unit) for owner, unit in chosen if owner is job]
            if len(own) == len(chosen):
                raise
            chosen = own  # what is wrong with another job is said when it is its turn
            found = self._compute([unit for _, unit in chosen])
        for (owner, _), results in zip(chosen, found, strict=True):
            owner.ready += results
            owner.units.popleft()  # the first of those that are left is this one

    def _chosen(self, job: _Job[M]) -> list[tuple[_Job[M], Unit[M]]]:
        models, room = job.units[0].models, self._room(job.units[0])
        chosen: list[tuple[_Job[M], Unit[M]]] = []
        for each in (job, *(other for other in self._jobs if other is not job)):
            for unit in each.units:
                if unit.models != models:
                    break
                room -= self._size(unit)
                if room < 0 and chosen:
                    return chosen
                chosen.append((each, unit))
        return chosen
