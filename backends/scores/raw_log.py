"""The service's own rows, kept on request: compressed, one line each, under the key of the score read from it."""

from __future__ import annotations

import gzip
import json
import time
import uuid
import zlib
from collections.abc import Iterator
from io import FileIO
from pathlib import Path
from typing import Any

from backends.scores.chunk_log import ChunkLog
from backends.storage import files_in, is_remote, local_copies
from kl.output.room import named_when_refused

_GZIP = 16 + zlib.MAX_WBITS
_SUFFIX = ".jsonl.gz"
_FLUSH_INTERVAL_S = 1.0
_READ_BYTES = 1 << 20


class RawLog:
    """The ``.jsonl.gz`` files of a process; what they hold survives a kill but for about the last second.

    On a disk it is one file; in a bucket it is one for each second in which rows came.

    Parameters
    ----------
    folder : Path
        Made with the first row.
    """

    def __init__(self, folder: Path) -> None:
        self._log = ChunkLog(folder, _SUFFIX, gzip.compress) if is_remote(folder) else _GrowingFile(folder)

    def add(self, key: str, row: dict[str, Any]) -> None:
        """Append a row as the service wrote it."""
        line = json.dumps({"key": key, "row": row}, separators=(",", ":")) + "\n"
        self._log.add("", line.encode("ascii"))

    def close(self) -> None:
        """Finish the file.

        Raises
        ------
        ConfigError, OSError
            If rows could not be stored.
        """
        self._log.close()


class _GrowingFile:
    """A compressed file that lines are appended to."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / f"{uuid.uuid4().hex}{_SUFFIX}"
        self._file: FileIO | None = None
        self._unwritten = bytearray()  # what the disk refused is written with the next row
        self._packer = zlib.compressobj(wbits=_GZIP)
        self._flushed = 0.0

    def add(self, owner: str, line: bytes) -> None:
        self._unwritten += self._packer.compress(line)
        if time.monotonic() - self._flushed > _FLUSH_INTERVAL_S:
            self._unwritten += self._packer.flush(zlib.Z_SYNC_FLUSH)
            self._flushed = time.monotonic()
        self._write()

    def close(self) -> None:
        if self._file is not None or self._unwritten:
            self._unwritten += self._packer.flush()
            try:
                self._write()
            finally:
                if self._file is not None:
                    self._file.close()
                self._file = None

    def _write(self) -> None:
        with named_when_refused(self._path):
            if self._file is None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._file = self._path.open("wb", buffering=0)
            while self._unwritten:
                n_written = self._file.write(self._unwritten)
                del self._unwritten[:n_written]


def holds_raw(folder: Path) -> bool:
    """Whether rows were kept in a folder."""
    return bool(files_in(folder, _SUFFIX))


def read_raw(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(key, row) of every row kept in a folder; the end of a file that a kill cut short is left out."""
    for _, copy in local_copies(files_in(folder, _SUFFIX)):
        rest = b""
        for block in _blocks(copy):
            *lines, rest = (rest + block).split(b"\n")
            for line in lines:
                entry = json.loads(line)
                yield entry["key"], entry["row"]


def _blocks(path: Path) -> Iterator[bytes]:
    unpacker = zlib.decompressobj(wbits=_GZIP)
    with path.open("rb") as file:
        while block := file.read(_READ_BYTES):
            yield unpacker.decompress(block)
