"""Round after round of batch jobs, until all rows are answered, left to a later run, or given up."""

from __future__ import annotations

import asyncio
import logging
import re
import tempfile
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from backends.base import NOT_SUBMITTED, WAITING
from backends.errors import BackendError, ModelNotUsableError, RetryableBackendError
from backends.scores.raw_log import RawLog
from backends.service.breaker import NOT_ASKED, AskingStoppedError
from backends.service.retry import StatusError
from backends.vertex.jobs.bucket import BatchBucket, OtherContentError, lacks_shards
from backends.vertex.jobs.ledger import JobEntry, JobLedger, job_paths
from backends.vertex.jobs.remote import DELETED, BatchJobs, RemoteJob
from backends.vertex.jobs.rows import A, OutputReader, RowSet, split_rows
from backends.vertex.jobs.waves import WaveLog
from backends.vertex.jobs.work import BatchWork, Stage, ended_first
from backends.vertex.options import VertexBatchOptions
from backends.vertex.service.retry import DailyQuotaError
from backends.vertex.wire import model_id
from kl.records import ScoreFailure

logger = logging.getLogger(__name__)

# The first look at a job, and how the pauses grow with the time waited, up to ``poll_interval_s``.
_FIRST_POLL_S = 1.0
_POLL_SHARE = 0.125
_OUTPUT_POLL_S = 2.0
# In looks, before a job for rows of which the last one answered none: the service may be setting itself up.
_FIRST_PAUSE, _LONGEST_PAUSE = 3, 30
_UPLOAD_NAMES = 5
# What passes by itself: a later look may find an answer.
_PASSING_REASONS = frozenset({"daily-quota", "deadline", "unknown-state", "service-error", "refused", NOT_ASKED})
# Jobs, or uploads for them, that are refused one after the other until no more are tried.
_REFUSED_IN_A_ROW = 3


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
    quota_used : dict
        Base model → how the service said that its daily quota is used up: no further job asks it in this run.
    check_lock : callable
        Raises if another process may be making the same jobs by now.
    """

    def __init__(
        self,
        options: VertexBatchOptions,
        place: str,
        ledger: JobLedger,
        jobs: BatchJobs,
        bucket: BatchBucket,
        raw: RawLog | None,
        quota_used: dict[str, str],
        check_lock: Callable[[], None],
    ) -> None:
        self.options = options
        self.place = place
        self.reported: dict[str, dict[str, Any]] = {}
        self.log = WaveLog()
        # Job key → that the making has ended; what may have been made without this process learning it stays here.
        self.making: dict[str, asyncio.Event] = {}
        self._ledger = ledger
        self._jobs = jobs
        self._bucket = bucket
        self._raw = raw
        self._slots = asyncio.Semaphore(options.max_jobs_in_flight)
        self._quota_used = quota_used
        self._check_lock = check_lock
        self._n_refused: Counter[str] = Counter()  # in a row, by model
        self._refused: dict[str, str] = {}

    def work(self, rows: RowSet[A], stage: Stage) -> Iterator[BatchWork[A]]:
        """Rows that an earlier job may answer, by that job; the rest, by the service's limits."""
        by_job = rows.by(self._job_on_record)
        fresh = by_job.pop(None, None)
        for part in by_job.values():
            yield BatchWork(part, stage)
        if fresh is not None:
            for part in split_rows(fresh, self.options.max_rows_per_job, self.options.max_file_bytes):
                yield BatchWork(part, stage)

    def _job_on_record(self, key: str) -> str | None:
        entry = self._ledger.newest(self.place, key)
        return None if entry is None else entry.job_key

    async def results(self, work: BatchWork[A]) -> AsyncGenerator[A | ScoreFailure]:
        """Every row's result; what befalls one job is a failure of its rows and of no others."""
        while work.rows.keys and not work.given_up:
            await self._pause(work)
            async with self._slots:
                try:
                    async with aclosing(self._round(work)) as results:
                        async for result in results:
                            yield result
                except ModelNotUsableError:
                    raise
                except BackendError as error:
                    if isinstance(error, StatusError):
                        self._note_refusal(error, model_id(work.rows.model))
                    self._give_up(work, error)
        for failure in work.unanswered():
            yield failure

    async def _pause(self, work: BatchWork[A]) -> None:
        """Before rows are asked again of which the last job answered none."""
        is_last = work.attempts == self.options.max_attempts or model_id(work.rows.model) in self._quota_used
        if not work.barren or work.stage != "run" or is_last:
            return
        pause_s = self.options.poll_interval_s * min(_LONGEST_PAUSE, _FIRST_PAUSE * 2 ** (work.barren - 1))
        logger.info("%s: the last job answered none of its rows; the next is made in %g s", work.rows.name, pause_s)
        await asyncio.sleep(pause_s)

    async def _round(self, work: BatchWork[A]) -> AsyncGenerator[A | ScoreFailure]:
        """Read the jobs that are to answer these rows, or make one; what they leave out stays in ``work``."""
        found = await self._jobs_for(work)
        if found is None:
            return
        entry, jobs = found
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
        await self._update(entry, ended=True)
        work.read.add(entry.job_key)
        work.close_refused()
        if is_news:
            self._note_quota(work)

    def _note_quota(self, work: BatchWork[A]) -> None:
        quota = next((item for item in work.open_failures() if item.reason == "daily-quota"), None)
        model = model_id(work.rows.model) if quota is not None else ""
        if quota is not None and model not in self._quota_used:
            self._quota_used[model] = quota.message
            logger.error("%s No further batch job asks %s in this run; run again tomorrow.", quota.message, model)

    async def _jobs_for(self, work: BatchWork[A]) -> tuple[JobEntry, list[RemoteJob]] | None:
        """All jobs there are for these rows, or the one that is made for them; None where ``work`` says why not."""
        while True:
            entry = await self._on_record(work)
            if entry is None and work.stage == "collect" and not self._was_tried(work):
                entry = await self._by_name(work)
            if entry is not None and (found := await self._find(entry)):
                return await self._attached(entry, found, work.stage), found
            if not self._may_make(work):
                return None
            if entry == self._to_read(work) and not self._is_being_made(entry):  # still, after the look-ups
                return await self._made(entry, work)

    def _to_read(self, work: BatchWork[A]) -> JobEntry | None:
        return self._ledger.to_read(self.place, work.rows.keys, work.read)

    async def _on_record(self, work: BatchWork[A]) -> JobEntry | None:
        """The job on record that is to be read for these rows; one that is just being made is waited for."""
        while (entry := self._to_read(work)) is not None and self._is_being_made(entry):
            await self.making[entry.job_key].wait()
        return entry

    def _is_being_made(self, entry: JobEntry | None) -> bool:
        made = self.making.get(entry.job_key) if entry is not None else None
        return made is not None and not made.is_set()

    def _was_tried(self, work: BatchWork[A]) -> bool:
        return any(self._ledger.tries(self.place, key) for key in work.rows.keys)

    async def _by_name(self, work: BatchWork[A]) -> JobEntry | None:
        """A job of these rows that is not on record; it is put there."""
        job_key = self._ledger.job_key(self.place, work.rows.keys)
        if not await self._jobs.find(job_key):
            return None
        paths = job_paths(_slug(work.rows.name), job_key)
        return await asyncio.to_thread(self._ledger.record, job_key, self.place, *paths, work.rows.keys)

    async def _attached(self, entry: JobEntry, found: list[RemoteJob], stage: Stage) -> JobEntry:
        changes: dict[str, Any] = {}
        if entry.job_name is None:
            changes |= {"job_name": found[-1].name, "state": found[-1].state}
        # A run that waits for a job is the one that leaves or cancels it when it is stopped.
        if stage == "run" and not entry.ended and entry.flow_run_id != self._ledger.flow_run_id:
            changes["flow_run_id"] = self._ledger.flow_run_id
        return await self._update(entry, **changes) if changes else entry

    async def _update(self, entry: JobEntry, **changes: Any) -> JobEntry:
        return await asyncio.to_thread(self._ledger.update, replace(entry, **changes))

    def _may_make(self, work: BatchWork[A]) -> bool:
        """Whether another job may be made; rows for which none may are closed or given up."""
        if work.stage == "collect":
            if not self._was_tried(work):
                work.give_up(NOT_SUBMITTED, "no batch job was made for this row: --stage submit, or run, buys it.")
                return False
            limit = self.options.max_attempts
            work.close([key for key in work.rows.keys if self._ledger.tries(self.place, key) >= limit])
            if not work.rows.keys:
                return False
        if (used := self._quota_used.get(model_id(work.rows.model))) is not None:
            raise DailyQuotaError(used)
        self._check_allowed(model_id(work.rows.model))
        work.given_up = work.attempts == self.options.max_attempts
        return not work.given_up

    async def _made(self, left: JobEntry | None, work: BatchWork[A]) -> tuple[JobEntry, list[RemoteJob]]:
        """A job for these rows: one that a killed run recorded and did not make, or a new one.

        It is on record before it is made. A job of its name may exist all the same, of a run that had another folder.
        """
        rows = work.rows
        if left is not None and not left.ended and set(left.keys) == set(rows.keys):
            entry, is_new = replace(left, flow_run_id=self._ledger.flow_run_id, refused=False), left.refused
        else:
            entry, is_new = self._ledger.next_entry(self.place, rows.keys, _slug(rows.name)), True
        made = self.making[entry.job_key] = asyncio.Event()
        try:
            entry = await self._update(entry)
            found = await self._find(entry) if is_new else []
            if not found:
                try:
                    found = [await self._make(entry, rows, work.attempts + 1)]
                except StatusError:
                    if is_new:  # else a run that was killed may have made it, though no list shows it yet
                        await self._update(entry, refused=True)
                    raise
                work.attempts += 1
            entry = await self._update(entry, job_name=found[-1].name, state=found[-1].state)
        finally:
            made.set()
        del self.making[entry.job_key]
        return entry, found

    def _give_up(self, work: BatchWork[A], error: BackendError) -> None:
        if isinstance(error, DailyQuotaError):
            self._quota_used.setdefault(model_id(work.rows.model), str(error))
        reason, message = self._why_given_up(error)
        entry = self._ledger.newest(self.place, work.rows.keys[0])
        overdue = entry is not None and entry.age_s > self.options.wait_deadline_s
        if work.stage == "collect" and reason in _PASSING_REASONS and not overdue:
            work.give_up(WAITING, message)
        else:
            work.give_up(reason, message)

    def _why_given_up(self, error: BackendError) -> tuple[str, str]:
        if isinstance(error, JobGivenUpError):
            return error.reason, str(error)
        if isinstance(error, DailyQuotaError):
            return "daily-quota", str(error)
        if isinstance(error, RetryableBackendError):
            given_up = f"given up after {self.options.retry_deadline_s:g} s (retry_deadline_s)"
            return "deadline", f"{error}; {given_up}; the next run takes it up again."
        if isinstance(error, AskingStoppedError):
            return NOT_ASKED, str(error)
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

    async def _make(self, entry: JobEntry, rows: RowSet[A], wave: int) -> RemoteJob:
        uri = await self._upload(entry, rows)
        self._check_allowed(model_id(rows.model))  # others may have been refused meanwhile
        self._check_lock()  # an upload may take longer than a lock is kept for a process that was held up
        destination = f"gs://{self._bucket.name}/{entry.output_prefix}"
        job = await self._jobs.create(rows.model, uri, destination, entry.job_key)
        self._n_refused[model_id(rows.model)] = 0
        self._note(job, len(rows.keys), wave)
        return job

    def _check_allowed(self, model: str) -> None:
        if (refused := self._refused.get(model)) is not None:
            raise AskingStoppedError(refused)

    def _note_refusal(self, error: StatusError, model: str) -> None:
        if error.status not in (401, 403):
            return
        self._n_refused[model] += 1
        if self._n_refused[model] >= _REFUSED_IN_A_ROW and model not in self._refused:
            self._refused[model] = (
                f"{error}; {self._n_refused[model]} jobs were refused one after the other, so that no more are made in "
                "this run. Mend the credentials or rights and run again: it asks for what is missing alone."
            )
            logger.error("%s", self._refused[model])

    async def _upload(self, entry: JobEntry, rows: RowSet[A]) -> str:
        # A name may be taken: by the same rows in another order, of a run that was killed before it made the job (files
        # were renamed since), or by an upload that went wrong. Rows are matched by key, so that any name will do.
        name, _, key = entry.input_path.rpartition("_")
        for number in range(_UPLOAD_NAMES):
            with suppress(OtherContentError):
                path = f"{name}-{number}_{key}" if number else entry.input_path
                return await self._bucket.upload_once(path, rows)
        raise OtherContentError(f"{_UPLOAD_NAMES} objects like {entry.input_path} exist with other content.")

    def _note(self, job: RemoteJob, rows: int, wave: int | None = None) -> None:
        known = {"name": job.name, "display_name": job.display_name, "state": job.state, "rows": rows}
        self.reported[job.name] = known
        self.log.note(job.name, rows, job.state, wave)

    async def _watch(self, job: RemoteJob, entry: JobEntry, stage: Stage) -> RemoteJob:
        """The job when it has ended; as it is now, where it is not waited for."""
        began = time.monotonic()
        while True:
            self._note(job, rows=len(entry.keys))
            if stage == "submit" or _is_over(job):
                return job
            waited = time.monotonic() - began if stage == "run" else entry.age_s
            if waited > self.options.wait_deadline_s:
                raise JobGivenUpError(
                    "deadline",
                    f"batch job {job.name} is still {job.state} after {self.options.wait_deadline_s:g} s "
                    "(wait_deadline_s); it goes on, and the next run attaches to it.",
                )
            if stage == "collect":
                return job
            # Small jobs may be done in seconds, large ones take hours.
            await asyncio.sleep(min(self.options.poll_interval_s, max(_FIRST_POLL_S, waited * _POLL_SHARE)))
            job = await self._jobs.get(job.name) or replace(job, state=DELETED, output_directory=None)

    async def _read(self, entry: JobEntry, job: RemoteJob, work: BatchWork[A]) -> AsyncGenerator[A | ScoreFailure]:
        reader = OutputReader(work.rows, self._raw)
        answered: set[str] = set()
        try:
            with tempfile.TemporaryDirectory(prefix="tokenkl-") as folder:
                for index, path in enumerate(await self._output_files(entry, job)):
                    local = Path(folder) / f"{index}.jsonl"
                    await self._bucket.download(path, local)
                    for result in reader.read(local):
                        if not isinstance(result, ScoreFailure) or result.final:
                            answered.add(result.key)
                            yield result
                        else:
                            work.failures[result.key] = result
                    local.unlink()
        finally:  # what one file answered is answered, though the next cannot be had
            work.rows = work.rows.without(answered)
        work.barren = 0 if answered else work.barren + 1
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


class JobGivenUpError(BackendError):
    """The wait for a job ended without its rows; the job itself may go on."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def _is_over(job: RemoteJob) -> bool:
    """Whether nothing more will come of a job."""
    try:
        return job.state == DELETED or job.terminal
    except BackendError as error:
        raise JobGivenUpError("unknown-state", str(error)) from error


def _job_id(name: str) -> str:
    return name.rsplit("/", 1)[-1]


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.")[:80] or "responses"
