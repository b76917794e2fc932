"""Two models against one P: the paired difference, far sharper than the difference of two means."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import polars as pl

from kl.statistics.clusters import per_response, per_token
from kl.statistics.intervals import Estimate
from kl.tables.totals import (
    BATCH_ROWS,
    INFINITE,
    IS_INFINITE,
    RESPONSE_KEYS,
    batch_totals,
    check_rows,
    empty_columns,
    merge_totals,
)

POSITION_KEYS = (*RESPONSE_KEYS, "position")
_COLUMNS = (
    *POSITION_KEYS,
    "prompt_id",
    "token",
    "token_id",
    "logprob_p",
    "selected",
    "pi",
    "kl_estimate",
    "reason",
    "error",
)
LOGPROB_TOLERANCE = 1e-6  # one file read twice gives the same number; a service that answers again does not


class IncomparableRunsError(ValueError):
    """Two runs whose tokens, or sampled positions, are not the same, so that no paired difference exists."""


@dataclass(frozen=True, slots=True)
class PairedDifference:
    """KL(P‖A) - KL(P‖B) over the positions that both runs measured; positive: B is nearer to P.

    ``a_per_token`` and ``b_per_token`` are the means of each run over those same positions. ``n_only_a`` and
    ``n_only_b`` count positions of shared responses that only one run measured; they take no part.
    """

    per_token: Estimate
    per_response: Estimate
    a_per_token: Estimate
    b_per_token: Estimate
    n_positions: int
    n_only_a: int
    n_only_b: int


def paired_difference(tokens_a: pl.LazyFrame, tokens_b: pl.LazyFrame) -> PairedDifference:
    """Paired difference of two runs against one P, per token and per response, with clustered t intervals.

    Only responses in both tables take part. What one run sampled and the other measured in full is weighted with the
    sampling run's π. Files are joined a batch at a time, so that memory does not grow with the tables.

    Parameters
    ----------
    tokens_a, tokens_b : pl.LazyFrame
        Token tables (`kl.tables.schemas.TOKENS`) of the two runs.

    Raises
    ------
    IncomparableRunsError
        If the tables share no response, a shared response differs in P's tokens, their log-probabilities, its length
        or its prompt, or both runs sampled positions and not the same ones.
    TokenTableError
        If a table contradicts itself.
    """
    difference: list[pl.DataFrame] = []
    run_a: list[pl.DataFrame] = []
    run_b: list[pl.DataFrame] = []
    n_only_a = n_only_b = 0
    for rows_a, rows_b in shared_batches((tokens_a, tokens_b), ("the first run", "the second")):
        joint = _joint(_beside(rows_a, rows_b))
        n_only_a += int((joint["measured_a"] & ~joint["measured_b"]).sum())
        n_only_b += int((joint["measured_b"] & ~joint["measured_a"]).sum())
        difference.append(_totals_of(joint, pl.col("kl_estimate") - pl.col("kl_estimate_b")))
        run_a.append(_totals_of(joint, pl.col("kl_estimate")))
        run_b.append(_totals_of(joint, pl.col("kl_estimate_b")))
    if not difference:
        raise IncomparableRunsError("the two runs share no response; compare runs over the same input files.")
    totals = merge_totals(difference)
    return PairedDifference(
        per_token(totals, "kl_estimate"),
        per_response(totals, "kl_estimate"),
        per_token(merge_totals(run_a), "kl_estimate"),
        per_token(merge_totals(run_b), "kl_estimate"),
        int(totals["n_measured"].sum()),
        n_only_a,
        n_only_b,
    )


def shared_batches(tables: Sequence[pl.LazyFrame], names: Sequence[str]) -> Iterator[list[pl.DataFrame]]:
    """The responses that all runs have, some files at a time: a frame of each run, over the same positions row by row.

    Parameters
    ----------
    tables : sequence of pl.LazyFrame
        Token tables (`kl.tables.schemas.TOKENS`) of two or more runs.
    names : sequence of str
        What the runs are called in errors.

    Raises
    ------
    IncomparableRunsError
        If a response that all have differs in P's tokens, their log-probabilities, its length or its prompt, or two
        runs sampled positions and not the same ones.
    TokenTableError
        If a table contradicts itself.
    """
    sizes = tables[0].group_by("source_file").len().collect().sort("source_file")
    for first, last in _file_ranges(sizes):
        inside = pl.col("source_file").is_between(pl.lit(first), pl.lit(last))
        all_rows = [tokens.select(_COLUMNS).filter(inside).collect() for tokens in tables]
        for rows in all_rows:
            check_rows(rows)
        for number, rows in enumerate(all_rows[1:], start=1):
            _check_same_lengths(all_rows[0], rows, names[0], names[number])
        places = all_rows[0].select(POSITION_KEYS)
        for rows in all_rows[1:]:
            places = places.join(rows, on=POSITION_KEYS, how="semi", maintain_order="left")
        shared = [places.join(rows, on=POSITION_KEYS, how="left", maintain_order="left") for rows in all_rows]
        for (i, rows_i), (j, rows_j) in combinations(enumerate(shared), 2):
            _check_comparable(_beside(rows_i, rows_j), names[i], names[j])
        if places.height:
            yield shared


def _beside(rows_a: pl.DataFrame, rows_b: pl.DataFrame) -> pl.DataFrame:
    """Two runs over the same positions in one frame; the columns of the second end with ``_b``."""
    return pl.concat([rows_a, rows_b.select(pl.exclude(POSITION_KEYS).name.suffix("_b"))], how="horizontal")


def _file_ranges(sizes: pl.DataFrame) -> Iterator[tuple[str, str]]:
    """First and last file of runs of files that hold about a batch of rows each; ``sizes`` is sorted by file."""
    batch = (sizes["len"].cum_sum() - sizes["len"]) // BATCH_ROWS
    grouped = sizes.group_by(batch.alias("batch"), maintain_order=True)
    ranges = grouped.agg(pl.col("source_file").first().alias("first"), pl.col("source_file").last().alias("last"))
    yield from zip(ranges["first"], ranges["last"], strict=True)


def _check_same_lengths(rows_a: pl.DataFrame, rows_b: pl.DataFrame, name_a: str, name_b: str) -> None:
    lengths_a, lengths_b = (rows.group_by(RESPONSE_KEYS, maintain_order=True).len() for rows in (rows_a, rows_b))
    both = lengths_a.join(lengths_b, on=RESPONSE_KEYS, suffix="_b", maintain_order="left")
    for file, index, n_a, n_b in both.filter(pl.col("len") != pl.col("len_b")).head(1).iter_rows():
        raise IncomparableRunsError(
            f"{file}#{index} has {n_a} positions in {name_a} and {n_b} in {name_b}; "
            "the two runs must be over the same responses of P."
        )


def _check_comparable(joined: pl.DataFrame, name_a: str, name_b: str) -> None:
    differences = {column: pl.col(column) != pl.col(f"{column}_b") for column in ("prompt_id", "token", "token_id")}
    differences["logprob_p"] = (pl.col("logprob_p") - pl.col("logprob_p_b")).abs() > LOGPROB_TOLERANCE
    for column, differs in differences.items():
        for row in joined.filter(differs).head(1).iter_rows(named=True):
            where = f"{row['source_file']}#{row['response_idx']} position {row['position']}"
            raise IncomparableRunsError(
                f"{where}: {column} is {row[column]!r} in {name_a} and {row[f'{column}_b']!r} in {name_b}; "
                "the two runs must be over the same responses of P."
            )
    both_sampled = (pl.col("pi") < 1) & (pl.col("pi_b") < 1)
    apart = both_sampled & ((pl.col("pi") != pl.col("pi_b")) | (pl.col("selected") != pl.col("selected_b")))
    for row in joined.filter(apart).head(1).iter_rows(named=True):
        raise IncomparableRunsError(
            f"{row['source_file']}#{row['response_idx']}: {name_a} and {name_b} sampled different positions "
            f"(π = {row['pi']:.6g} and {row['pi_b']:.6g}), so that it is not known how likely a position is in both. "
            "Use the same sampling settings and seed for both runs, or measure one of them in full."
        )


def _joint(joined: pl.DataFrame) -> pl.DataFrame:
    """Columns ``selected``, ``pi``, ``error`` of the positions that both runs have, and who measured what."""
    measured_a, measured_b = pl.col("kl_estimate").is_not_null(), pl.col("kl_estimate_b").is_not_null()
    infinite = IS_INFINITE | (pl.col("selected_b") & (pl.col("reason_b") == INFINITE).fill_null(False))
    return joined.with_columns(
        measured_a.alias("measured_a"),
        measured_b.alias("measured_b"),
        (pl.col("selected") & pl.col("selected_b")).alias("selected"),
        pl.min_horizontal("pi", "pi_b").alias("pi"),
        pl.when(infinite).then(pl.lit(INFINITE)).alias("reason"),
        pl.when(measured_a & measured_b).then(None).otherwise(pl.lit("not measured in both runs")).alias("error"),
    )


def _totals_of(joint: pl.DataFrame, value: pl.Expr) -> pl.DataFrame:
    measured = pl.col("measured_a") & pl.col("measured_b")
    kept = joint.select(
        *POSITION_KEYS, "prompt_id", "selected", "pi", "reason", "error", kl_estimate=pl.when(measured).then(value)
    )
    return batch_totals(empty_columns(kept))
