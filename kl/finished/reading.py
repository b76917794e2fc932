"""From the folder of a finished run to its figures and tables."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import polars as pl

from kl.finished import names
from kl.finished.run import Run
from kl.statistics.figures import LogprobDifference, Perplexity, TopToken
from kl.statistics.intervals import Estimate
from kl.statistics.noise_floor import NoiseFloor
from kl.statistics.summary import FORMAT, Counts, DeltaP, Divergence, Identification, SampledToken, Summary
from kl.tables.responses import RESPONSES
from kl.tables.schemas import ADDED, CANDIDATES, TOKENS

# The fields of a summary that are groups of figures.
_KINDS: dict[str, type[Any]] = {
    "counts": Counts,
    "kl_per_token": Divergence,
    "kl_per_response": Divergence,
    "identification": Identification,
    "delta_p": DeltaP,
    "sampled_token": SampledToken,
    "perplexity": Perplexity,
    "logprob_difference": LogprobDifference,
    "top_token": TopToken,
    "noise_floor": NoiseFloor,
}


class FinishedRunError(ValueError):
    """A folder holds no finished run, or one that cannot be read: which file, why, and what to do, in one line."""


class Access(NamedTuple):
    """How the files of a run are reached: on a disk, or wherever they are.

    ``local`` gives the place of a file on this machine's disk.
    """

    is_folder: Callable[[Path], bool]
    exists: Callable[[Path], bool]
    is_file: Callable[[Path], bool]
    read_bytes: Callable[[Path], bytes]
    local: Callable[[Path], Path]


class Documents(NamedTuple):
    """What ``summary.json`` and ``run.json`` say."""

    summary: dict[str, Any]
    run: dict[str, Any]


def _itself(path: Path) -> Path:
    return path


DISK = Access(Path.is_dir, Path.exists, Path.is_file, Path.read_bytes, _itself)


def load_run(folder: str | os.PathLike[str]) -> Run:
    """A finished run from its output folder on a disk.

    Raises
    ------
    FinishedRunError
        If there is no finished run, or its files cannot be read or do not belong together.
    """
    text = os.fspath(folder)
    if "://" in text:
        raise FinishedRunError(f"{text} is not on a disk; copy the folder to one (of a bucket: gcloud storage cp -r).")
    return read_run(Path(text).expanduser(), DISK)


def read_run(folder: Path, access: Access, *, with_lists: bool = True) -> Run:
    """A finished run from wherever its files are; ``with_lists`` says whether the candidate table is fetched.

    Raises
    ------
    FinishedRunError
        As `load_run`.
    """
    documents = read_documents(folder, access)
    summary = _typed_summary(folder / names.SUMMARY, documents.summary)
    tokens = _scan(folder / names.TOKENS, TOKENS, access)
    responses = _scan(folder / names.RESPONSES, RESPONSES, access)
    n_positions = summary.counts.positions
    _check_rows(folder, names.TOKENS, tokens, n_positions)
    candidates = None
    if with_lists and access.is_file(folder / names.CANDIDATES):
        candidates = _scan(folder / names.CANDIDATES, CANDIDATES, access)
        _check_rows(folder, names.CANDIDATES, candidates, n_positions)
    return Run(folder, summary, tokens, responses, candidates, documents.run)


def lists_in(folder: Path, access: Access) -> tuple[pl.LazyFrame, pl.LazyFrame]:
    """The token table and the candidate table in a folder, of a run that is at its end or finished.

    Raises
    ------
    FinishedRunError
        If the run kept no lists, or a table was written by another version.
    """
    if not access.is_file(folder / names.CANDIDATES):
        raise FinishedRunError(
            f"{folder} has no {names.CANDIDATES}: run the same command again with the setting candidates: true; scores "
            "are kept."
        )
    tokens, lists = ((names.TOKENS, TOKENS), (names.CANDIDATES, CANDIDATES))
    return _scan(folder / tokens[0], tokens[1], access), _scan(folder / lists[0], lists[1], access)


def read_documents(folder: Path, access: Access) -> Documents:
    """The summary and the record of a finished run, of whatever version wrote them.

    Raises
    ------
    FinishedRunError
        If there is no finished run, or a document cannot be read.
    """
    if not access.is_folder(folder):
        raise FinishedRunError(f"{folder} is not a folder; give the output folder of a run.")
    if access.exists(folder / names.UNFINISHED):
        raise FinishedRunError(
            f"the run in {folder} is not finished: wait for it to end, or run the same command again."
        )
    missing = [name for name in names.REQUIRED if not access.is_file(folder / name)]
    if missing:
        raise FinishedRunError(
            f"{folder} holds no finished run ({', '.join(missing)} not found); run flows.run to its end."
        )
    return Documents(_document(folder / names.SUMMARY, access), _document(folder / names.RECORD, access))


def _document(path: Path, access: Access) -> dict[str, Any]:
    try:
        data: Any = json.loads(access.read_bytes(path).decode("utf-8"))
    except (OSError, ValueError) as error:
        raise FinishedRunError(f"{path} cannot be read: {error}. Run the same command again.") from error
    if not isinstance(data, dict):
        raise _other_version(path, f"it is a {type(data).__name__}, not an object")
    return cast(dict[str, Any], data)


def _check_rows(folder: Path, name: str, table: pl.LazyFrame, n_positions: int) -> None:
    n_rows = int(table.select(pl.len()).collect().item())
    if n_rows != n_positions:
        raise FinishedRunError(
            f"the files in {folder} are not of one run: {names.SUMMARY} speaks of {n_positions:,} positions, "
            f"{name} holds {n_rows:,}. Run the same command again."
        )


def _scan(path: Path, schema: pl.Schema, access: Access) -> pl.LazyFrame:
    # A bracket or "=" in a folder's name is neither a pattern nor a partition.
    frame = pl.scan_parquet(access.local(path), glob=False, hive_partitioning=False)
    try:
        found = frame.collect_schema()
    except (pl.exceptions.PolarsError, OSError) as error:
        raise FinishedRunError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    absent = [name for name in ADDED if name in schema and name not in found]
    wrong = [name for name, kind in schema.items() if name not in absent and found.get(name) != kind]
    if wrong:
        raise _other_version(path, f"its columns {', '.join(wrong)} are absent or of another type")
    return frame.with_columns(pl.lit(None, dtype=schema[name]).alias(name) for name in absent)


def _typed_summary(path: Path, data: dict[str, Any]) -> Summary:
    if data.get("format") != FORMAT:
        raise _other_version(path, f"its format is not {FORMAT}")
    # What the run's alert decided is no figure of these data alone.
    figures = {name: value for name, value in data.items() if name != "drift"}
    try:
        return summary_from_json(figures)
    except (KeyError, TypeError, AttributeError) as error:
        raise _other_version(path, f"{type(error).__name__}: {error}") from error


def _other_version(path: Path, why: str) -> FinishedRunError:
    return FinishedRunError(
        f"{path} was written by another version ({why}). Run the same command again; scores are kept."
    )


def summary_from_json(data: Mapping[str, Any]) -> Summary:
    """The inverse of `Summary.to_json`.

    Raises
    ------
    KeyError, TypeError, AttributeError
        If a field is absent, unknown or of another kind.
    """
    typed: dict[str, Any] = {}
    for name, value in data.items():
        if name in _KINDS:
            typed[name] = None if value is None else _of_kind(_KINDS[name], value)
        elif _is_estimate(value):
            typed[name] = Estimate(**value)
    return Summary(**{**data, **typed})


def _of_kind(kind: type[Any], values: Mapping[str, Any]) -> Any:
    return kind(**{name: Estimate(**value) if _is_estimate(value) else value for name, value in values.items()})


def _is_estimate(value: Any) -> bool:
    return isinstance(value, Mapping) and "no_interval" in value
