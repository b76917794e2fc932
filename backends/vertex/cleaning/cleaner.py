"""Old batch files in the bucket: found, judged job by job, deleted; and the bucket's own rule that does the same.

A file is deleted only if its name is one that `vertex_batch` gives, all files of its job are old, no run still has to
read it, and the service says that no job of its key is under way. What cannot be decided is kept.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from datetime import datetime, timedelta
from typing import Any, Self, TypeVar

import google.api_core.exceptions
from google.cloud import storage

from backends.errors import BackendError, ConfigError
from backends.service.retry import StatusError
from backends.vertex.cleaning.inventory import PREFIXES, Action, BucketFile, Decision, Deletion, Inventory, Totals
from backends.vertex.cleaning.lifecycle import LifecycleState, lifecycle_state, read_rules, write_rule
from backends.vertex.jobs.remote import BatchJobs, RemoteJob
from backends.vertex.service.client import make_client
from backends.vertex.service.retry import translated, with_retries

T = TypeVar("T")
logger = logging.getLogger(__name__)

# 72 hours in the queue, then 24 hours of work: limits of the batch service.
LONGEST_JOB = timedelta(hours=96)

_FIELDS = "items(name,size,timeCreated,generation),nextPageToken"
_PAGE_SIZE = 1000
_PARALLEL_CALLS = 8  # the storage client keeps 10 connections
_MAX_FAILURES_IN_A_ROW = 20
_SECONDS_BETWEEN_LINES = 10.0
_OBJECT_ROLE = "roles/storage.objectAdmin"
_BUCKET_ROLE = "roles/storage.admin"


class BucketCleaner:
    """The batch files of one bucket; an asynchronous context manager.

    Parameters
    ----------
    project_id, location : str
        Where the jobs of the files are looked up.
    bucket : str
        Its name.
    deadline_s, timeout_s : float
        How long one call is repeated under faults; when one call counts as lost.
    """

    def __init__(self, project_id: str, location: str, bucket: str, deadline_s: float, timeout_s: float) -> None:
        self.bucket = bucket
        self.location = location
        self._project_id = project_id
        self._deadline_s, self._timeout_s = deadline_s, timeout_s
        self._lookup_failed = False

    async def __aenter__(self) -> Self:
        with translated("connect to Cloud Storage"):
            self._storage: Any = storage.Client(project=self._project_id)
        try:
            self._handle: Any = self._storage.bucket(self.bucket)
        except ValueError as error:
            raise ConfigError(f"{self.bucket!r} is not the name of a bucket: {error}") from error
        self._vertex = make_client(self._project_id, self.location, self._timeout_s)
        self._jobs = BatchJobs(self._vertex, self._project_id, self.location, self._deadline_s, self._timeout_s)
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._vertex.aclose()
        self._storage.close()

    async def take_inventory(self, older_than: timedelta, now: datetime, unread: Mapping[str, str]) -> Inventory | None:
        """List the batch files and decide, job by job, what may go; nothing is changed.

        ``unread`` says which jobs a run still has to read, by key, and which run. None if there is no such bucket.

        Raises
        ------
        BackendError
            If the files cannot be listed.
        """
        inventory = Inventory(cutoff=now - older_than)
        try:
            await self._list_into(inventory)
        except StatusError as error:
            if error.status == 404:
                return None
            raise
        to_ask: list[str] = []
        for key, totals in inventory.jobs.items():
            assert totals.newest is not None
            if totals.newest > inventory.cutoff:
                inventory.decisions[key] = Decision(
                    Action.KEEP, "not older than asked, or part of a job with newer files"
                )
            elif key in unread:
                reason = f"the run in {unread[key]} has not read all rows of its batch job"
                inventory.decisions[key] = Decision(Action.KEEP, reason)
            else:
                to_ask.append(key)

        await self._ask(to_ask, inventory, now)
        return inventory

    async def _list_into(self, inventory: Inventory) -> None:
        listed, lines = 0, _Pace()
        for prefix in PREFIXES:
            async for page in self._pages(prefix):
                for file in page:
                    inventory.add(prefix, file)
                listed += len(page)
                if lines.due():
                    logger.info("gs://%s: %d files listed", self.bucket, listed)

    async def _ask(self, keys: list[str], inventory: Inventory, now: datetime) -> None:
        asked, lines = 0, _Pace()

        async def ask(key: str) -> None:
            nonlocal asked
            inventory.decisions[key] = await self._judge(key, inventory.jobs[key], now)
            asked += 1
            if lines.due():
                logger.info("batch jobs looked up: %d of %d", asked, len(keys))

        await _in_parallel(keys, ask)

    async def _judge(self, key: str, files: Totals, now: datetime) -> Decision:
        """What the service says of a job decides over its files."""
        unknown = Decision(Action.UNDECIDED, "the state of the batch job could not be learnt")
        if self._lookup_failed:
            return unknown
        try:
            jobs = await self._jobs.find(key)
        except BackendError as error:
            # Each of thousands of look-ups would wait as long for the same refusal.
            if not self._lookup_failed:
                logger.warning("%s. The files of all jobs that are not known to have ended are kept.", error)
            self._lookup_failed = True
            return unknown
        return self._decide(jobs, files, now)

    def _decide(self, jobs: list[RemoteJob], files: Totals, now: datetime) -> Decision:
        if not jobs:
            assert files.newest is not None
            if now - files.newest <= LONGEST_JOB:
                return Decision(
                    Action.KEEP, f"no such batch job in {self.location}; younger than 4 days, it may run elsewhere"
                )
            return Decision(Action.DELETE, f"no such batch job in {self.location}, and no job lasts that long")
        for job in jobs:
            try:
                ended = job.terminal
            except BackendError as error:
                logger.warning("%s", error)
                return Decision(Action.UNDECIDED, f"the batch job is in the state {job.state!r}, which is not known")
            if not ended:
                return Decision(Action.KEEP, f"the batch job is {job.state}")
        return Decision(Action.DELETE, "the batch job has ended")

    async def _pages(self, prefix: str) -> AsyncIterator[list[BucketFile]]:
        token: str | None = None
        while True:
            page, token = await self._run(
                f"list gs://{self.bucket}/{prefix}", lambda token=token: self._page(prefix, token), _OBJECT_ROLE
            )
            yield page
            if not token:
                return

    def _page(self, prefix: str, token: str | None) -> tuple[list[BucketFile], str | None]:
        listing = self._storage.list_blobs(
            self.bucket, prefix=prefix, page_token=token, page_size=_PAGE_SIZE, fields=_FIELDS, retry=None
        )
        page = [BucketFile(blob.name, blob.size, blob.time_created, blob.generation) for blob in next(listing.pages)]
        return page, listing.next_page_token

    async def delete(self, inventory: Inventory, advance: Callable[[int], None]) -> Deletion:
        """Delete what is to go by an inventory; ``advance`` is told of every file that was dealt with.

        Raises
        ------
        BackendError
            If the files cannot be listed, or one deletion after the other fails.
        """
        done = Deletion()
        failures_in_a_row = 0

        async def delete(file: BucketFile) -> None:
            nonlocal failures_in_a_row
            failed_before = done.failed
            await self._delete(file, done)
            failures_in_a_row = failures_in_a_row + 1 if done.failed > failed_before else 0
            if failures_in_a_row >= _MAX_FAILURES_IN_A_ROW:
                raise BackendError(
                    f"{done.last_failure} Given up after {failures_in_a_row} failures in a row; "
                    f"{done.deleted.files:,} files were deleted before."
                )
            advance(1)

        # Listed again, so that memory holds a page of names and not all of them.
        for prefix in PREFIXES:
            async for page in self._pages(prefix):
                await _in_parallel((file for file in page if inventory.deletes(file)), delete)
        return done

    async def _delete(self, file: BucketFile, done: Deletion) -> None:
        try:
            gone = await self._run(
                f"delete gs://{self.bucket}/{file.name}", lambda: self._delete_once(file), _OBJECT_ROLE
            )
        except BackendError as error:
            logger.warning("%s", error)
            done.failed += 1
            done.last_failure = str(error)
            return
        if gone:
            done.deleted.add(file)
        else:
            done.replaced += 1

    def _delete_once(self, file: BucketFile) -> bool:
        """Whether the object is gone; False if another one has taken its name meanwhile."""
        try:
            self._handle.blob(file.name).delete(if_generation_match=file.generation, retry=None)
        except google.api_core.exceptions.NotFound:
            return True
        except google.api_core.exceptions.PreconditionFailed:
            # Also the answer to a repeated call whose first answer was lost.
            return self._handle.get_blob(file.name, retry=None) is None
        return True

    async def lifecycle(self, days: int) -> LifecycleState:
        """How the bucket's rules compare with a rule that deletes batch files after ``days``."""
        rules = await self._run(
            f"read the rules of gs://{self.bucket}", lambda: read_rules(self._storage, self.bucket), _BUCKET_ROLE
        )
        return lifecycle_state(rules, PREFIXES, days)

    async def set_lifecycle(self, days: int) -> None:
        """Give the bucket the rule that deletes batch files after ``days``; other rules stay as they are."""
        await self._run(
            f"set the rules of gs://{self.bucket}",
            lambda: write_rule(self._storage, self.bucket, PREFIXES, days),
            _BUCKET_ROLE,
        )

    async def _run(self, what: str, operation: Callable[[], T], role: str) -> T:
        try:
            return await with_retries(lambda: asyncio.to_thread(operation), what=what, deadline_s=self._deadline_s)
        except StatusError as error:
            if error.status in (401, 403):
                message = f"{error}. {role} on the bucket gives the right to do this."
                raise StatusError(message, status=error.status) from error
            raise


class _Pace:
    """A line of progress now and then."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def due(self) -> bool:
        """Whether it is time for the next line."""
        if time.monotonic() - self._last < _SECONDS_BETWEEN_LINES:
            return False
        self._last = time.monotonic()
        return True


async def _in_parallel(items: Iterable[T], work: Callable[[T], Awaitable[None]]) -> None:
    source = iter(items)

    async def worker() -> None:
        for item in source:
            await work(item)

    workers = [asyncio.create_task(worker()) for _ in range(_PARALLEL_CALLS)]
    try:
        await asyncio.gather(*workers)
    finally:
        for task in workers:
            task.cancel()
