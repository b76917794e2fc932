"""Lines in safety the moment they are added: a file that grows, or a share in the one log of a remote folder."""

from __future__ import annotations

import io
import os
import threading
import time
from contextlib import suppress
from pathlib import Path

from backends.scores.chunk_log import ChunkLog
from backends.storage import is_remote
from kl.output.room import named_when_refused

SUFFIX = ".jsonl"
_SYNC_INTERVAL_S = 1.0

_logs: dict[tuple[int, str], ChunkLog] = {}
_logs_lock = threading.Lock()


def lines_in(folder: Path, name: str) -> LocalLines | RemoteLines:
    """The lines of that name in a folder.

    On a disk a line reaches the operating system before `append` returns, so that killing the process loses none; the
    disk is told about once a second. In a bucket lines are about a second behind.

    Parameters
    ----------
    folder : Path
        Made with the first line.
    name : str
        Free among those open.
    """
    return RemoteLines(folder, name) if is_remote(folder) else LocalLines(folder / f"{name}{SUFFIX}")


class LocalLines:
    """A file that lines are appended to."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: io.BufferedWriter | None = None
        self._synced = 0.0

    def append(self, line: bytes) -> None:
        """Add a line, with its end. One that the disk refuses is added with the next."""
        with named_when_refused(self._path):
            if self._file is None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._file = self._path.open("ab")
                self._synced = time.monotonic()
            self._file.write(line)
            self._file.flush()
            if time.monotonic() - self._synced > _SYNC_INTERVAL_S:
                os.fsync(self._file.fileno())
                self._synced = time.monotonic()

    def clear(self) -> None:
        """Forget the lines."""
        if self._file is not None:
            with suppress(OSError):  # what the disk refused is still to be written, and is not wanted any more
                self._file.close()
            self._file = None
        self._path.unlink(missing_ok=True)


class RemoteLines:
    """A share in the one log that a process keeps in a remote folder."""

    def __init__(self, folder: Path, name: str) -> None:
        self._name = name
        with _logs_lock:
            self._log = _logs.setdefault((os.getpid(), str(folder)), ChunkLog(folder, SUFFIX))

    def append(self, line: bytes) -> None:
        """Add a line, with its end."""
        self._log.add(self._name, line)

    def clear(self) -> None:
        """Forget the lines."""
        self._log.forget(self._name)
