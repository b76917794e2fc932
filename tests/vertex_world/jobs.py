"""Batch prediction jobs: the records, and the calls that create, read, cancel and delete them."""

from __future__ import annotations

import base64
import binascii
import secrets
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

from tests.vertex_world.faults import Faults
from tests.vertex_world.job_filter import parse_filter
from tests.vertex_world.job_output import RowSpool
from tests.vertex_world.validation import parse_job
from tests.vertex_world.wire import ApiError, malformed, now, rfc3339

TERMINAL = frozenset(
    {
        "JOB_STATE_SUCCEEDED",
        "JOB_STATE_FAILED",
        "JOB_STATE_CANCELLED",
        "JOB_STATE_EXPIRED",
        "JOB_STATE_PARTIALLY_SUCCEEDED",
    }
)
_PROJECT_NUMBER = "123456789012"
_MAX_PAGE = 100


@dataclass
class Job:
    """One batch job, as the world knows it.

    ``rows_in`` is None until the input was read. ``rows_finished`` are the rows that were worked on and are billed;
    ``rows_failed`` those of them that ended in an error.
    """

    id: str
    index: int
    project: str
    location: str
    display_name: str
    model: str
    body: dict[str, Any]
    outcome: str
    fraction: float
    create_time: datetime
    state: str = "JOB_STATE_PENDING"
    start_time: datetime | None = None
    end_time: datetime | None = None
    update_time: datetime | None = None
    rows_in: int | None = None
    rows_finished: int = 0
    rows_failed: int = 0
    rows_missing: int = 0
    output_directory: str | None = None
    error: dict[str, Any] | None = None
    deleted: bool = False
    settled: bool = False  # nothing will happen to it any more, its files included
    cancelled: threading.Event = field(default_factory=threading.Event, repr=False)
    parked: RowSpool | None = field(default=None, repr=False)

    @property
    def input_uris(self) -> list[str]:
        return self.body["inputConfig"]["gcsSource"]["uris"]

    @property
    def output_prefix(self) -> str:
        return self.body["outputConfig"]["gcsDestination"]["outputUriPrefix"]

    def to_json(self) -> dict[str, Any]:
        """The resource as get and list return it."""
        times = {
            "createTime": self.create_time,
            "startTime": self.start_time,
            "endTime": self.end_time,
            "updateTime": self.update_time or self.create_time,
        }
        resource: dict[str, Any] = {
            "name": f"projects/{_PROJECT_NUMBER}/locations/{self.location}/batchPredictionJobs/{self.id}",
            **self.body,
            "state": self.state,
            **{name: rfc3339(moment) for name, moment in times.items() if moment is not None},
            "modelVersionId": "1",
        }
        if self.error is not None:
            resource["error"] = self.error
        if self.output_directory is not None:
            resource["outputInfo"] = {"gcsOutputDirectory": self.output_directory}
        if self.rows_in is not None and (self.end_time is not None or self.rows_finished):
            resource["completionStats"] = self._stats(self.rows_in)
        if self.state == "JOB_STATE_PARTIALLY_SUCCEEDED":
            resource["partialFailures"] = [{"code": 8, "message": "Some rows could not be processed."}]
        return resource

    def _stats(self, rows_in: int) -> dict[str, str]:
        finished = self.rows_finished - self.rows_failed
        counts = {"successfulCount": finished, "failedCount": self.rows_failed}
        incomplete = rows_in - self.rows_finished
        return {name: str(count) for name, count in {**counts, "incompleteCount": incomplete}.items() if count}


