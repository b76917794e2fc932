"""Batch files in Cloud Storage: made, written once, read back whole."""

from __future__ import annotations

import asyncio
import base64
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import google.api_core.exceptions
import google_crc32c
from google.cloud import storage
from google.cloud.storage import Blob
from google.cloud.storage.exceptions import InvalidResponse
from google.cloud.storage.retry import DEFAULT_RETRY

from backends.errors import BackendError, ConfigError, RetryableBackendError
from backends.service.retry import StatusError
from backends.vertex.service.retry import RENEWAL_S, translated, with_retries

T = TypeVar("T")

_PRECONDITION_FAILED = 412
_UPLOAD_CHUNK = 8 * 1024 * 1024
_READ_BYTES = 1024 * 1024
# Uploads hold a chunk each, downloads a file on disk; the storage client keeps ten connections.
_PARALLEL_TRANSFERS = 4
_PARALLEL_CALLS = 4
_OUTPUT_NAME = re.compile(r"(^|/)predictions?[^/]*\.jsonl(-\d+-of-\d+)?$")
_SHARD = re.compile(r"^(?P<stem>.*)-(?P<index>\d+)-of-(?P<count>\d+)")
_BUCKET_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]")
# A large file is many chunks; a fault of one is mended where it happens, by the storage client, for this long. Only
# when that fails, or the upload itself is lost, does the file start again from its beginning.
_CHUNK_RETRY = DEFAULT_RETRY.with_delay(initial=0.5, maximum=8.0)
_CHUNK_RETRY_S = 60.0
_UPLOAD_LOST = frozenset({404, 410})


class OtherContentError(BackendError):
    """An object of that name is there already, with other content."""


