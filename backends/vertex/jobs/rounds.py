"""Round after round of batch jobs, until all rows are answered, left to a later run, or given up."""

from __future__ import annotations

import asyncio
import logging
import re
import tempfile
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from backends.base import NOT_SUBMITTED, WAITING
from backends.errors import BackendError, ModelNotUsableError, RetryableBackendError
from backends.scores.raw_log import RawLog
from backends.vertex.jobs.bucket import BatchBucket, OtherContentError, lacks_shards
from backends.vertex.jobs.ledger import JobEntry, JobLedger, job_paths
from backends.vertex.jobs.remote import DELETED, BatchJobs, RemoteJob
from backends.vertex.jobs.rows import OutputReader, RowSet, split_rows
from backends.vertex.jobs.work import BatchWork, Stage, ended_first
from backends.vertex.options import VertexBatchOptions
from backends.vertex.service.retry import DailyQuotaError, StatusError
from kl.records import Score, ScoreFailure

logger = logging.getLogger(__name__)

# The first look at a job, and how the pauses grow with the time waited, up to ``poll_interval_s``.
_FIRST_POLL_S = 1.0
_POLL_SHARE = 0.25
_OUTPUT_POLL_S = 2.0
_UPLOAD_NAMES = 5
# What passes by itself: a later look may find an answer.
_PASSING_REASONS = frozenset({"daily-quota", "deadline", "unknown-state", "service-error", "refused"})


