"""A finished run, read back from its output folder: for analysis, for drift, and for whoever asks how it went."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import polars as pl

from backends.errors import ConfigError
from backends.storage import exists, is_remote, kept_copy, read_bytes
from flows.folder.layout import OutputFolder
from kl.statistics.drift import COLUMNS
from kl.statistics.figures import LogprobDifference, Perplexity, TopToken
from kl.statistics.intervals import Estimate
from kl.statistics.noise_floor import NoiseFloor
from kl.statistics.summary import FORMAT, Counts, DeltaP, Divergence, Identification, SampledToken, Summary
from kl.tables.responses import RESPONSES
from kl.tables.schemas import ADDED, TOKENS
from kl.tables.totals import IS_INFINITE, MEASURED

Rows = list[dict[str, Any]]

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

_PLACE = ["source_file", "response_idx", "position"]
_CONTEXT_TOKENS = 8  # shown before a position
_INFINITY = pl.lit(float("inf"))


class Documents(NamedTuple):
    """What ``summary.json`` and ``run.json`` say."""

    summary: dict[str, Any]
    run: dict[str, Any]


class ResponseTableFile(NamedTuple):
    """A response table as it was read, with the hash of its file."""

    sha256: str
    table: pl.DataFrame


class FinishedRun(NamedTuple):
    """Where a run is, its summary, and its token and response tables (lazy; of a remote run, read from copies)."""

    folder: Path
    summary: Summary
    tokens: pl.LazyFrame
    responses: pl.LazyFrame


def read_documents(folder: Path) -> Documents:
    """The summary and the record of a finished run, of whatever version wrote them.

    Raises
    ------
    ConfigError
        If there is no finished run, or a document cannot be read.
    """
    if not is_remote(folder) and not folder.is_dir():
        raise ConfigError(f"{folder} is not a folder; give the output folder of a run.")
    place = OutputFolder(folder)
    if exists(place.unfinished):
        raise ConfigError(f"the run in {folder} is not finished: wait for it to end, or run the same command again.")
    missing = [path.name for path in place.results() if not _is_file(path)]
    if missing:
        raise ConfigError(f"{folder} holds no finished run ({', '.join(missing)} not found); run flows.run to its end.")
    return Documents(_read_document(place.summary), _read_document(place.run))


def _is_file(path: Path) -> bool:
    return exists(path) if is_remote(path) else path.is_file()


def _read_document(path: Path) -> dict[str, Any]:
    try:
        data: Any = json.loads(read_bytes(path).decode("utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}. Run the same command again.") from error
    if not isinstance(data, dict):
        raise _other_version(path, f"it is a {type(data).__name__}, not an object")
    return cast(dict[str, Any], data)


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


def load_run(folder: Path) -> FinishedRun:
    """A finished run from its output folder.

    Raises
    ------
    ConfigError
        If there is no finished run, or its files were written by another version or do not belong together.
    """
    place = OutputFolder(folder)
    summary = _typed_summary(place.summary, read_documents(folder).summary)
    tokens = _scan(place.tokens, TOKENS)
    responses = _scan(place.responses, RESPONSES)
    n_rows = int(tokens.select(pl.len()).collect().item())
    if n_rows != summary.counts.positions:
        raise ConfigError(
            f"the files in {folder} are not of one run: summary.json speaks of {summary.counts.positions:,} positions, "
            f"tokens.parquet holds {n_rows:,}. Run the same command again."
        )
    return FinishedRun(folder, summary, tokens, responses)


def _scan(path: Path, schema: pl.Schema) -> pl.LazyFrame:
    # A bracket or "=" in a folder's name is neither a pattern nor a partition.
    frame = pl.scan_parquet(kept_copy(path), glob=False, hive_partitioning=False)
    try:
        found = frame.collect_schema()
    except (pl.exceptions.PolarsError, OSError) as error:
        raise ConfigError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    absent = [name for name in ADDED if name in schema and name not in found]
    wrong = [name for name, kind in schema.items() if name not in absent and found.get(name) != kind]
    if wrong:
        raise _other_version(path, f"its columns {', '.join(wrong)} are absent or of another type")
    return frame.with_columns(pl.lit(None, dtype=schema[name]).alias(name) for name in absent)


def _typed_summary(path: Path, data: dict[str, Any]) -> Summary:
    if data.get("format") != FORMAT:
        raise _other_version(path, f"its format is not {FORMAT}")
    data.pop("drift", None)  # what the run's alert decided; not a figure of these data alone
    try:
        return summary_from_json(data)
    except (KeyError, TypeError, AttributeError) as error:
        raise _other_version(path, f"{type(error).__name__}: {error}") from error


def _other_version(path: Path, why: str) -> ConfigError:
    return ConfigError(f"{path} was written by another version ({why}). Run the same command again; scores are kept.")


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


def worst_positions(run: FinishedRun, top: int) -> Rows:
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


def worst_responses(run: FinishedRun, top: int) -> Rows:
    """The responses with the largest mean KL per token, those with an infinite one first."""
    chosen = (
        *("source_file", "response_idx", "n_positions", "n_measured", "n_infinite", "kl_mean_per_token", "kl_sum"),
        *("kl_lower_sum", "max_kl", "max_kl_position", "same_top_rate", "finish_reason"),
    )
    order = pl.when(pl.col("n_infinite") > 0).then(_INFINITY).otherwise("kl_mean_per_token")
    ranked = run.responses.select(*chosen, order=order).drop_nulls("order")
    by = ["order", "source_file", "response_idx"]
    return ranked.sort(by, descending=[True, False, False]).head(top).drop("order").collect().to_dicts()
