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
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import Field

from backends import gemini
from backends.base import Backend, BackendOptions, Capabilities, ScoreRequest
from backends.batch_rows import OutputReader, RowSet, read_row, split_rows
from backends.bucket import BatchBucket
from backends.errors import BackendError, ConfigError
from backends.gemini_calls import prove_usable
from backends.job_ledger import JobEntry, JobLedger
from backends.merging import merged
from backends.prices import BATCH_SHARE, Price, price_of, token_cost
from backends.raw_log import RawLog
from backends.vertex_client import PENDING_STATES, BatchJobs, RemoteJob, check_location, make_client, require_project
from kl.records import Score, ScoreFailure

logger = logging.getLogger(__name__)

# Refusals that a repeated job meets again: no permission, no such model, no credentials.
_FINAL_ERROR_CODES = frozenset({5, 7, 16, 401, 403, 404})


class VertexBatchOptions(BackendOptions):
    """Settings of the backend ``vertex_batch``."""

    project_id: str | None = Field(default=None, description="Google Cloud project. Default: GOOGLE_CLOUD_PROJECT.")
    location: str = Field(default="us-central1", min_length=1, description="Vertex AI location of the jobs.")
    bucket_name: str | None = Field(
        default=None, description="Bucket for batch files; made when absent. Default: {project_id}-kl-batch."
    )
    poll_interval_s: float = Field(
        default=10.0, gt=0, le=3600, description="Seconds between looks at a job, above 0, up to 3600."
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
        default=6, ge=1, le=20, description="Jobs that may be made for a row before it is given up, 1 to 20."
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


@dataclass(frozen=True, slots=True)
class _Ended:
    """A job in a terminal state, with its ledger entry."""

    entry: JobEntry
    job: RemoteJob


class VertexBatchBackend(Backend):
    """Scores through batch prediction jobs."""

    Options: ClassVar[type[BackendOptions]] = VertexBatchOptions
    capabilities: ClassVar[Capabilities] = Capabilities(max_top_logprobs=gemini.MAX_TOP_LOGPROBS)
    options: VertexBatchOptions

    def __init__(self, options: VertexBatchOptions, state_dir: Path | None = None) -> None:
        super().__init__(options, state_dir)
        project = require_project(options.project_id)
        location = check_location(options.location)
        bucket = options.bucket_name or f"{project}-kl-batch"
        if state_dir is None:
            raise ConfigError("vertex_batch needs a folder in which it records its jobs.")
        self._place = f"{project}/{location}/{bucket}"
        self._project, self._location, self._bucket_name = project, location, bucket
        self._ledger = JobLedger(state_dir / "jobs")
        # Jobs that this run records itself are waited for where they are made.
        self._earlier = self._ledger.in_flight(self._place)
        self._raw = RawLog(state_dir / "raw") if options.keep_raw else None
        self._reported: dict[str, dict[str, Any]] = {}

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
        await self._client.aio.aclose()
        self._client.close()
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
        if not names:
            return None
        if self.options.on_cancel == "leave":
            return f"{len(names)} batch jobs go on and are charged; the next run fetches them: {', '.join(names)}"
        await asyncio.gather(*(self._jobs.cancel(name) for name in names))
        return f"{len(names)} batch jobs were cancelled; the next run fetches what they finished: {', '.join(names)}"

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

    async def _score_rows(self, rows: RowSet) -> AsyncIterator[Score | ScoreFailure]:
        failures: dict[str, ScoreFailure] = {}
        earlier = self._ledger.get(self._earlier.get(rows.keys[0], ""))
        attempts = 0
        while rows.keys:
            async with self._slots:
                try:
                    ended = await self._attach(earlier) if earlier else None
                    if ended is None:
                        if attempts == self.options.max_attempts:
                            break
                        attempts += 1
                        ended = await self._submit(rows)
                except _GiveUp as error:
                    failures.update({key: ScoreFailure(key, error.reason, str(error)) for key in rows.keys})
                    break
                earlier = None
                answered: set[str] = set()
                async for result in self._read(ended, rows):
                    if isinstance(result, Score) or result.final:
                        answered.add(result.key)
                        yield result
                    else:
                        failures[result.key] = result
            rows = rows.without(answered)
            self._note_job_error(ended, rows, failures)
            self._ledger.update(replace(ended.entry, ended=True, state=ended.job.state))
            if rows.keys and ended.job.error_code in _FINAL_ERROR_CODES:
                break
        for key in rows.keys:
            yield failures[key]

    def _note_job_error(self, ended: _Ended, rows: RowSet, failures: dict[str, ScoreFailure]) -> None:
        job = ended.job
        if not rows.keys:
            return
        logger.warning(
            "batch job %s ended %s with %d rows unanswered%s",
            job.name, job.state, len(rows.keys), f": {job.error}" if job.error else "",
        )  # fmt: skip
        for key in rows.keys:
            if job.error:
                failures[key] = ScoreFailure(key, "job-failed", f"batch job {job.name} ended {job.state}: {job.error}")
            elif key not in failures:
                failures[key] = ScoreFailure(
                    key, "missing-row", f"batch job {job.name} ended {job.state} without an answer to this row."
                )

    async def _attach(self, entry: JobEntry) -> _Ended | None:
        """Wait for a job of an earlier run; None if it was never made, or is gone."""
        found = await self._jobs.find(entry.job_key)
        if not found:
            return None
        logger.info("attaching to batch job %s of an earlier run (%s)", found[-1].name, found[-1].state)
        return _Ended(entry, await self._wait(found[-1], rows=len(entry.keys)))

    async def _submit(self, rows: RowSet) -> _Ended:
        job_key = self._ledger.job_key(self._place, rows.keys)
        file_name = f"{_slug(rows.name)}_{job_key}"
        entry = self._ledger.record(
            job_key, self._place, f"batch_input/{file_name}.jsonl", f"batch_output/{file_name}", list(rows.keys)
        )
        found = await self._jobs.find(job_key)
        if found:
            job = found[-1]
        else:
            uri = await self._bucket.upload_once(entry.input_path, rows)
            destination = f"gs://{self._bucket_name}/{entry.output_prefix}"
            job = await self._jobs.create(rows.model, uri, destination, job_key)
        entry = self._ledger.update(replace(entry, job_name=job.name, state=job.state))
        logger.info("batch job %s: %d rows, %s", job.name, len(rows.keys), job.state)
        return _Ended(entry, await self._wait(job, rows=len(rows.keys)))

    async def _wait(self, job: RemoteJob, rows: int) -> RemoteJob:
        until = time.monotonic() + self.options.wait_deadline_s
        while True:
            known = {"name": job.name, "display_name": job.display_name, "state": job.state, "rows": rows}
            self._reported[job.name] = known
            try:
                if job.terminal:
                    return job
            except BackendError as error:
                raise _GiveUp("unknown-state", str(error)) from error
            if time.monotonic() > until:
                raise _GiveUp(
                    "deadline",
                    f"batch job {job.name} is still {job.state} after {self.options.wait_deadline_s:g} s "
                    "(wait_deadline_s); it goes on, and the next run attaches to it.",
                )
            await asyncio.sleep(self.options.poll_interval_s)
            job = await self._jobs.get(job.name)

    async def _read(self, ended: _Ended, rows: RowSet) -> AsyncIterator[Score | ScoreFailure]:
        reader = OutputReader(rows, self._raw)
        with tempfile.TemporaryDirectory(prefix="tokenkl-") as folder:
            for index, path in enumerate(await self._output_files(ended.job)):
                local = Path(folder) / f"{index}.jsonl"
                await self._bucket.download(path, local)
                for result in reader.read(local):
                    yield result
                local.unlink()
        reader.log_oddities(ended.job.name)

    async def _output_files(self, job: RemoteJob) -> list[str]:
        """The output of a job, which may appear a little after its end."""
        until = time.monotonic() + self.options.output_deadline_s
        while True:
            files = await self._bucket.output_files(job.output_directory) if job.output_directory else []
            if files or not job.has_output or time.monotonic() > until:
                return files
            await asyncio.sleep(min(self.options.poll_interval_s, 5.0))
            job = await self._jobs.get(job.name)


class _GiveUp(Exception):
    """The wait for a job ended without its rows; the job itself may go on."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.")[:80] or "responses"