class JobRounds:
    """Makes, finds, watches and reads the jobs of one place (project, location, bucket).

    Parameters
    ----------
    options : VertexBatchOptions
    place : str
    ledger : JobLedger
    jobs : BatchJobs
    bucket : BatchBucket
    raw : RawLog, optional
        Keeps every row as it came.
    """

    def __init__(
        self,
        options: VertexBatchOptions,
        place: str,
        ledger: JobLedger,
        jobs: BatchJobs,
        bucket: BatchBucket,
        raw: RawLog | None,
    ) -> None:
        self.options = options
        self.place = place
        self.reported: dict[str, dict[str, Any]] = {}
        self.making: set[str] = set()
        self._ledger = ledger
        self._jobs = jobs
        self._bucket = bucket
        self._raw = raw
        self._slots = asyncio.Semaphore(options.max_jobs_in_flight)
        self._quota_used: str | None = None

    def work(self, rows: RowSet, stage: Stage) -> Iterator[BatchWork]:
        """Rows that an earlier job may answer, by that job; the rest, by the service's limits."""
        by_job: dict[str | None, list[str]] = {}
        for key in rows.keys:
            entry = self._ledger.newest(self.place, key)
            by_job.setdefault(entry.job_key if entry is not None else None, []).append(key)
        fresh = by_job.pop(None, [])
        for job_key, keys in by_job.items():
            yield BatchWork(rows.only(keys), self._ledger.get(job_key or ""), stage)
        for part in split_rows(rows.only(fresh), self.options.max_rows_per_job, self.options.max_file_bytes):
            yield BatchWork(part, None, stage)

    async def results(self, work: BatchWork) -> AsyncGenerator[Score | ScoreFailure]:
        """Every row's result; what befalls one job is a failure of its rows and of no others."""
        while work.rows.keys and not work.given_up:
            async with self._slots:
                try:
                    async with aclosing(self._round(work)) as results:
                        async for result in results:
                            yield result
                except ModelNotUsableError:
                    raise
                except BackendError as error:
                    self._give_up(work, error)
        for failure in work.unanswered():
            yield failure

    async def _round(self, work: BatchWork) -> AsyncGenerator[Score | ScoreFailure]:
        """Read the jobs that are to answer these rows, or make one; what they leave out stays in ``work``."""
        entry, jobs = await self._jobs_for(work)
        if entry is None:
            return
        if not jobs:
            job = await self._make(entry, work.rows)
            work.attempts += 1
            entry, jobs = await self._update(entry, job_name=job.name, state=job.state, maker=None), [job]
            logger.info("batch job %s: %d rows, %s", job.name, len(work.rows.keys), job.state)
        is_news = not entry.ended
        for job in sorted(jobs, key=ended_first):
            if not work.rows.keys:
                break
            job = await self._watch(job, entry, work.stage)
            # What a job that was read left out may be asked anew only when it is known what that is.
            if (work.stage == "submit" and is_news) or not _is_over(job):
                work.leave_to(job, entry.keys)
                return
            async with aclosing(self._read(entry, job, work)) as results:
                async for result in results:
                    yield result
            entry = replace(entry, job_name=job.name, state=job.state)
        await self._update(entry, ended=True, maker=None)
        work.read.add(entry.job_key)
        work.close_refused()
        if is_news:
            self._note_quota(work)

    def _note_quota(self, work: BatchWork) -> None:
        quota = next((item for item in work.open_failures() if item.reason == "daily-quota"), None)
        if quota is not None and self._quota_used is None:
            self._quota_used = quota.message
            logger.error("%s No further batch job is made in this run; run again tomorrow.", quota.message)

    async def _jobs_for(self, work: BatchWork) -> tuple[JobEntry | None, list[RemoteJob]]:
        """All jobs there are for these rows, of an earlier run or of the name that a new one gets; a claim, if none.

        None if no job is to be made for them: ``work`` says why.
        """
        earlier, work.earlier = work.earlier, None
        if earlier is not None:
            found = await self._find(earlier)
            if found:
                names = ", ".join(f"{job.name} ({job.state})" for job in found)
                logger.info("attaching to batch job %s of an earlier run", names)
                return await self._attached(earlier, work.stage), found
        if work.stage == "collect" and not (await self._is_known(work) and self._may_follow_up(work)):
            return None, []
        known_absent = earlier.job_key if earlier is not None and not earlier.ended else None
        entry, jobs = await self._claimed(work, known_absent)
        return (entry, jobs) if jobs or await self._may_make(work, entry) else (None, [])

    async def _update(self, entry: JobEntry, **changes: Any) -> JobEntry:
        return await asyncio.to_thread(self._ledger.update, replace(entry, **changes))

    async def _attached(self, entry: JobEntry, stage: Stage) -> JobEntry:
        """A run that waits for a job is the one that leaves or cancels it when it is stopped."""
        if stage != "run" or entry.ended:
            return entry
        return await self._update(entry, flow_run_id=self._ledger.flow_run_id)

    async def _claimed(self, work: BatchWork, known_absent: str | None) -> tuple[JobEntry, list[RemoteJob]]:
        """The job of these rows and, unless it is for this process to make it, what there is of it."""
        rows, name = work.rows, _slug(work.rows.name)
        while True:
            entry, mine = await self._claim(work, name)
            try:
                found = [] if mine and entry.job_key == known_absent else await self._find(entry)
                if found:
                    last = found[-1]
                    return await self._update(entry, job_name=last.name, state=last.state, maker=None), found
                if mine and set(entry.keys) != set(rows.keys):
                    return await asyncio.to_thread(self._ledger.replaced, entry, rows.keys, name), []
            except BaseException:
                if mine:
                    self._ledger.release(entry)
                raise
            if mine:
                return entry, []
            if entry.ended:
                work.read.add(entry.job_key)  # nothing is left of it
            else:
                await asyncio.sleep(_FIRST_POLL_S)  # another process is making it

    async def _claim(self, work: BatchWork, name: str) -> tuple[JobEntry, bool]:
        claim = asyncio.ensure_future(
            asyncio.to_thread(self._ledger.claim, self.place, work.rows.keys, name, frozenset(work.read))
        )
        try:
            return await asyncio.shield(claim)
        except asyncio.CancelledError:
            claim.add_done_callback(self._unclaim)  # else others would wait for a job that nobody makes
            raise

    def _unclaim(self, claim: asyncio.Future[tuple[JobEntry, bool]]) -> None:
        if not claim.cancelled() and claim.exception() is None:
            entry, mine = claim.result()
            if mine:
                self._ledger.release(entry)

    async def _is_known(self, work: BatchWork) -> bool:
        """Whether a job was ever made for these rows; one that is not on record is found by its name."""
        if any(self._ledger.tries(self.place, key) for key in work.rows.keys):
            return True
        job_key = self._ledger.job_key(self.place, work.rows.keys)
        if await self._jobs.find(job_key):
            paths = job_paths(_slug(work.rows.name), job_key)
            await asyncio.to_thread(self._ledger.record, job_key, self.place, *paths, work.rows.keys)
            return True
        work.give_up(NOT_SUBMITTED, "no batch job was made for this row: --stage submit, or run, buys it.")
        return False

    def _may_follow_up(self, work: BatchWork) -> bool:
        """Close the rows for which as many jobs have ended as are allowed; whether any are left."""
        limit = self.options.max_attempts
        work.close([key for key in work.rows.keys if self._ledger.tries(self.place, key) >= limit])
        return bool(work.rows.keys)

    async def _may_make(self, work: BatchWork, entry: JobEntry) -> bool:
        work.given_up = work.attempts == self.options.max_attempts
        if self._quota_used is None and not work.given_up:
            return True
        await asyncio.to_thread(self._ledger.release, entry)
        if self._quota_used is not None:
            raise DailyQuotaError(self._quota_used)
        return False

    def _give_up(self, work: BatchWork, error: BackendError) -> None:
        reason, message = self._why_given_up(error)
        entry = self._ledger.newest(self.place, work.rows.keys[0])
        overdue = entry is not None and entry.age_s > self.options.wait_deadline_s
        if work.stage == "collect" and reason in _PASSING_REASONS and not overdue:
            work.give_up(WAITING, message)
        else:
            work.give_up(reason, message)

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

    async def _find(self, entry: JobEntry) -> list[RemoteJob]:
        found = await self._jobs.find(entry.job_key)
        if entry.job_name is None or any(_job_id(job.name) == _job_id(entry.job_name) for job in found):
            return found
        # It was made, for its name is on record; a list may be behind, and a job that was deleted left its output.
        job = await self._jobs.get(entry.job_name)
        return [*found, job or RemoteJob(entry.job_name, entry.job_key, DELETED, "")]

    async def _make(self, entry: JobEntry, rows: RowSet) -> RemoteJob:
        self.making.add(entry.job_key)
        try:
            uri = await self._upload(entry, rows)
            destination = f"gs://{self._bucket.name}/{entry.output_prefix}"
            job = await self._jobs.create(rows.model, uri, destination, entry.job_key)
        except BaseException:
            self._ledger.release(entry)
            raise
        self._note(job, len(rows.keys))
        self.making.discard(entry.job_key)
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
        self.reported[job.name] = known

    async def _watch(self, job: RemoteJob, entry: JobEntry, stage: Stage) -> RemoteJob:
        """The job when it has ended; as it is now, where it is not waited for."""
        began = time.monotonic()
        while True:
            self._note(job, rows=len(entry.keys))
            if stage == "submit" or _is_over(job):
                return job
            waited = time.monotonic() - began if stage == "run" else entry.age_s
            if waited > self.options.wait_deadline_s:
                raise _GiveUpError(
                    "deadline",
                    f"batch job {job.name} is still {job.state} after {self.options.wait_deadline_s:g} s "
                    "(wait_deadline_s); it goes on, and the next run attaches to it.",
                )
            if stage == "collect":
                return job
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
        work.note_end(job, entry.keys)

    async def _output_files(self, entry: JobEntry, job: RemoteJob) -> list[str]:
        """The output of a job, which may appear a little after its end; looked for below our prefix in any case."""
        until = time.monotonic() + self.options.output_deadline_s
        while True:
            folder = job.output_directory or f"gs://{self._bucket.name}/{entry.output_prefix}"
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


def _is_over(job: RemoteJob) -> bool:
    """Whether nothing more will come of a job."""
    try:
        return job.state == DELETED or job.terminal
    except BackendError as error:
        raise _GiveUpError("unknown-state", str(error)) from error


def _job_id(name: str) -> str:
    return name.rsplit("/", 1)[-1]


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.")[:80] or "responses"
