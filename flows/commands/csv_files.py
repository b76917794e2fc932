"""Tables as CSV files: unrounded, texts as they are, nothing where a value is not known."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import polars as pl

from backends.errors import ConfigError
from backends.storage import as_location, write_bytes_atomic
from flows.folder.finished import Rows

ENDING = ".csv"


class CsvTable(NamedTuple):
    """What becomes a file ``NAME.csv``; a list in a cell becomes a text with ``; `` between its items."""

    name: str
    columns: Sequence[str]
    rows: Rows


def write_csv(place: str, tables: Sequence[CsvTable]) -> list[str]:
    """Write tables to a folder, a file each; a single one to ``place`` itself where that ends with ``.csv``.

    Returns
    -------
    list of str
        The files, local or remote.

    Raises
    ------
    ConfigError
        If a file cannot be written.
    """
    target = as_location(place)
    is_file = place.endswith(ENDING) and len(tables) == 1
    written: list[str] = []
    for table in tables:
        path = target if is_file else target / f"{table.name}{ENDING}"
        try:
            write_bytes_atomic(path, _bytes_of(table))
        except OSError as error:
            raise ConfigError(f"{path} cannot be written: {error.strerror or error}.") from error
        written.append(str(path))
    return written


def _bytes_of(table: CsvTable) -> bytes:
    rows = [{name: _cell(row[name]) for name in table.columns} for row in table.rows]
    # strict=False: a column may hold numbers and texts, which become texts.
    frame = pl.DataFrame(rows, schema=list(table.columns), infer_schema_length=None, strict=False)
    return frame.write_csv().encode("utf-8")


def _cell(value: object) -> object:
    return "; ".join(map(str, value)) if isinstance(value, list | tuple) else value
