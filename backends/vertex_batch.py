"""Vertex AI batch prediction, the default backend: half the price, thousands of requests a job.

Rows → JSONL in the bucket → batch job → poll → output rows matched by key. What a job did not answer goes into a
follow-up job, a bounded number of times; what finished is kept whatever the job's state.
"""

from __future__ import annotations

import asyncio
import logging
import re
import tempfile
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import Field

from backends import gemini
from backends.base import Backend, BackendOptions, Capabilities, ScoreRequest
from backends.batch_rows import OutputReader, RowSet, read_row, split_rows
from backends.batch_work import BatchWork, ended_first
from backends.bucket import BatchBucket, OtherContentError, check_bucket_name, lacks_shards
from backends.errors import BackendError, ConfigError, ModelNotUsableError, RetryableBackendError
from backends.gemini_calls import prove_usable
from backends.job_ledger import JobEntry, JobLedger
from backends.merging import merged
from backends.prices import BATCH_SHARE, Price, price_of, token_cost
from backends.raw_log import RawLog
from backends.retry import DailyQuotaError, StatusError
from backends.vertex_client import (
    DELETED,
    PENDING_STATES,
    BatchJobs,
    RemoteJob,
    check_location,
    make_client,
    require_project,
)
from kl.records import Score, ScoreFailure

logger = logging.getLogger(__name__)

# The first look at a job, and how the pauses grow with the time waited, up to ``poll_interval_s``.
_FIRST_POLL_S = 1.0
_POLL_SHARE = 0.25
_OUTPUT_POLL_S = 2.0
_UPLOAD_NAMES = 5


class VertexBatchOptions(BackendOptions):
    """Settings of the backend ``vertex_batch``."""

    project_id: str | None = Field(default=None, description="Google Cloud project. Default: GOOGLE_CLOUD_PROJECT.")
    location: str = Field(default="us-central1", min_length=1, description="Vertex AI location of the jobs.")
    bucket_name: str | None = Field(
        default=None, description="Bucket for batch files; made when absent. Default: {project_id}-kl-batch."
    )
    poll_interval_s: float = Field(
        default=10.0,
        gt=0,
        le=3600,
        description="Longest pause between looks at a job in seconds, above 0, up to 3600; the first are shorter.",
    )
    wait_deadline_s: float = Field(
        default=4 * 86400.0,
        gt=0,
        description="Seconds to wait for a job (4 days: 72 h in the queue, 24 h of work); a later run attaches to it.",
    )
    output_deadline_s: float = Field(
        default=30.0, ge=0, description="Seconds after a job's end within which its output must appear."
    )
    retry_deadline_s: float = Field(
        default=600.0, gt=0, description="Seconds for which one call is repeated under throttling and faults."
    )
    prices: dict[str, Price] = Field(
        default_factory=dict[str, Price],
        description="USD per million tokens by model, online list price, in place of the built-in table: "
        "{gemini-2.5-flash: {input: 0.30, output: 2.50}}.",
    )
    keep_raw: bool = Field(
        default=False, description="Keep the service's own rows, compressed, in scores/raw (--reuse-raw reads them)."
    )
    request_timeout_s: float = Field(default=120.0, gt=0, description="Seconds until one call counts as lost.")
    on_cancel: Literal["leave", "cancel"] = Field(
        default="leave", description="What becomes of running jobs when the run is stopped: leave or cancel."
    )
    max_attempts: int = Field(
        default=8, ge=1, le=20, description="Jobs that may be made for a row before it is given up, 1 to 20."
    )
    max_jobs_in_flight: int = Field(
        default=50, ge=1, le=1000, description="Jobs that may run at once, 1 to 1000; the service queues some of them."
    )
    max_rows_per_job: int = Field(
        default=200_000, ge=1, le=200_000, description="Rows in one input file, 1 to 200000 (the service's limit)."
    )
    max_file_bytes: int = Field(
        default=950_000_000,
        ge=1_000_000,
        le=1_000_000_000,
        description="Size of one input file in bytes, 1e6 to 1e9 (the service's limit).",
    )


