"""Writes the results of a data set: `tokens.parquet`, `candidates.parquet`, `responses.parquet` and `summary.json`.

Every file appears whole or not at all. JSON is strict (no NaN, no infinity) and UTF-8.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath

import polars as pl

from kl.estimators.divergence import ESTIMATOR_VERSION
from kl.output.atomic import json_bytes, write_atomic, write_json_atomic
from kl.statistics.summary import RunFacts, Summary
from kl.tables.responses import RESPONSE_COLUMNS, RESPONSES
from kl.tables.schemas import CANDIDATE_COLUMNS, CANDIDATES, TOKEN_COLUMNS, TOKENS, Column
from kl.tables.totals import BATCH_ROWS, check_rows

# Fixed, because the default depends on how the rows arrive; the bytes of a file must depend on its rows alone. As many
# rows as are read at once, so that a group is decoded once.
ROW_GROUP_ROWS = BATCH_ROWS
# Of the candidate table, which is read for a few positions of many.
CANDIDATE_GROUP_ROWS = 16_384
_LARGEST_PAGE = 1 << 30  # bytes
METADATA_KEY = "tokenkl.columns"
RUN_KEY = "tokenkl.run"


def result_paths(source_files: Iterable[str]) -> dict[str, str]:
    """Where the results of each input file go, below the output directory: ``sub/a.json`` → ``sub/a_kl.json``.

    Files of one folder whose stems are the same (``a.json`` and ``a.jsonl``) keep their whole names:
    ``a.json_kl.json`` and ``a.jsonl_kl.json``.

    Raises
    ------
    ValueError
        If a path is absolute, leaves the directory or is named twice.
    """
    sources = [PurePosixPath(name) for name in source_files]
    for source, n in Counter(sources).items():
        if source.is_absolute() or ".." in source.parts or not source.name:
            raise ValueError(f"input file {str(source)!r} is not a path below the input directory.")
        if n > 1:
            raise ValueError(f"input file {str(source)!r} is named {n} times.")
    targets = {source: source.with_name(f"{source.stem}_kl.json") for source in sources}
    # A whole name can meet another file's stem ("a.json" and "a.json.json"); then that one takes its whole name too.
    while clashes := {target for target, n in Counter(targets.values()).items() if n > 1}:
        for source, target in targets.items():
            if target in clashes:
                targets[source] = source.with_name(f"{source.name}_kl.json")
    return {str(source): str(target) for source, target in targets.items()}


def write_tokens(parts: Sequence[Path], target: Path, facts: RunFacts | None = None) -> None:
    """Join token tables, in the order given, into one; the same parts give the same bytes.

    Streams: memory does not grow with the parts. Without parts the table has the columns and no row. What each column
    holds, in which unit, stands in the file's metadata under ``METADATA_KEY``, as JSON; under ``RUN_KEY`` what was
    compared and how, if it is given. Nothing there says where or when, so that the same input gives the same bytes.

    Raises
    ------
    polars.exceptions.SchemaError
        If a part does not have exactly the columns of `kl.tables.schemas.TOKENS`.
    """
    # A bracket or "=" in a directory's name is neither a pattern nor a partition.
    none = pl.LazyFrame(schema=TOKENS)
    rows = pl.scan_parquet(list(parts), schema=TOKENS, glob=False, hive_partitioning=False) if parts else none
    _write_joined(rows.select(TOKENS.names()), target, _metadata(TOKEN_COLUMNS, facts), ROW_GROUP_ROWS)


def write_candidates(parts: Sequence[Path], target: Path, facts: RunFacts | None = None) -> None:
    """Join what `write_candidate_part` wrote into one candidate table, as `write_tokens` does."""
    # One page for each column of a group: where one is divided into several depends on how its lists arrived.
    _write_joined(
        candidate_rows(parts),
        target,
        _metadata(CANDIDATE_COLUMNS, facts),
        CANDIDATE_GROUP_ROWS,
        data_page_size=_LARGEST_PAGE,
    )


def candidate_rows(parts: Sequence[Path]) -> pl.LazyFrame:
    """The rows of the table that `write_candidates` joins, which are read here at a third of the time."""
    rows = pl.scan_ipc(list(parts), glob=False, hive_partitioning=False) if parts else pl.LazyFrame(schema=CANDIDATES)
    return rows.select(CANDIDATES.names())


def _write_joined(
    rows: pl.LazyFrame,
    target: Path,
    metadata: dict[str, str],
    group_rows: int,
    *,
    data_page_size: int | None = None,
) -> None:
    write_atomic(
        target,
        lambda path: rows.sink_parquet(
            path,
            compression="zstd",
            compression_level=1,  # most of both tables are the digits of numbers, which no level makes smaller
            row_group_size=group_rows,
            data_page_size=data_page_size,
            maintain_order=True,
            metadata=metadata,
        ),
    )


def write_part(tokens: pl.DataFrame, target: Path) -> None:
    """Write the token table of one input file, as quickly as it can be: it is read once, to be joined.

    Raises
    ------
    polars.exceptions.PolarsError
        If a column of `kl.tables.schemas.TOKENS` is absent or does not fit its type.
    TokenTableError
        If a row contradicts itself (`kl.tables.totals.check_rows`).
    """
    fitted = tokens.select(pl.col(name).cast(kind) for name, kind in TOKENS.items())
    check_rows(fitted)
    write_atomic(
        target,
        lambda path: fitted.write_parquet(path, compression="lz4", statistics=False, row_group_size=ROW_GROUP_ROWS),
    )


def write_candidate_part(candidates: pl.DataFrame, target: Path) -> None:
    """Write the candidate table of some input files (schema `kl.tables.schemas.CANDIDATES`), to be joined.

    Uncompressed Arrow, two kilobytes a position with 2 × 20 candidates: Parquet costs four times as much time.
    """
    write_atomic(target, lambda path: candidates.write_ipc(path, compression="uncompressed"))


def write_responses(responses: pl.DataFrame, target: Path, facts: RunFacts | None = None) -> None:
    """Write the response table (`kl.tables.responses.RESPONSES`)."""
    fitted = responses.select(pl.col(name).cast(kind) for name, kind in RESPONSES.items())
    metadata = _metadata(RESPONSE_COLUMNS, facts)
    write_atomic(target, lambda path: fitted.write_parquet(path, row_group_size=ROW_GROUP_ROWS, metadata=metadata))


def _metadata(columns: Mapping[str, Column], facts: RunFacts | None) -> dict[str, str]:
    """What Parquet keeps beside the columns: the description and the unit of each, and what was compared, as JSON."""
    told = {
        name: {"about": column.about} | ({} if column.unit is None else {"unit": column.unit})
        for name, column in columns.items()
    }
    of_columns = {METADATA_KEY: json_bytes(told).decode()}
    if facts is None:
        return of_columns
    run = {
        "model_p": facts.model_p,
        "model_q": facts.model_q,
        "estimator": facts.estimator,
        "estimator_version": ESTIMATOR_VERSION,
        "top_logprobs": facts.top_logprobs,
        "wanted_tokens": facts.wanted_tokens,
    }
    return of_columns | {RUN_KEY: json_bytes(run).decode()}


def write_summary(summary: Summary, target: Path) -> None:
    """Write `summary.json`."""
    write_json_atomic(target, summary.to_json())
