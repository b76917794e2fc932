"""What a batch backend still wants answered, and how it goes on."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Generic, Literal

from backends.base import WAITING
from backends.vertex.jobs.remote import DELETED, PENDING_STATES, TERMINAL_STATES, RemoteJob
from backends.vertex.jobs.rows import A, RowSet
from kl.records import ScoreFailure

logger = logging.getLogger(__name__)

# Refusals that a repeated job meets again: no permission, no such model, no credentials.
_FINAL_ERROR_CODES = frozenset({5, 7, 16, 401, 403, 404})

Stage = Literal["run", "submit", "collect"]


@dataclass(slots=True)
class BatchWork(Generic[A]):
    """Rows that still want an answer, why they have none yet, and what was tried.

    ``stage`` says whether jobs are waited for (``run``), only made (``submit``), or looked at once (``collect``).
    ``given_up`` that nothing more is done for the rows now; ``closed`` are rows for which that was settled before,
    ``refused`` those that their last job refused for good. ``read`` are the jobs whose output was looked through,
    the last ``barren`` of which answered none of the rows.
    """

    rows: RowSet[A]
    stage: Stage = "run"
    failures: dict[str, ScoreFailure] = field(default_factory=dict[str, ScoreFailure])
    attempts: int = 0
    given_up: bool = False
    closed: list[ScoreFailure] = field(default_factory=list[ScoreFailure])
    refused: set[str] = field(default_factory=set[str])
    read: set[str] = field(default_factory=set[str])
    barren: int = 0

    def open_failures(self) -> Iterator[ScoreFailure]:
        """Why the open rows have no answer."""
        return (self.failures[key] for key in self.rows.keys if key in self.failures)

    def unanswered(self) -> Iterator[ScoreFailure]:
        """One failure for each row that is left at the end."""
        yield from self.closed
        yield from (self.failures[key] for key in self.rows.keys)

    def give_up(self, reason: str, message: str) -> None:
        """Leave the rows to a later run."""
        self.given_up = True
        for key in self.rows.keys:
            self.failures[key] = ScoreFailure(key, reason, message)

    def leave_to(self, job: RemoteJob, keys: Collection[str]) -> None:
        """Leave the rows that a job answers to a later look at it; the others stay open."""
        taken = set(keys)
        message = f"batch job {job.name} is {job.state}; --stage collect takes in its answers when it has ended."
        self.closed += [ScoreFailure(key, WAITING, message) for key in self.rows.keys if key in taken]
        self.rows = self.rows.without(taken)

    def close(self, keys: Collection[str]) -> None:
        """No further job is made for these rows."""
        message = "the batch jobs made for this row ended without an answer to it (max_attempts)."
        self.closed += [self.failures.get(key, ScoreFailure(key, "job-failed", message)) for key in keys]
        self.rows = self.rows.without(keys)

    def note_end(self, job: RemoteJob, keys: Collection[str]) -> None:
        """Say why the rows of a job, those with ``keys``, have no answer."""
        asked = set(keys)
        left_out = [key for key in self.rows.keys if key in asked]
        if not left_out:
            return
        logger.warning(
            "batch job %s ended %s with %d rows unanswered%s",
            job.name, job.state, len(left_out), f": {job.error}" if job.error else "",
        )  # fmt: skip
        for key in left_out:
            if job.error:
                message = f"batch job {job.name} ended {job.state}: {job.error}"
                self.failures[key] = ScoreFailure(key, "job-failed", message)
            elif key not in self.failures:
                message = f"batch job {job.name} ended {job.state} without an answer to this row."
                self.failures[key] = ScoreFailure(key, "missing-row", message)
        if job.error_code in _FINAL_ERROR_CODES:
            self.refused.update(left_out)
        else:
            self.refused.difference_update(left_out)

    def close_refused(self) -> None:
        """Make no further job for rows of which the service said that it will not answer them."""
        self.close([key for key in self.rows.keys if key in self.refused])


def ended_first(job: RemoteJob) -> int:
    """The order in which jobs of one name are read: rows that one has answered need no wait for another."""
    known = (DELETED, *TERMINAL_STATES)
    return 0 if job.state in known else 1 if job.state in PENDING_STATES else 2