class JobStore:
    """All jobs; ``run`` starts one, ``finish_cancel`` ends one that no worker holds."""

    def __init__(
        self,
        faults: Faults,
        run: Callable[[Job], None],
        finish_cancel: Callable[[Job], None],
        lock: threading.RLock,
    ) -> None:
        self._faults = faults
        self._run = run
        self._finish_cancel = finish_cancel
        self._jobs: dict[str, Job] = {}
        self.lock = lock

    def snapshot(self) -> list[Job]:
        """Copies of all jobs, deleted ones included, in order of creation."""
        with self.lock:
            return [replace(job) for job in self._jobs.values()]

    def create(self, project: str, location: str, model: str, body: dict[str, Any]) -> dict[str, Any]:
        """Register a validated job and start it."""
        with self.lock:
            index = len(self._jobs)
            outcome, fraction = self._faults.outcome(index)
            job_id = str(secrets.randbelow(9 * 10**18) + 10**18)
            name = body["displayName"]
            job = Job(job_id, index, project, location, name, model, body, outcome, fraction, create_time=now())
            self._jobs[job_id] = job
            self._run(job)
            return job.to_json()

    def get(self, location: str, job_id: str) -> dict[str, Any]:
        with self.lock:
            return self._find(location, job_id).to_json()

    def list(self, location: str, query: dict[str, str]) -> dict[str, Any]:
        """One page, newest first."""
        unknown = set(query) - {"filter", "pageSize", "pageToken", "readMask", "alt", "prettyPrint", "$alt"}
        if unknown:
            name = min(unknown)
            raise malformed(f'Invalid JSON payload received. Unknown name "{name}": Cannot bind query parameter.')
        keep = parse_filter(query["filter"]) if query.get("filter") else None
        size = _page_size(query.get("pageSize"))
        start = _page_start(query.get("pageToken"))
        with self.lock:
            jobs = [job.to_json() for job in self._jobs.values() if job.location == location and not job.deleted]
        jobs = [job for job in reversed(jobs) if keep is None or keep(job)]
        page = jobs[start : start + size]
        answer: dict[str, Any] = {"batchPredictionJobs": page} if page else {}
        if start + size < len(jobs):
            answer["nextPageToken"] = base64.urlsafe_b64encode(str(start + size).encode()).decode()
        return answer

    def cancel(self, location: str, job_id: str) -> dict[str, Any]:
        """Ask for a cancel; the job ends a moment later and keeps the rows that are finished."""
        with self.lock:
            job = self._find(location, job_id)
            if job.state in TERMINAL:
                message = f"BatchPredictionJob {job_id} is in state {job.state} and cannot be cancelled."
                raise ApiError(400, message, status="FAILED_PRECONDITION")
            if self._faults.ignore_cancel:
                self._faults.count("ignore_cancel")
                return {}
            job.state = "JOB_STATE_CANCELLING"
            job.update_time = now()
            job.cancelled.set()
            parked = job.parked is not None
        if parked:
            self._finish_cancel(job)
        return {}

    def delete(self, location: str, job_id: str) -> dict[str, Any]:
        """A finished job disappears."""
        with self.lock:
            job = self._find(location, job_id)
            if job.state not in TERMINAL:
                message = f"BatchPredictionJob {job_id} is in state {job.state} and cannot be deleted. Cancel it first."
                raise ApiError(400, message, status="FAILED_PRECONDITION")
            job.deleted = True
            resource = job.to_json()["name"]
        return {
            "name": f"{resource.rpartition('/batch')[0]}/operations/{job_id}",
            "metadata": {"@type": "type.googleapis.com/google.cloud.aiplatform.v1beta1.DeleteOperationMetadata"},
            "done": True,
            "response": {"@type": "type.googleapis.com/google.protobuf.Empty"},
        }

    def _find(self, location: str, job_id: str) -> Job:
        job = self._jobs.get(job_id)
        if job is None or job.deleted or job.location != location:
            where = f"projects/{_PROJECT_NUMBER}/locations/{location}/batchPredictionJobs/{job_id}"
            raise ApiError(404, f"The BatchPredictionJob does not exist: {where}.")
        return job


def check_job(body: Any) -> tuple[str, dict[str, Any]]:
    """The model's name and the validated body of a create call."""
    job = parse_job(body)
    head, _, name = job["model"].rpartition("/models/")
    if not head.endswith("publishers/google"):
        raise malformed(f"Invalid model name {job['model']!r}: expected publishers/google/models/MODEL.")
    return name, job


def _page_size(text: str | None) -> int:
    if text is None:
        return _MAX_PAGE
    if not text.isdigit():
        raise malformed(f"Invalid value at 'page_size' (TYPE_INT32), {text!r}")
    return min(int(text), _MAX_PAGE) or _MAX_PAGE


def _page_start(token: str | None) -> int:
    try:
        return int(base64.urlsafe_b64decode(token)) if token else 0
    except (ValueError, binascii.Error) as error:
        raise malformed("Invalid page token.") from error
