"""The service's own rows, kept on request: compressed, one line each, under the key of the score read from it."""

from __future__ import annotations

import json
import time
import uuid
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

_GZIP = 16 + zlib.MAX_WBITS
_FLUSH_INTERVAL_S = 1.0
_READ_BYTES = 1 << 20


class RawLog:
    """One ``.jsonl.gz`` file of a process; what it holds survives a kill but for about the last second.

    Parameters
    ----------
    folder : Path
        Made with the first row.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / f"{uuid.uuid4().hex}.jsonl.gz"
        self._file: BinaryIO | None = None
        self._packer = zlib.compressobj(wbits=_GZIP)
        self._flushed = 0.0

    def add(self, key: str, row: dict[str, Any]) -> None:
        """Append a row as the service wrote it."""
        if self._file is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("wb")
        line = json.dumps({"key": key, "row": row}, separators=(",", ":")) + "\n"
        self._file.write(self._packer.compress(line.encode("ascii")))
        if time.monotonic() - self._flushed > _FLUSH_INTERVAL_S:
            self._file.write(self._packer.flush(zlib.Z_SYNC_FLUSH))
            self._file.flush()
            self._flushed = time.monotonic()

    def close(self) -> None:
        """Finish the file."""
        if self._file is not None:
            self._file.write(self._packer.flush())
            self._file.close()
            self._file = None


def read_raw(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(key, row) of every row kept below a folder; the end of a file that a kill cut short is left out."""
    for path in sorted(folder.glob("*.jsonl.gz")):
        rest = b""
        for block in _blocks(path):
            *lines, rest = (rest + block).split(b"\n")
            for line in lines:
                entry = json.loads(line)
                yield entry["key"], entry["row"]


def _blocks(path: Path) -> Iterator[bytes]:
    unpacker = zlib.decompressobj(wbits=_GZIP)
    with path.open("rb") as file:
        while block := file.read(_READ_BYTES):
            yield unpacker.decompress(block)
