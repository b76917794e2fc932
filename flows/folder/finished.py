"""A finished run, read back from its output folder: for analysis, for drift, and for whoever asks how it went."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl

from backends.errors import ConfigError
from backends.storage import exists, is_remote, kept_copy, read_bytes
from flows.folder.layout import OutputFolder
from kl.finished.between import QLists
from kl.finished.reading import Access, Documents, FinishedRunError, lists_in, read_run
from kl.finished.reading import read_documents as documents_of
from kl.finished.run import Run
from kl.finished.worst import PLACE, texts_before
from kl.statistics.drift import COLUMNS
from kl.tables.schemas import TOKENS

Rows = list[dict[str, Any]]


class ResponseTableFile(NamedTuple):
    """A response table as it was read, with the hash of its file."""

    sha256: str
    table: pl.DataFrame


def _is_folder(path: Path) -> bool:
    return is_remote(path) or path.is_dir()


def _is_file(path: Path) -> bool:
    return exists(path) if is_remote(path) else path.is_file()


_ANYWHERE = Access(_is_folder, exists, _is_file, read_bytes, kept_copy)


@contextmanager
def _as_config_error() -> Generator[None]:
    try:
        yield
    except FinishedRunError as error:
        raise ConfigError(str(error)) from error


def load_run(folder: Path, *, with_lists: bool = False) -> Run:
    """A finished run from its output folder, on a disk or in a bucket, whose tables are then read from copies.

    ``with_lists`` says whether the candidate table, the largest of them, is wanted, too.

    Raises
    ------
    ConfigError
        If there is no finished run, or its files were written by another version or do not belong together.
    """
    with _as_config_error():
        return read_run(folder, _ANYWHERE, with_lists=with_lists)


def read_documents(folder: Path) -> Documents:
    """The summary and the record of a finished run, of whatever version wrote them.

    Raises
    ------
    ConfigError
        If there is no finished run, or a document cannot be read.
    """
    with _as_config_error():
        return documents_of(folder, _ANYWHERE)


def read_response_table(folder: Path) -> ResponseTableFile:
    """The response table in an output folder, read whole; of an unfinished run too.

    Raises
    ------
    FileNotFoundError
        If there is none.
    ConfigError
        If it cannot be read, or lacks columns.
    """
    path = OutputFolder(folder).responses
    data = read_bytes(path)
    try:
        table = pl.read_parquet(io.BytesIO(data))
        lacking = [name for name in COLUMNS if name not in table.columns]
    except (pl.exceptions.PolarsError, OSError) as error:
        raise ConfigError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    if lacking:
        raise ConfigError(f"{path} was written by another version (no {', '.join(lacking)}).")
    return ResponseTableFile(hashlib.sha256(data).hexdigest(), table.select(COLUMNS))


def q_lists(folder: Path, name: str) -> QLists:
    """What Q listed in the run of an output folder, be the run at its end or not; ``name`` is what errors call it.

    Raises
    ------
    ConfigError
        If the run kept no lists, or its files were written by another version.
    """
    with _as_config_error():
        return QLists(name, *lists_in(folder, _ANYWHERE))


def worst_positions(run: Run, top: int) -> Rows:
    """Rows of `kl.finished.worst.worst_positions`."""
    return run.worst_positions(top).to_dicts()


def with_texts_before(tokens: pl.LazyFrame, rows: Rows) -> Rows:
    """Rows of the token table, each with the text ``before`` it."""
    if not rows:
        return []
    places = pl.DataFrame(
        [{name: row[name] for name in PLACE} for row in rows], schema={name: TOKENS[name] for name in PLACE}
    )
    found = places.join(texts_before(tokens, places), on=PLACE, how="left", maintain_order="left")["before"]
    return [row | {"before": text} for row, text in zip(rows, found, strict=True)]


def worst_responses(run: Run, top: int) -> Rows:
    """Rows of `kl.finished.worst.worst_responses`."""
    return run.worst_responses(top).to_dicts()
