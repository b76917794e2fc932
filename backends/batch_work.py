"""What a batch backend still wants answered, and how it goes on."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field

from backends.batch_rows import RowSet
from backends.job_ledger import JobEntry
from backends.vertex_client import DELETED, PENDING_STATES, TERMINAL_STATES, RemoteJob
from kl.records import ScoreFailure

logger = logging.getLogger(__name__)

# Refusals that a repeated job meets again: no permission, no such model, no credentials.
_FINAL_ERROR_CODES = frozenset({5, 7, 16, 401, 403, 404})


@dataclass(slots=True)
class BatchWork:
    """Rows that still want an answer, why they have none yet, and what was tried."""

    rows: RowSet
    earlier: JobEntry | None
    failures: dict[str, ScoreFailure] = field(default_factory=dict[str, ScoreFailure])
    attempts: int = 0
    given_up: bool = False

    def open_failures(self) -> Iterator[ScoreFailure]:
        """Why the open rows have no answer."""
        return (self.failures[key] for key in self.rows.keys)

    def give_up(self, reason: str, message: str) -> None:
        """Leave the rows to a later run."""
        self.given_up = True
        for key in self.rows.keys:
            self.failures[key] = ScoreFailure(key, reason, message)

    def note_end(self, job: RemoteJob) -> None:
        """Say why the rows that a job left out have no answer."""
        if not self.rows.keys:
            return
        logger.warning(
            "batch job %s ended %s with %d rows unanswered%s",
            job.name, job.state, len(self.rows.keys), f": {job.error}" if job.error else "",
        )  # fmt: skip
        self.given_up = job.error_code in _FINAL_ERROR_CODES
        for key in self.rows.keys:
            if job.error:
                message = f"batch job {job.name} ended {job.state}: {job.error}"
                self.failures[key] = ScoreFailure(key, "job-failed", message)
            elif key not in self.failures:
                message = f"batch job {job.name} ended {job.state} without an answer to this row."
                self.failures[key] = ScoreFailure(key, "missing-row", message)


def ended_first(job: RemoteJob) -> int:
    """The order in which jobs of one name are read: rows that one has answered need no wait for another."""
    known = (DELETED, *TERMINAL_STATES)
    return 0 if job.state in known else 1 if job.state in PENDING_STATES else 2
