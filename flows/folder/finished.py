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
from kl.finished.reading import Access, Documents, FinishedRunError, read_run
from kl.finished.reading import read_documents as documents_of
from kl.finished.run import Run
from kl.statistics.drift import COLUMNS
from kl.tables.schemas import TOKENS
from kl.tables.totals import IS_INFINITE, MEASURED

Rows = list[dict[str, Any]]

_PLACE = ["source_file", "response_idx", "position"]
_CONTEXT_TOKENS = 8  # shown before a position
_INFINITY = pl.lit(float("inf"))


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


def worst_positions(run: Run, top: int) -> Rows:
    """The measured positions with the largest KL, infinite ones first, each with the text ``before`` it.

    ``kl_estimate`` is ``None`` where the KL is infinite (``reason`` is ``infinite``).
    """
    place = _PLACE
    values = ("token", "kl_estimate", "kl_lower", "kl_upper_plausible", "logprob_p", "logprob_q", "reason")
    order = pl.when(IS_INFINITE).then(_INFINITY).otherwise("kl_estimate")
    measured = run.tokens.filter(MEASURED).select(*place, *values, order=order)
    ranked = measured.drop_nulls("order").sort(["order", *place], descending=[True, False, False, False])
    worst = ranked.head(top).drop("order").collect()
    return worst.join(_texts_before(run.tokens, worst), on=place, how="left", maintain_order="left").to_dicts()


def with_texts_before(tokens: pl.LazyFrame, rows: Rows) -> Rows:
    """Rows of the token table, each with the text ``before`` it."""
    if not rows:
        return []
    places = pl.DataFrame(
        [{name: row[name] for name in _PLACE} for row in rows], schema={name: TOKENS[name] for name in _PLACE}
    )
    before = _texts_before(tokens, places)
    found = places.join(before, on=_PLACE, how="left", maintain_order="left")["before"]
    return [row | {"before": text} for row, text in zip(rows, found, strict=True)]


def _texts_before(tokens: pl.LazyFrame, places: pl.DataFrame) -> pl.DataFrame:
    keys = ("source_file", "response_idx")
    at = places.select(*keys, at="position").lazy()
    pairs = tokens.select(*keys, "position", "token").join(at, on=keys, how="inner")
    near = pairs.filter(pl.col("position").is_between(pl.col("at") - _CONTEXT_TOKENS, pl.col("at") - 1))
    joined = near.sort("position").group_by(*keys, "at", maintain_order=True).agg(before=pl.col("token").str.join(""))
    return joined.rename({"at": "position"}).collect()


def worst_responses(run: Run, top: int) -> Rows:
    """The responses with the largest mean KL per token, those with an infinite one first."""
    chosen = (
        *("source_file", "response_idx", "n_positions", "n_measured", "n_infinite", "kl_mean_per_token", "kl_sum"),
        *("kl_lower_sum", "max_kl", "max_kl_position", "same_top_rate", "finish_reason"),
    )
    order = pl.when(pl.col("n_infinite") > 0).then(_INFINITY).otherwise("kl_mean_per_token")
    ranked = run.responses.select(*chosen, order=order).drop_nulls("order")
    by = ["order", "source_file", "response_idx"]
    return ranked.sort(by, descending=[True, False, False]).head(top).drop("order").collect().to_dicts()
