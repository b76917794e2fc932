"""Who may make a job, where several processes share one folder of records.

Two things, each a lock of the operating system on a disk and a lease in a bucket: the right to write claims, held for a
moment, and the sign of life of a process that makes jobs, held to its end. A claim of a process that shows no sign of
life any more is taken over.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from backends.errors import ConfigError
from backends.storage import Lease, LeaseHeldError, is_remote, remove

_PATIENCE_S = 900.0
# In a bucket it takes seconds to see a sign of life; one that was seen is good for so long.
_SEEN_S = 20.0


class Claims:
    """The claims of this process on the jobs of one folder.

    Parameters
    ----------
    folder : Path
        Where the locks are; made with the first claim.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._mutex = threading.RLock()
        self._token: str | None = None
        self._life: FileLock | Lease | None = None
        self._closed = False
        self._ended: set[str] = set()
        self._seen: dict[str, float] = {}

    @property
    def token(self) -> str:
        """The name of this process in its claims; from the first use on it shows a sign of life."""
        with self._mutex:
            if self._closed:  # by a stop, while this waited its turn: nobody would end the sign of life
                raise ConfigError("the run was stopped before it could claim a job; run it again.")
            if self._token is None:
                token = uuid.uuid4().hex
                self._life = self._hold(token)
                self._token = token
            return self._token

    @contextmanager
    def writing(self) -> Generator[None]:
        """While this is held, no other thread or process claims a job.

        Raises
        ------
        ConfigError
            If others hold it for minutes.
        """
        with self._mutex:
            path = self._folder / "claims"
            try:
                if is_remote(path):
                    lease = Lease(path)
                    lease.acquire(patience_s=_PATIENCE_S)
                    try:
                        yield
                    finally:
                        lease.release()
                    return
                self._folder.mkdir(parents=True, exist_ok=True)
                with FileLock(self._lock_file("claims"), timeout=_PATIENCE_S):
                    yield
            except (Timeout, LeaseHeldError) as error:
                raise ConfigError(f"{path} was held by another process for {_PATIENCE_S:.0f} s; try again.") from error

    def lives(self, token: str | None) -> bool:
        """Whether the process of a claim may still be making the job. In a bucket it may take half a minute to know."""
        with self._mutex:
            if token is None or token in self._ended:
                return False
            if token == self._token or time.monotonic() - self._seen.get(token, -_SEEN_S) < _SEEN_S:
                return True
            try:
                life = self._hold(token)
            except (Timeout, LeaseHeldError):
                if is_remote(self._folder):
                    self._seen[token] = time.monotonic()
                return True
            life.release()
            self._ended.add(token)
            self._forget(token)
            return False

    def close(self) -> None:
        """End the sign of life."""
        with self._mutex:
            if self._life is not None and self._token is not None:
                self._life.release()
                self._forget(self._token)
            self._life = self._token = None
            self._closed = True

    def _hold(self, token: str) -> FileLock | Lease:
        if is_remote(self._folder):
            lease = Lease(self._folder / token)
            lease.acquire()
            return lease
        self._folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self._lock_file(token), thread_local=False)  # taken and released by different threads
        lock.acquire(timeout=0)
        return lock

    def _forget(self, token: str) -> None:
        # Of a lease its last object stays, marked as released: a few bytes a run.
        if not is_remote(self._folder):
            with suppress(OSError):
                remove(self._lock_file(token))

    def _lock_file(self, name: str) -> Path:
        return self._folder / f"{name}.lock"
