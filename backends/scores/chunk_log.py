"""A log in a bucket, where nothing can be appended to: numbered objects, each written once."""

from __future__ import annotations

import logging
import threading
import uuid
from collections.abc import Callable
from pathlib import Path

from backends.errors import ConfigError, TokenKLError
from backends.storage import in_parallel, remove, write_bytes_atomic

logger = logging.getLogger(__name__)

_INTERVAL_S = 1.0
_TRIES = 2  # the storage's client has repeated each of them for about half a minute


def _unchanged(data: bytes) -> bytes:
    return data


class ChunkLog:
    """Bytes of several owners on their way into a remote folder, by a thread that is about a second behind.

    A kill loses what was added in the last second, and what an upload under way holds. An upload that fails is repeated
    and nothing is dropped; when it fails again, or for good, every further `add` raises why.

    Parameters
    ----------
    folder : Path
    suffix : str
        How the names of the objects end.
    pack : callable
        Applied to the content of each object, such as a compression.
    """

    def __init__(self, folder: Path, suffix: str, pack: Callable[[bytes], bytes] = _unchanged) -> None:
        self._folder = folder
        self._suffix = suffix
        self._pack = pack
        self._name = uuid.uuid4().hex
        self._number = 0
        self._waiting: list[tuple[str, bytes]] = []
        self._objects: dict[Path, set[str]] = {}  # → owners who may need it
        self._timer: threading.Timer | None = None
        self._failures = 0
        self._failure: Exception | None = None
        self._state = threading.Lock()
        self._uploading = threading.RLock()

    def add(self, owner: str, data: bytes) -> None:
        """Take over some bytes.

        Raises
        ------
        ConfigError, OSError
            If earlier ones could not be stored.
        """
        with self._state:
            self._waiting.append((owner, data))
            self._start_timer()
            failure = self._failure
        if failure is not None:
            raise failure

    def _start_timer(self) -> None:
        if self._timer is None:
            self._timer = threading.Timer(_INTERVAL_S, self._upload)
            self._timer.daemon = True
            self._timer.start()

    def _upload(self) -> None:
        with self._uploading:
            with self._state:
                batch = list(self._waiting)
            failure = self._store(batch) if batch else None
            with self._state:
                self._timer = None
                if failure is None:
                    del self._waiting[: len(batch)]
                    self._failures, self._failure = 0, None
                else:
                    self._failures += 1
                    if self._failures >= _TRIES or isinstance(failure, ConfigError):
                        self._failure = failure
                if self._waiting:
                    self._start_timer()

    def _store(self, batch: list[tuple[str, bytes]]) -> Exception | None:
        path = self._folder / f"{self._name}-{self._number:06d}{self._suffix}"
        try:
            write_bytes_atomic(path, self._pack(b"".join(data for _, data in batch)))
        except Exception as error:  # noqa: BLE001 - `add` raises it, nothing is lost
            logger.warning("%s; tried again", error)
            return error
        self._number += 1
        self._objects[path] = {owner for owner, _ in batch}
        return None

    def forget(self, owner: str) -> None:
        """What an owner added is not needed any more; objects that nobody needs are removed."""
        with self._uploading:
            with self._state:
                self._waiting = [item for item in self._waiting if item[0] != owner]
            for owners in self._objects.values():
                owners.discard(owner)
            idle = [path for path, owners in self._objects.items() if not owners]
            for path in idle:
                del self._objects[path]
        if idle:
            try:
                in_parallel(remove, idle)
            except (TokenKLError, OSError) as error:
                logger.warning("%s; the next run takes it in and removes it", error)

    def close(self) -> None:
        """Store what still waits.

        Raises
        ------
        ConfigError, OSError
            If that fails.
        """
        with self._uploading:
            self._upload()
            with self._state:
                timer, self._timer = self._timer, None
                left = bool(self._waiting)
                failure = self._failure
            if timer is not None:
                timer.cancel()
            if left:
                raise failure or OSError(f"{self._folder} could not be written")
