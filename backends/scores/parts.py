"""A part of the table of scores: proven by the checksum in its name, or checked row by row.

A part that this program wrote is called by a hash of its keys and the checksum of its bytes. Where both agree nothing
else need be looked at. Where they do not, it was written anew by another program, whose damage shows in its rows, or
a disk has changed it: of a thousand flipped bits fifty give other numbers without an error, the others no table at all.
So of one that shows damage the sound rows are kept, and of one that shows none somebody must say what it is. Parts of
other names (of earlier versions, of other programs) are checked each time.
"""

from __future__ import annotations

import hashlib
import io
import re
import zlib
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

import polars as pl

from backends.scores.damage import misfit, parted
from backends.scores.rows import ADDED, SCORES
from backends.storage import COPIES, StoredFile, is_remote

_PROVEN = re.compile(r"[0-9a-f]{16}-([0-9a-f]{8})\.parquet")
ROWS_TOGETHER = 4096  # of a row group: fewer are not read alone
_NO_ROWS = pl.DataFrame(schema={**SCORES, "why": pl.String})
# A panic of Polars on garbage is none of Python's exceptions.
_UNREADABLE = (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError, ValueError)


def packed(frame: pl.DataFrame) -> tuple[str, bytes]:
    """A table of scores as the name and the content of a part."""
    content = io.BytesIO()
    frame.write_parquet(content, compression="zstd", row_group_size=ROWS_TOGETHER)
    return proven_name(frame, content.getvalue()), content.getvalue()


def proven_name(frame: pl.DataFrame, content: bytes) -> str:
    """What a part with these rows is called."""
    keys = "".join(frame["key"].drop_nulls()) + "".join(frame["exact_versus"].drop_nulls())
    digest = hashlib.sha256(keys.encode("utf-8", "surrogatepass")).hexdigest()[:16]
    return f"{digest}-{zlib.crc32(content):08x}.parquet"


class Part:
    """A part that was read.

    Attributes
    ----------
    broken : str or None
        Why it is no table of scores; then it has no rows.
    proven : bool
        Whether it is as it was written.
    changed : bool
        Whether it is not, and shows no damage: nothing says whether somebody changed it, or a disk.
    damaged : pl.DataFrame
        The rows that cannot be used, with ``why``.
    """

    def __init__(self, name: str, content: bytes) -> None:
        self._content: bytes | None = content
        self._file: tuple[StoredFile, tuple[int, int]] | None = None
        self.broken: str | None = None
        self.damaged = _NO_ROWS
        self._sound: pl.DataFrame | None = None
        written = _PROVEN.fullmatch(name)
        self.proven = written is not None and int(written[1], 16) == zlib.crc32(content)
        if not self.proven:
            self._check()
        self.changed = written is not None and not self.proven and not self.is_harmed

    def _check(self) -> None:
        try:
            schema = self._schema()
            self.broken = misfit(schema)
            if self.broken is not None:
                return
            columns = [name for name in SCORES.names() if name in schema]
            frame = self._columns(columns).cast({name: SCORES[name] for name in columns})
            self._sound, self.damaged = parted(_with_absent(frame, SCORES.names()))
        except _UNREADABLE as error:
            self.broken = " ".join(str(error).split()) or type(error).__name__

    @property
    def is_harmed(self) -> bool:
        """Whether there is anything in it that cannot be used."""
        return self.broken is not None or not self.damaged.is_empty()

    def name_to_prove(self) -> str | None:
        """Under which name it would be proven, if it is sound and only lacks that."""
        if self._sound is None or self.is_harmed or self.changed:
            return None
        is_own = all(SCORES.get(name) == dtype for name, dtype in self._schema().items())
        return proven_name(self._sound, self._content) if is_own and self._content is not None else None

    def let_go(self, file: StoredFile) -> None:
        """Hold the content no longer, if it is proven: what is read from now on is read from the file, a copy of it."""
        if not self.proven:
            return
        with COPIES.open(file) as path:
            self._file = file, _state(file, path)
        self._content = None

    @property
    def n_bytes(self) -> int:
        """What it holds in memory."""
        held = 0 if self._content is None else len(self._content)
        return held + (0 if self._sound is None else int(self._sound.estimated_size()))

    def rows(self, columns: Sequence[str], start: int = 0, n: int | None = None) -> pl.DataFrame:
        """Some columns of the rows that can be used, ``n`` of them from row ``start`` on; default all.

        Raises
        ------
        OSError
            After `let_go`, if the file cannot be read; FileNotFoundError also if it was changed.
        """
        if self.broken is not None:
            return pl.DataFrame(schema={name: SCORES[name] for name in columns})
        if self._sound is not None:
            return self._sound.select(columns).slice(start, n)
        return self._columns(columns, start, n)

    def _schema(self) -> dict[str, pl.DataType]:
        with self._source() as source:
            return pl.read_parquet_schema(source)

    def _columns(self, columns: Sequence[str], start: int = 0, n: int | None = None) -> pl.DataFrame:
        with self._source() as source:
            scan = pl.scan_parquet(source, glob=False, hive_partitioning=False).slice(start, n)
            absent = set[str]()
            if added := ADDED.intersection(columns):  # parts of earlier versions lack them
                absent = added.difference(scan.collect_schema())
            held = (pl.lit(None, SCORES[name]).alias(name) if name in absent else pl.col(name) for name in columns)
            return scan.select(held).collect()

    @contextmanager
    def _source(self) -> Generator[io.BytesIO | Path]:
        if self._content is not None:
            yield io.BytesIO(self._content)
            return
        assert self._file is not None, "the content is let go for a file"
        file, state = self._file
        with COPIES.open(file) as path:
            if _state(file, path) != state:
                raise FileNotFoundError(f"{file.path} is another file than a moment ago")
            yield path


def _state(file: StoredFile, path: Path) -> tuple[int, int]:
    """What changes if a file is written anew; of a copy of a remote one, which has a version, its size."""
    stat = path.stat()
    return stat.st_size, 0 if is_remote(file.path) else stat.st_mtime_ns


def _with_absent(frame: pl.DataFrame, columns: Sequence[str]) -> pl.DataFrame:
    absent = [pl.lit(None, SCORES[name]).alias(name) for name in columns if name not in frame.columns]
    return frame.with_columns(absent).select(columns)