class BatchBucket:
    """One bucket, used from the event loop; the storage client itself is synchronous and runs in threads.

    Parameters
    ----------
    project_id, location, name : str
        The bucket is made in ``location`` when it is absent.
    deadline_s : float
        How long one operation is repeated under faults.
    """

    def __init__(self, project_id: str, location: str, name: str, deadline_s: float) -> None:
        self.name = name
        self._location = location
        self._deadline_s = deadline_s
        self._project_id = project_id
        self._client: Any = None
        self._ready = asyncio.Lock()
        self._refusal: BackendError | None = None
        self._transfers = asyncio.Semaphore(_PARALLEL_TRANSFERS)
        self._calls = asyncio.Semaphore(_PARALLEL_CALLS)

    async def ensure(self) -> None:
        """Make the bucket if it does not exist: uniform access, in the location of the jobs.

        What failed once, after all its repetitions, fails at once for all who ask later.
        """
        async with self._ready:
            if self._refusal is not None:
                raise self._refusal
            if self._client is not None:
                return
            with translated("connect to Cloud Storage"):
                client = await asyncio.to_thread(storage.Client, project=self._project_id)
            try:
                await self._run(f"look for the bucket {self.name}", lambda: self._ensure(client), self._calls)
            except BackendError as error:
                self._refusal = error
                raise
            self._client = client

    def _ensure(self, client: Any) -> None:
        try:
            self._look(client)
        except google.api_core.exceptions.NotFound:
            self._create(client)

    def _look(self, client: Any) -> None:
        # A read of one object name tells a bucket that is there from one that is not, with object rights alone.
        next(iter(client.list_blobs(self.name, prefix="batch_input/", max_results=1, retry=None)), None)

    def _create(self, client: Any) -> None:
        bucket = client.bucket(self.name)
        bucket.iam_configuration.uniform_bucket_level_access_enabled = True
        try:
            client.create_bucket(bucket, location=_bucket_location(self._location), retry=None)
        except google.api_core.exceptions.Conflict as error:
            # Another run may have made it just now; a bucket of somebody else cannot be read.
            try:
                self._look(client)
            except (google.api_core.exceptions.NotFound, google.api_core.exceptions.Forbidden):
                raise ConfigError(
                    f"the bucket {self.name} belongs to another project. Choose a name with --bucket-name."
                ) from error

    async def upload_once(self, path: str, lines: Iterable[bytes]) -> str:
        """Stream lines into an object that must not exist yet; the same content there already is success.

        ``lines`` is iterated once per attempt and must be repeatable. Returns the object's ``gs://`` address.
        """
        await self._run(f"upload gs://{self.name}/{path}", lambda: self._upload(path, lines), self._transfers)
        return f"gs://{self.name}/{path}"

    def _upload(self, path: str, lines: Iterable[bytes]) -> None:
        blob = self._client.bucket(self.name).blob(path)
        retry = _CHUNK_RETRY.with_timeout(min(_CHUNK_RETRY_S, self._deadline_s))
        try:
            with blob.open(
                "wb", chunk_size=_UPLOAD_CHUNK, if_generation_match=0, ignore_flush=True, retry=retry
            ) as file:
                for line in lines:
                    file.write(line)
        except google.api_core.exceptions.PreconditionFailed as error:
            self._accept_own_upload(blob, lines, error)
        except InvalidResponse as error:
            status = error.response.status_code
            if status in _UPLOAD_LOST:
                raise RetryableBackendError(f"the upload of gs://{self.name}/{path} was lost ({status})") from error
            if status != _PRECONDITION_FAILED:
                raise
            self._accept_own_upload(blob, lines, error)

    def _accept_own_upload(self, blob: Blob, lines: Iterable[bytes], error: Exception) -> None:
        # An upload whose answer was lost, or an earlier run's, left the same content; anything else must not be used.
        checksum = google_crc32c.Checksum()
        for line in lines:
            checksum.update(line)
        blob.reload(retry=None)  # pyright: ignore[reportArgumentType]  # None switches retries off
        if blob.crc32c != _base64(checksum):
            raise OtherContentError(
                f"gs://{self.name}/{blob.name} exists with other content. Delete it and run again."
            ) from error

    async def output_files(self, directory: str) -> list[str]:
        """Paths of the prediction files in a job's output folder; ``incremental_*`` files are not among them."""
        prefix = self.path_of(directory).rstrip("/") + "/"

        def names() -> list[str]:
            blobs = self._client.list_blobs(self.name, prefix=prefix, retry=None)
            return sorted(blob.name for blob in blobs if _OUTPUT_NAME.search(blob.name.removeprefix(prefix)))

        return await self._run(f"list {directory}", names, self._calls)

    async def download(self, path: str, target: Path) -> None:
        """Copy an object to a local file; its checksum is verified."""

        def copy() -> None:
            self._client.bucket(self.name).blob(path).download_to_filename(str(target), retry=None)

        await self._run(f"download gs://{self.name}/{path}", copy, self._transfers)

    def path_of(self, uri: str) -> str:
        """The path inside this bucket of a ``gs://`` address."""
        start = f"gs://{self.name}/"
        if not uri.startswith(start):
            raise BackendError(f"{uri} is not in the bucket {self.name}, from which alone results are read.")
        return uri.removeprefix(start)

    async def _run(self, what: str, operation: Callable[[], T], places: asyncio.Semaphore) -> T:
        async def attempt() -> T:
            async with places:
                return await asyncio.to_thread(operation)

        renewal_s = RENEWAL_S if self._client is not None else 0.0  # of wrong ones the first look shall tell at once
        try:
            return await with_retries(attempt, what=what, deadline_s=self._deadline_s, renewal_s=renewal_s)
        except StatusError as error:
            if error.status in (401, 403):
                raise StatusError(
                    f"{error}. Grant roles/storage.admin (or objectAdmin on an existing bucket) on {self.name}.",
                    status=error.status,
                ) from error
            raise

    def close(self) -> None:
        """Close the connections."""
        if self._client is not None:
            self._client.close()


def check_bucket_name(name: str) -> str:
    """Refuse a name that no bucket can have.

    Raises
    ------
    ConfigError
        With the value.
    """
    if not _BUCKET_NAME.fullmatch(name):
        raise ConfigError(
            f"{name!r} cannot be the name of a bucket (3 to 222 of a-z, 0-9, '-', '_' and '.'; no gs://). "
            "Choose one with --bucket-name."
        )
    return name


def lacks_shards(paths: Iterable[str]) -> bool:
    """Whether names such as ``…-00001-of-00003…`` speak of more files than there are."""
    found: dict[tuple[str, int], set[int]] = {}
    for path in paths:
        if match := _SHARD.match(path):
            found.setdefault((match["stem"], int(match["count"])), set()).add(int(match["index"]))
    return any(len(indices) < count for (_, count), indices in found.items())


def _bucket_location(location: str) -> str:
    # Jobs may run in the multi-regions "global", "us" and "eu"; buckets know only US, EU and regions.
    return "US" if location == "global" else location.upper() if location in ("us", "eu") else location


def _base64(checksum: Any) -> str:
    return base64.b64encode(checksum.digest()).decode("ascii")


def lines_of(path: Path) -> Iterator[bytes]:
    """The lines of a downloaded file, one in memory at a time."""
    with path.open("rb", buffering=_READ_BYTES) as file:
        yield from file
