"""Batch jobs as the service has them: made, found, watched, cancelled."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import google.auth
import google.auth.transport.requests
import pydantic
from google import genai
from google.genai import types

from backends.errors import BackendError, RetryableBackendError
from backends.service.retry import StatusError
from backends.vertex.service.access_token import SCOPE
from backends.vertex.service.client import api_version, base_url
from backends.vertex.service.retry import RENEWAL_S, with_retries

T = TypeVar("T")

PENDING_STATES = frozenset({"UNSPECIFIED", "QUEUED", "PENDING", "RUNNING", "CANCELLING", "PAUSED", "UPDATING"})
# Rows that finished are written and billed in all of these.
TERMINAL_STATES = frozenset({"SUCCEEDED", "PARTIALLY_SUCCEEDED", "FAILED", "CANCELLED", "EXPIRED"})
# Looks at once: the transport goes through all its connections and all waiting calls at each call, which would make a
# look at one of many jobs dearer than at one of few.
_LOOKS_AT_ONCE = 32
# No state of the service: a job that was made and is not there any more. Its output may be.
DELETED = "DELETED"


@dataclass(frozen=True, slots=True)
class RemoteJob:
    """What matters of a batch job: its state without the ``JOB_STATE_`` prefix, its error, where its output lies."""

    name: str
    display_name: str
    state: str
    create_time: str
    output_directory: str | None = None
    error: str | None = None
    error_code: int | None = None
    successful_rows: int | None = None

    @property
    def has_output(self) -> bool:
        """Whether rows must be there, though perhaps a moment after the state says that the job ended."""
        if self.successful_rows is not None:
            return self.successful_rows > 0
        return self.output_directory is not None or self.state in ("SUCCEEDED", "PARTIALLY_SUCCEEDED")

    @property
    def terminal(self) -> bool:
        """Whether the job will not change any more.

        Raises
        ------
        BackendError
            If the state is one that this version does not know.
        """
        if self.state in TERMINAL_STATES:
            return True
        if self.state in PENDING_STATES:
            return False
        raise BackendError(
            f"batch job {self.name} is in the state {self.state!r}, which this version does not know. "
            "Look at the job in the console; a later run attaches to it again."
        )


class BatchJobs:
    """Create, find, watch and cancel batch jobs.

    The SDK cannot read a job whose error carries detail objects (its model wants strings); such answers are read again
    without it.
    """

    def __init__(
        self, client: genai.Client, project_id: str, location: str, deadline_s: float, timeout_s: float
    ) -> None:
        self._client = client
        self._parent = f"projects/{project_id}/locations/{location}"
        self._url = f"{base_url(location)}/{api_version()}"
        self._deadline_s = deadline_s
        self._timeout_s = timeout_s
        self._looks = asyncio.Semaphore(_LOOKS_AT_ONCE)

    async def create(self, model: str, input_uri: str, output_prefix: str, display_name: str) -> RemoteJob:
        """Create a job, once: an answer that was lost is looked up before anything is created again.

        There must be no job of this display name yet.
        """
        first = True

        async def attempt() -> RemoteJob:
            nonlocal first
            if not first:
                found = await self._list(display_name)
                if found:
                    return found[-1]
            first = False
            try:
                job = await self._client.aio.batches.create(
                    model=model,
                    src=input_uri,
                    config=types.CreateBatchJobConfig(display_name=display_name, dest=output_prefix),
                )
            except pydantic.ValidationError as error:
                # The job was made; only its description could not be read.
                raise RetryableBackendError("the answer cannot be read") from error
            return _from_sdk(job)

        return await self._repeated(attempt, f"create batch job {display_name}")

    async def find(self, display_name: str) -> list[RemoteJob]:
        """The jobs of a display name, oldest first."""
        return await self._repeated(lambda: self._list(display_name), f"look for batch job {display_name}")

    async def get(self, name: str) -> RemoteJob | None:
        """The present state of a job; None if it does not exist (any more)."""
        try:
            return await self._repeated(lambda: self._get(name), f"read batch job {name}")
        except StatusError as error:
            if error.status == 404:
                return None
            raise

    async def cancel(self, name: str) -> None:
        """Ask the service to cancel a job; it goes on for a while and keeps what it finished."""
        await self._repeated(lambda: self._client.aio.batches.cancel(name=name), f"cancel batch job {name}")

    async def _repeated(self, call: Callable[[], Awaitable[T]], what: str) -> T:
        return await with_retries(call, what=what, deadline_s=self._deadline_s, renewal_s=RENEWAL_S)

    async def _get(self, name: str) -> RemoteJob:
        try:
            async with self._looks:
                return _from_sdk(await self._client.aio.batches.get(name=name))
        except pydantic.ValidationError:
            path = f"{self._parent}/batchPredictionJobs/{name.rsplit('/', 1)[-1]}"
            return _from_json(await asyncio.to_thread(self._raw_get, path, {}))

    async def _list(self, display_name: str) -> list[RemoteJob]:
        query = f'displayName="{display_name}"'
        try:
            pager = await self._client.aio.batches.list(config=types.ListBatchJobsConfig(filter=query, page_size=100))
            found = [_from_sdk(job) async for job in pager]
        except pydantic.ValidationError:
            found = await self._raw_list(query)
        return sorted((job for job in found if job.display_name == display_name), key=lambda job: job.create_time)

    async def _raw_list(self, query: str) -> list[RemoteJob]:
        jobs: list[RemoteJob] = []
        parameters = {"filter": query, "pageSize": "100"}
        while True:
            page = await asyncio.to_thread(self._raw_get, f"{self._parent}/batchPredictionJobs", parameters)
            jobs += [_from_json(item) for item in page.get("batchPredictionJobs", [])]
            if not page.get("nextPageToken"):
                return jobs
            parameters = parameters | {"pageToken": page["nextPageToken"]}

    def _raw_get(self, path: str, parameters: dict[str, str]) -> dict[str, Any]:
        credentials, _ = google.auth.default(scopes=[SCOPE])
        with google.auth.transport.requests.AuthorizedSession(credentials) as session:
            answer = session.get(f"{self._url}/{path}", params=parameters, timeout=self._timeout_s)
            if not answer.ok:
                genai.errors.APIError.raise_for_response(answer)
            return answer.json()


def _from_sdk(job: types.BatchJob) -> RemoteJob:
    if not job.name:
        raise BackendError("the service answered with a batch job that has no name.")
    state = job.state.value if job.state is not None else "JOB_STATE_UNSPECIFIED"
    return RemoteJob(
        name=job.name,
        display_name=job.display_name or "",
        state=state.removeprefix("JOB_STATE_"),
        create_time=job.create_time.isoformat() if job.create_time else "",
        output_directory=job.output_info.gcs_output_directory if job.output_info else None,
        error=_error_text(job.error.model_dump()) if job.error else None,
        error_code=job.error.code if job.error else None,
        successful_rows=_known_count(job.completion_stats.successful_count if job.completion_stats else None),
    )


def _from_json(job: dict[str, Any]) -> RemoteJob:
    error = job.get("error")
    return RemoteJob(
        name=job["name"],
        display_name=job.get("displayName", ""),
        state=job.get("state", "JOB_STATE_UNSPECIFIED").removeprefix("JOB_STATE_"),
        create_time=job.get("createTime", ""),
        output_directory=job.get("outputInfo", {}).get("gcsOutputDirectory"),
        error=_error_text(error) if error else None,
        error_code=error.get("code") if error else None,
        successful_rows=_known_count(job.get("completionStats", {}).get("successfulCount")),
    )


def _known_count(value: int | str | None) -> int | None:
    # REST writes counts as texts, and -1 for one that is not known.
    return int(value) if value is not None and int(value) >= 0 else None


def _error_text(error: dict[str, Any]) -> str:
    return f"{error.get('message') or 'no message'} (code {error.get('code')})"
