"""The log of batch jobs: a line for all that were made together, not one for each."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import time
from collections import Counter
from typing import NamedTuple

from backends.vertex.jobs.remote import PENDING_STATES

logger = logging.getLogger(__name__)

_TOGETHER_S = 2.0  # jobs that change within this share a line
_PAUSE_S = 60.0  # between lines
_EARLIER = 0


class _Job(NamedTuple):
    wave: int
    rows: int
    state: str


class WaveLog:
    """Says how many jobs of each wave are in which state, when that has changed; used on the event loop alone.

    Wave 1 are the first jobs that this run makes for its rows, wave 2 those for what wave 1 left out, and so on. Jobs
    that another run made are called so. The name of each job is a line from DEBUG on, and in the run's record.
    """

    def __init__(self) -> None:
        self._jobs: dict[str, _Job] = {}
        self._said: dict[int, str] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._not_before = 0.0

    def note(self, name: str, rows: int, state: str, wave: int | None = None) -> None:
        """Take in a job's state; ``wave`` is that of a job that was just made."""
        before = self._jobs.get(name)
        number = wave if wave is not None else before.wave if before is not None else _EARLIER
        job = _Job(number, rows, state)
        if job == before:
            return
        logger.debug("batch job %s: %d rows, %s", name, rows, state)
        self._jobs[name] = job
        if self._timer is None:
            wait_s = max(_TOGETHER_S, self._not_before - time.monotonic())
            # In no context: the task of the group that comes first is not what the line is about.
            self._timer = asyncio.get_running_loop().call_later(wait_s, self.say, context=contextvars.Context())

    def say(self) -> None:
        """Log a line for each wave that has changed since its last."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for wave in sorted({job.wave for job in self._jobs.values()}):
            text = self._text([job for job in self._jobs.values() if job.wave == wave])
            if self._said.get(wave) != text:
                self._said[wave] = text
                self._not_before = time.monotonic() + _PAUSE_S
                logger.info("%s: %s", f"wave {wave}" if wave != _EARLIER else "jobs of an earlier run", text)

    def _text(self, jobs: list[_Job]) -> str:
        states = Counter(job.state for job in jobs)
        ordered = sorted(states.items(), key=lambda item: (item[0] not in PENDING_STATES, item[0]))
        counts = ", ".join(f"{count:,} {state.lower().replace('_', ' ')}" for state, count in ordered)
        what = f"{len(jobs):,} job{'' if len(jobs) == 1 else 's'}"
        return f"{what}, {sum(job.rows for job in jobs):,} rows: {counts}"
