"""Vertex AI batch prediction, the default backend: half the price, thousands of requests a job.

Rows → JSONL in the bucket → batch job → poll → output rows matched by key. What a job did not answer goes into a
follow-up job, a bounded number of times; what finished is kept whatever the job's state. `jobs.rounds` has the rounds.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Self

from backends.base import BackendOptions, Capabilities, Sample, SampleRequest, SampleSettings, ScoreRequest
from backends.errors import ConfigError
from backends.service.merging import merged
from backends.vertex import wire
from backends.vertex.gemini import GeminiBackend
from backends.vertex.jobs.bucket import BatchBucket, check_bucket_name
from backends.vertex.jobs.ledger import JobLedger
from backends.vertex.jobs.remote import PENDING_STATES, BatchJobs
from backends.vertex.jobs.rounds import JobRounds
from backends.vertex.jobs.rows import A, RowSet, sample_rows, score_rows
from backends.vertex.jobs.work import Stage
from backends.vertex.options import NEEDS, VertexBatchOptions
from backends.vertex.prices import BATCH_SHARE
from backends.vertex.service.client import check_location, make_client, model_calls, require_project
from backends.vertex.service.setup import INSTEAD
from kl.records import Score, ScoreFailure

__all__ = ["VertexBatchBackend", "VertexBatchOptions"]

_CALLS_AT_ONCE = 8  # that prove that a model can be used, and count tokens


class VertexBatchBackend(GeminiBackend):
    """Scores and samples through batch prediction jobs."""

    Options: ClassVar[type[BackendOptions]] = VertexBatchOptions
    name = "vertex_batch"
    needs = (NEEDS,)
    capabilities: ClassVar[Capabilities] = Capabilities(
        max_top_logprobs=wire.MAX_TOP_LOGPROBS, samples=True, deferred=True
    )
    options: VertexBatchOptions
    price_share = BATCH_SHARE

    def __init__(self, options: VertexBatchOptions, state_dir: Path | None = None) -> None:
        super().__init__(options, state_dir)
        project = require_project(options.project_id, INSTEAD)
        location = check_location(options.location)
        bucket = check_bucket_name(options.bucket_name or f"{project}-kl-batch")
        if state_dir is None:
            raise ConfigError("vertex_batch needs a folder in which it records its jobs.")
        self._place = f"{project}/{location}/{bucket}"
        self._project, self._location, self._bucket_name = project, location, bucket
        self._jobs_dir = state_dir / "jobs"
        self._rounds: JobRounds | None = None
        self._only_looks = False

    @cached_property
    def _ledger(self) -> JobLedger:
        """Read when it is first needed: settings are checked before anything is, and it may lie in a bucket."""
        return JobLedger(self._jobs_dir)

    async def __aenter__(self) -> Self:
        options = self.options
        self._client = make_client(self._project, self._location, options.request_timeout_s)
        self._models = model_calls(self._project, self._location, options.request_timeout_s, max_calls=_CALLS_AT_ONCE)
        self._jobs = BatchJobs(
            self._client, self._project, self._location, options.retry_deadline_s, options.request_timeout_s
        )
        self._bucket = BatchBucket(self._project, self._location, self._bucket_name, options.retry_deadline_s)
        self._ledger.flow_run_id = self.run_id
        self._rounds = JobRounds(
            options,
            self._place,
            self._ledger,
            self._jobs,
            self._bucket,
            self._raw,
            self._quota_used,
            self.check_lock,
        )
        return self

    async def __aexit__(self, *exc: object) -> None:
        if self._rounds is not None:
            self._rounds.log.say()
        self._bucket.close()
        await self._client.aclose()
        await super().__aexit__(*exc)

    def parallel_groups(self) -> int:
        """One group per job in flight."""
        return self.options.max_jobs_in_flight

    def in_flight(self) -> Mapping[str, str]:
        """Keys in jobs that this output folder has on record."""
        return self._ledger.in_flight(self._place)

    def report(self) -> dict[str, Any]:
        """The jobs of this run with their states."""
        return {"bucket": self._bucket_name, "jobs": list(self._rounds.reported.values()) if self._rounds else []}

    async def interrupted(self) -> str | None:
        """Leave the jobs that still run, or cancel them, as ``on_cancel`` says."""
        if self._rounds is None:
            return None
        running = self._running()
        if self.options.on_cancel == "leave" or self._only_looks:
            return _left(running)
        # A job whose creation was under way may have been made.
        looked_up = await asyncio.gather(*map(self._jobs.find, self._rounds.making), return_exceptions=True)
        found = [job.name for answer in looked_up if not isinstance(answer, BaseException) for job in answer]
        return await self._cancel([*running, *found])

    def _running(self) -> list[str]:
        jobs = self._rounds.reported.values() if self._rounds is not None else ()
        return [str(job["name"]) for job in jobs if job["state"] in PENDING_STATES]

    def going_on(self) -> str | None:
        """The jobs that still ran when they were looked at last."""
        return _left(self._running())

    async def abandoned(self, run_id: str) -> str | None:
        """Leave the jobs on record that the run made or waited for, or cancel those that still run."""
        entries = [
            entry
            for entry in self._ledger.entries()
            if entry.flow_run_id == run_id and entry.backend_place == self._place and not entry.ended
        ]
        if self.options.on_cancel == "leave":
            return _left([entry.job_name for entry in entries if entry.job_name is not None])
        found = await asyncio.gather(*(self._jobs.find(entry.job_key) for entry in entries))
        return await self._cancel(
            [job.name for jobs in found for job in jobs if job.state in PENDING_STATES and job.state != "CANCELLING"]
        )

    async def _cancel(self, names: Sequence[str]) -> str | None:
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
        version = await super().preflight(model)
        await self._bucket.ensure()
        return version

    async def score(self, requests: Sequence[ScoreRequest]) -> AsyncIterator[Score | ScoreFailure]:
        """Ask for all positions in as few jobs as the limits allow, and follow up on what they leave out."""
        async with aclosing(self._results(score_rows(requests), "run")) as results:
            async for result in results:
                yield result

    async def submit(self, requests: Sequence[ScoreRequest]) -> AsyncIterator[Score | ScoreFailure]:
        """Make the jobs that `score` would make first."""
        async with aclosing(self._results(score_rows(requests), "submit")) as results:
            async for result in results:
                yield result

    async def collect(self, requests: Sequence[ScoreRequest]) -> AsyncIterator[Score | ScoreFailure]:
        """Read the jobs that have ended, and make follow-up jobs for what they left out."""
        self._only_looks = True
        async with aclosing(self._results(score_rows(requests), "collect")) as results:
            async for result in results:
                yield result

    async def sample(self, requests: Sequence[SampleRequest]) -> AsyncIterator[Sample | ScoreFailure]:
        """Ask for all responses, a row each, in as few jobs as the limits allow; follow up on what they leave out."""
        async with aclosing(self._results(sample_rows(requests), "run")) as results:
            async for result in results:
                yield result

    async def preflight_sampling(self, model: str, settings: SampleSettings) -> str | None:
        """One tiny online request for a response, and the bucket."""
        version = await super().preflight_sampling(model, settings)
        await self._bucket.ensure()
        return version

    def _check_elsewhere(self, keys: Sequence[str]) -> None:
        """Refuse to buy what jobs at another place, with another location or bucket, were to answer.

        Raises
        ------
        ConfigError
            With that place.
        """
        left = self._ledger.left_elsewhere(self._place, keys)
        if left:
            n, place = len(set(keys).intersection(*[{key for job in left for key in job.keys}])), left[0].backend_place
            raise ConfigError(
                f"{n} of these contexts are in {len(left)} batch jobs in {place} (project/location/bucket) that were "
                f"not read yet; in {self._place} they would be bought again. Run with that project, location and "
                f"bucket to take them in, or move their records ({self._ledger.folder / left[0].job_key}.json …) away."
            )

    async def _results(self, rows: RowSet[A], stage: Stage) -> AsyncGenerator[A | ScoreFailure]:
        assert self._rounds is not None, "enter the backend first"
        self._check_elsewhere(rows.keys)
        await self._bucket.ensure()
        work = [self._rounds.results(part) for part in self._rounds.work(rows, stage)]
        async with aclosing(merged(work)) as results:
            async for result in results:
                yield result


def _left(names: Sequence[str]) -> str | None:
    """What is said of jobs that go on; None if there are none."""
    if not names:
        return None
    return (
        f"{len(names)} batch jobs go on and are charged; the same command, run again, takes in what they answer: "
        f"{', '.join(names)}"
    )