class VertexBatchBackend(Backend):
    """Scores through batch prediction jobs."""

    Options: ClassVar[type[BackendOptions]] = VertexBatchOptions
    capabilities: ClassVar[Capabilities] = Capabilities(max_top_logprobs=gemini.MAX_TOP_LOGPROBS)
    options: VertexBatchOptions

    def __init__(self, options: VertexBatchOptions, state_dir: Path | None = None) -> None:
        super().__init__(options, state_dir)
        project = require_project(options.project_id)
        location = check_location(options.location)
        bucket = check_bucket_name(options.bucket_name or f"{project}-kl-batch")
        if state_dir is None:
            raise ConfigError("vertex_batch needs a folder in which it records its jobs.")
        self._place = f"{project}/{location}/{bucket}"
        self._project, self._location, self._bucket_name = project, location, bucket
        self._ledger = JobLedger(state_dir / "jobs")
        # Jobs that this run records itself are waited for where they are made.
        self._earlier = self._ledger.in_flight(self._place)
        self._raw = RawLog(state_dir / "raw") if options.keep_raw else None
        self._reported: dict[str, dict[str, Any]] = {}
        self._making: set[str] = set()
        self._quota_used: str | None = None

    async def __aenter__(self) -> Self:
        options = self.options
        self._client = make_client(self._project, self._location, options.request_timeout_s)
        self._jobs = BatchJobs(
            self._client, self._project, self._location, options.retry_deadline_s, options.request_timeout_s
        )
        self._bucket = BatchBucket(self._project, self._location, self._bucket_name, options.retry_deadline_s)
        self._slots = asyncio.Semaphore(options.max_jobs_in_flight)
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._client.aclose()
        self._bucket.close()
        if self._raw is not None:
            self._raw.close()

    @classmethod
    def identity(cls, options: BackendOptions, request: ScoreRequest) -> dict[str, Any]:
        """The generation settings; online and batch requests share their scores."""
        return gemini.request_identity(request)

    @classmethod
    def cost_usd(cls, options: BackendOptions, model: str, input_tokens: int, output_tokens: int) -> float | None:
        """The list price, at half for batch; caches that the service applies by itself would lower it."""
        assert isinstance(options, VertexBatchOptions)
        price = price_of(model, options.prices)
        return token_cost(price, input_tokens, output_tokens, BATCH_SHARE)

    @classmethod
    def request_bytes(cls, request: ScoreRequest) -> int:
        """The size of the requests as JSON lines."""
        return sum(gemini.BatchRows(request).sizes())

    def parallel_groups(self) -> int:
        """One group per job in flight."""
        return self.options.max_jobs_in_flight

    def in_flight(self) -> Mapping[str, str]:
        """Keys in jobs that this output folder has on record."""
        return self._earlier

    def report(self) -> dict[str, Any]:
        """The jobs of this run with their states."""
        return {"bucket": self._bucket_name, "jobs": list(self._reported.values())}

    @classmethod
    def parse_raw(cls, key: str, row: dict[str, Any]) -> Score | ScoreFailure:
        """Read a row that was kept."""
        return read_row(key, row)

    async def interrupted(self) -> str | None:
        """Leave the jobs that still run, or cancel them, as ``on_cancel`` says."""
        names = [str(job["name"]) for job in self._reported.values() if job["state"] in PENDING_STATES]
        if self.options.on_cancel == "leave":
            if not names:
                return None
            return f"{len(names)} batch jobs go on and are charged; the next run fetches them: {', '.join(names)}"
        # A job whose creation was under way may have been made.
        looked_up = await asyncio.gather(*map(self._jobs.find, self._making), return_exceptions=True)
        names += [job.name for found in looked_up if not isinstance(found, BaseException) for job in found]
        answers = await asyncio.gather(*map(self._jobs.cancel, names), return_exceptions=True)
        failed = [name for name, answer in zip(names, answers, strict=True) if isinstance(answer, BaseException)]
        cancelled = [name for name in names if name not in failed]
        parts = [
            f"{len(cancelled)} batch jobs were cancelled; the next run fetches what they finished: "
            f"{', '.join(cancelled)}" if cancelled else "",
            f"{len(failed)} batch jobs could not be cancelled, or have ended: {', '.join(failed)}" if failed else "",
        ]  # fmt: skip
        return "; ".join(part for part in parts if part) or None

    async def preflight(self, model: str) -> str | None:
        """One tiny online request with a prefill, and the bucket."""
        version = await prove_usable(self._client, model, self.options.retry_deadline_s)
        await self._bucket.ensure()
        return version

    async def score(self, requests: Sequence[ScoreRequest]) -> AsyncIterator[Score | ScoreFailure]:
        """Ask for all positions in as few jobs as the limits allow, and follow up on what they leave out."""
        await self._bucket.ensure()
        jobs = [self._score_rows(rows) for rows in self._work(RowSet(requests))]
        async with aclosing(merged(jobs)) as results:
            async for result in results:
                yield result

    def _work(self, rows: RowSet) -> Iterator[RowSet]:
        """Rows that an earlier job may answer, by that job; the rest, by the service's limits."""
        by_job: dict[str | None, list[str]] = {}
        for key in rows.keys:
            by_job.setdefault(self._earlier.get(key), []).append(key)
        fresh = by_job.pop(None, [])
        for keys in by_job.values():
            yield rows.only(keys)
        yield from split_rows(rows.only(fresh), self.options.max_rows_per_job, self.options.max_file_bytes)

    async def _score_rows(self, rows: RowSet) -> AsyncGenerator[Score | ScoreFailure]:
        """Every row's result; what befalls one job is a failure of its rows and of no others."""
        work = BatchWork(rows, self._ledger.get(self._earlier.get(rows.keys[0], "")))
        while work.rows.keys and not work.given_up:
            async with self._slots:
                try:
                    async with aclosing(self._one_round(work)) as results:
                        async for result in results:
                            yield result
                except ModelNotUsableError:
                    raise
                except BackendError as error:
                    work.give_up(*self._why_given_up(error))
        for key in work.rows.keys:
            yield work.failures[key]

    async def _one_round(self, work: BatchWork) -> AsyncGenerator[Score | ScoreFailure]:
        """Read the jobs that are to answer these rows, or make one; what they leave out stays in ``work``."""
        entry, jobs = await self._jobs_for(work)
        work.earlier = None
        if not jobs:
            if self._quota_used is not None:
                raise DailyQuotaError(self._quota_used)
            if work.attempts == self.options.max_attempts:
                work.given_up = True
                return
            work.attempts += 1
            job = await self._make(entry, work.rows)
            entry, jobs = self._ledger.update(replace(entry, job_name=job.name, state=job.state)), [job]
            logger.info("batch job %s: %d rows, %s", job.name, len(work.rows.keys), job.state)
        for job in sorted(jobs, key=ended_first):
            if work.rows.keys:
                job = await self._wait(job, rows=len(entry.keys))
                async with aclosing(self._read(entry, job, work)) as results:
                    async for result in results:
                        yield result
                entry = replace(entry, job_name=job.name, state=job.state)
        self._ledger.update(replace(entry, ended=True))
        quota = next((item for item in work.open_failures() if item.reason == "daily-quota"), None)
        if quota is not None and self._quota_used is None:
            self._quota_used = quota.message
            logger.error("%s No further batch job is made in this run; run again tomorrow.", quota.message)

    def _why_given_up(self, error: BackendError) -> tuple[str, str]:
        if isinstance(error, _GiveUpError):
            return error.reason, str(error)
        if isinstance(error, DailyQuotaError):
            self._quota_used = self._quota_used or str(error)
            return "daily-quota", str(error)
        if isinstance(error, RetryableBackendError):
            given_up = f"given up after {self.options.retry_deadline_s:g} s (retry_deadline_s)"
            return "deadline", f"{error}; {given_up}; the next run takes it up again."
        if isinstance(error, StatusError):
            return "refused", str(error)
        return "service-error", str(error)

    async def _jobs_for(self, work: BatchWork) -> tuple[JobEntry, list[RemoteJob]]:
        """All jobs there are for these rows: those of an earlier run, else those of the name that a new one gets."""
        if work.earlier is not None:
            found = await self._find(work.earlier)
            if found:
                names = ", ".join(f"{job.name} ({job.state})" for job in found)
                logger.info("attaching to batch job %s of an earlier run", names)
                return work.earlier, found
        rows = work.rows
        job_key = self._ledger.job_key(self._place, rows.keys)
        file_name = f"{_slug(rows.name)}_{job_key}"
        paths = f"batch_input/{file_name}.jsonl", f"batch_output/{file_name}"
        entry = self._ledger.record(job_key, self._place, *paths, list(rows.keys))
        known_absent = work.earlier is not None and work.earlier.job_key == job_key
        return entry, [] if known_absent else await self._find(entry)

    async def _find(self, entry: JobEntry) -> list[RemoteJob]:
        found = await self._jobs.find(entry.job_key)
        if entry.job_name is None or any(_job_id(job.name) == _job_id(entry.job_name) for job in found):
            return found
        # It was made, for its name is on record; a list may be behind, and a job that was deleted left its output.
        job = await self._jobs.get(entry.job_name)
        return [*found, job or RemoteJob(entry.job_name, entry.job_key, DELETED, "")]

    async def _make(self, entry: JobEntry, rows: RowSet) -> RemoteJob:
        self._making.add(entry.job_key)
        uri = await self._upload(entry, rows)
        destination = f"gs://{self._bucket_name}/{entry.output_prefix}"
        job = await self._jobs.create(rows.model, uri, destination, entry.job_key)
        self._note(job, len(rows.keys))
        self._making.discard(entry.job_key)
        return job

    async def _upload(self, entry: JobEntry, rows: RowSet) -> str:
        # A name may be taken: by the same rows in another order, of a run that was killed before it made the job (files
        # were renamed since), or by an upload that went wrong. Rows are matched by key, so that any name will do.
        name, _, key = entry.input_path.rpartition("_")
        for number in range(_UPLOAD_NAMES):
            with suppress(OtherContentError):
                path = f"{name}-{number}_{key}" if number else entry.input_path
                return await self._bucket.upload_once(path, rows)
        raise OtherContentError(f"{_UPLOAD_NAMES} objects like {entry.input_path} exist with other content.")

    def _note(self, job: RemoteJob, rows: int) -> None:
        known = {"name": job.name, "display_name": job.display_name, "state": job.state, "rows": rows}
        self._reported[job.name] = known

    async def _wait(self, job: RemoteJob, rows: int) -> RemoteJob:
        began = time.monotonic()
        while True:
            self._note(job, rows)
            if job.state == DELETED or _is_terminal(job):
                return job
            waited = time.monotonic() - began
            if waited > self.options.wait_deadline_s:
                raise _GiveUpError(
                    "deadline",
                    f"batch job {job.name} is still {job.state} after {self.options.wait_deadline_s:g} s "
                    "(wait_deadline_s); it goes on, and the next run attaches to it.",
                )
            # Small jobs may be done in seconds, large ones take hours.
            await asyncio.sleep(min(self.options.poll_interval_s, max(_FIRST_POLL_S, waited * _POLL_SHARE)))
            job = await self._jobs.get(job.name) or replace(job, state=DELETED, output_directory=None)

    async def _read(self, entry: JobEntry, job: RemoteJob, work: BatchWork) -> AsyncGenerator[Score | ScoreFailure]:
        reader = OutputReader(work.rows, self._raw)
        answered: set[str] = set()
        try:
            with tempfile.TemporaryDirectory(prefix="tokenkl-") as folder:
                for index, path in enumerate(await self._output_files(entry, job)):
                    local = Path(folder) / f"{index}.jsonl"
                    await self._bucket.download(path, local)
                    for result in reader.read(local):
                        if isinstance(result, Score) or result.final:
                            answered.add(result.key)
                            yield result
                        else:
                            work.failures[result.key] = result
                    local.unlink()
        finally:  # what one file answered is answered, though the next cannot be had
            work.rows = work.rows.without(answered)
        reader.log_oddities(job.name)
        work.note_end(job)

    async def _output_files(self, entry: JobEntry, job: RemoteJob) -> list[str]:
        """The output of a job, which may appear a little after its end; looked for below our prefix in any case."""
        until = time.monotonic() + self.options.output_deadline_s
        while True:
            folder = job.output_directory or f"gs://{self._bucket_name}/{entry.output_prefix}"
            files = await self._bucket.output_files(folder)
            awaited = lacks_shards(files) if files else job.has_output
            if not awaited or time.monotonic() > until:
                return files
            await asyncio.sleep(min(self.options.poll_interval_s, _OUTPUT_POLL_S))
            job = await self._jobs.get(job.name) or job


class _GiveUpError(BackendError):
    """The wait for a job ended without its rows; the job itself may go on."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def _is_terminal(job: RemoteJob) -> bool:
    try:
        return job.terminal
    except BackendError as error:
        raise _GiveUpError("unknown-state", str(error)) from error


def _job_id(name: str) -> str:
    return name.rsplit("/", 1)[-1]


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.")[:80] or "responses"
