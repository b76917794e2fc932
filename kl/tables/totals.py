"""From the token table to sums per response, a batch of rows at a time.

Everything above the token is a ratio of sums, so one pass that keeps a row of sums per response is enough for the
response table, the data set and the comparison of two runs. Sums are Horvitz-Thompson sums ``Σ v/π`` over the
measured positions [1]_; with ``π = 1`` they are the plain sums, bit for bit.

The batches have a fixed number of rows and are merged in order, so that the same table gives the same bits on any
number of threads. Memory holds one batch and one row per response.

References
----------
.. [1] Horvitz & Thompson (1952), "A generalization of sampling without replacement from a finite universe".
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import polars as pl

from kl.tables.schemas import TOKENS

BATCH_ROWS = 131_072
RESPONSE_KEYS = ("source_file", "response_idx")

# Summed per response, over the measured positions where they are known.
METRICS = (
    "kl_estimate",
    "kl_lower",
    "kl_upper_plausible",
    "kl_floor",
    "kl_bucket",
    "kl_censored",
    "kl_exact",
    "reverse_kl_estimate",
    "reverse_kl_lower",
    "js_estimate",
    "js_lower",
    "tv_lower",
    "logratio_k1",
    "k3",
    "delta_p",
    "same_top_token",
    "rest_mass_p",
    "rest_mass_q",
    "p_mass_missing_in_q",
    "q_mass_missing_in_p",
    "ambiguous_mass_p",
    "ambiguous_mass_q",
    "entropy_p",
    "entropy_q",
)
# Where Q does not list the sampled token, log p/q is known only to be at least this much.
_CENSORED = pl.col("k1_censored").fill_null(False)
_LOGRATIO = pl.when(~_CENSORED).then("logratio_k1")
# |log p/q| of the sampled token; its smallest possible value where q is not known.
ABS_LOGRATIO = pl.when(_CENSORED).then(pl.col("logratio_k1").clip(0.0)).otherwise(pl.col("logratio_k1").abs())
# q/p outside 0.9 to 1.1, for certain.
_RATIO_OUTSIDE = ~pl.col("logratio_k1").is_between(-math.log(1.1), -math.log(0.9)) & ~(
    _CENSORED & (pl.col("logratio_k1") < 0)
)
# The same, from other columns: what the bounds say where all of them are known, squares, and of the sampled token.
_DERIVED = {
    "delta_p_squared": pl.col("delta_p") ** 2,
    "logratio": _LOGRATIO,
    "nll_p": pl.when(_LOGRATIO.is_not_null()).then(-pl.col("logprob_p")),
    "nll_q": pl.when(_LOGRATIO.is_not_null()).then(-pl.col("logprob_q")),
    "abs_logratio": ABS_LOGRATIO,
    "ratio_outside": _RATIO_OUTSIDE,
    "identified_upper": pl.col("kl_upper_plausible"),
    "identified_estimate": pl.when(pl.col("kl_upper_plausible").is_not_null()).then("kl_estimate"),
    "identified_lower": pl.when(pl.col("kl_upper_plausible").is_not_null()).then("kl_lower"),
}
_IDENTITY = ("source_file", "response_idx", "prompt_id", "position", "selected", "pi", "reason", "error")
_NEEDED = tuple(dict.fromkeys((*_IDENTITY, *METRICS, "k1_censored", "logprob_p", "logprob_q")))

# Sampled, asked and answered. Where an answer has no point estimate (too short a list), its bounds still count: such a
# row has an error beside its bounds.
MEASURED = pl.col("selected") & (pl.col("error").is_null() | pl.col("kl_lower").is_not_null())
# The reason of a row whose exact KL is infinite, as P allows a token that Q excludes: a mean with it is infinite too.
INFINITE = "infinite"
IS_INFINITE = pl.col("selected") & (pl.col("reason") == INFINITE).fill_null(False)
WEIGHT = 1.0 / pl.col("pi")


class TokenTableError(ValueError):
    """A token table that contradicts itself; computed further it would give wrong numbers."""


def token_batches(tokens: pl.LazyFrame, columns: Sequence[str] = _NEEDED) -> Iterator[pl.DataFrame]:
    """Consecutive batches of ``BATCH_ROWS`` rows with ``columns``, checked; at least one, if only an empty one.

    Raises
    ------
    TokenTableError
        If a column is absent or a row contradicts itself: NaN or an infinity, π outside (0, 1], an estimate beside an
        error, neither of the two.
    """
    absent = sorted(set(columns) - set(tokens.collect_schema().names()))
    if absent:
        raise TokenTableError(f"the token table lacks the columns {', '.join(absent)}.")
    chosen = tokens.select(columns)
    n_rows = int(chosen.select(pl.len()).collect().item())
    for offset in range(0, max(n_rows, 1), BATCH_ROWS):
        batch = chosen.slice(offset, BATCH_ROWS).collect()
        check_rows(batch)
        yield batch


def check_rows(batch: pl.DataFrame) -> None:
    """Refuse rows that contradict themselves.

    Raises
    ------
    TokenTableError
        With file, response, position, column and value of the first such row.
    """
    defects = list(_defects(batch.columns))
    # One query: a part of a few rows would spend more on sixty of them than on all else.
    found = batch.select(defect.bad.any().alias(str(number)) for number, defect in enumerate(defects)).row(0)
    for defect, is_found in zip(defects, found, strict=True):
        if is_found:
            rows = batch.filter(defect.bad)
            row = rows.row(0, named=True)
            where = f"{row['source_file']}#{row['response_idx']} position {row['position']}"
            what = f"{defect.column} = {row[defect.column]!r} {defect.problem}"
            raise TokenTableError(f"{where}: {what} ({rows.height} such rows in this batch).")


class _Defect(NamedTuple):
    """Which rows contradict themselves, and how."""

    bad: pl.Expr
    column: str
    problem: str


def _defects(columns: Sequence[str]) -> Iterator[_Defect]:
    for column in columns:
        if TOKENS[column] == pl.Float64:
            yield _Defect(~pl.col(column).is_finite(), column, "is not a finite number; unknown values are null")
    for column in ("source_file", "response_idx", "prompt_id", "position", "selected", "pi"):
        yield _Defect(pl.col(column).is_null(), column, "is null")
    yield _Defect((pl.col("pi") <= 0) | (pl.col("pi") > 1), "pi", "is no inclusion probability in (0, 1]")
    yield _Defect(~pl.col("selected") & (pl.col("pi") == 1), "pi", "belongs to a position that was left out")
    estimate, excused = pl.col("kl_estimate"), ~pl.col("selected") | pl.col("error").is_not_null()
    if "kl_estimate" in columns:
        yield _Defect(excused & estimate.is_not_null(), "kl_estimate", "stands at an unmeasured position")
    if "kl_estimate" in columns and "kl_lower" in columns:
        unexplained = ~excused & estimate.is_null() & pl.col("kl_lower").is_null()
        yield _Defect(unexplained, "kl_estimate", "is unknown and no error says why")


def empty_columns(batch: pl.DataFrame) -> pl.DataFrame:
    """``batch`` with every column that `batch_totals` reads; those it lacks are null."""
    return batch.with_columns(
        pl.lit(None, dtype=TOKENS[name]).alias(name) for name in _NEEDED if name not in batch.columns
    )


def response_totals(tokens: pl.LazyFrame) -> pl.DataFrame:
    """Sums per response, in the order in which the responses appear.

    Returns
    -------
    pl.DataFrame
        A row per response: ``source_file, response_idx, prompt_id``; counts ``n_positions, n_selected, n_measured,
        n_missing, n_infinite, n_k1_censored``; for each metric ``m`` the Horvitz-Thompson sum ``m.sum``, the number of
        positions ``m.n`` where it is known and the sum ``m.weight`` of their 1/π; the largest token KL and where it is;
        ``first_flip`` and ``first_unclear``, the first position where the top token differs, and where that is not
        known; the first reason and error.

    Raises
    ------
    TokenTableError
        As `token_batches`; and if the positions of a response are not 0, 1, …, T-1, each once.
    """
    return merge_totals([batch_totals(batch) for batch in token_batches(tokens)])


def merge_totals(parts: Sequence[pl.DataFrame]) -> pl.DataFrame:
    """What `response_totals` returns, from the `batch_totals` of consecutive batches (at least one).

    Raises
    ------
    TokenTableError
        If the positions of a response are not 0, 1, …, T-1, each once.
    """
    merged = pl.concat(parts).group_by(RESPONSE_KEYS, maintain_order=True).agg(_merge(parts[0].columns))
    _check_positions(merged)
    return merged.with_columns((pl.col("n_selected") - pl.col("n_measured")).alias("n_missing"))


def denominator(metric: str) -> pl.Expr:
    """How many positions of a response the sum of ``metric`` speaks of (rows of `response_totals`).

    The known number of positions T where every sampled position has the metric: with T known a ratio of means varies
    less than with an estimated T. Where some lack it ``Σ 1/π`` over those that have it, so that the mean is over the
    positions that can be measured.
    """
    complete = pl.col(f"{metric}.n") == pl.col("n_selected")
    return pl.when(complete).then(pl.col("n_positions").cast(pl.Float64)).otherwise(f"{metric}.weight")


def batch_totals(batch: pl.DataFrame) -> pl.DataFrame:
    """Sums per response of one batch (columns as `token_batches` gives them), to be merged by `merge_totals`."""
    derived = batch.with_columns(
        pl.col("same_top_token").cast(pl.Float64), **{name: value.cast(pl.Float64) for name, value in _DERIVED.items()}
    )
    metrics = (*METRICS, *_DERIVED)
    # What is known of P stands at unmeasured positions too; the sums are over the measured ones alone.
    measured = derived.with_columns(pl.when(MEASURED).then(pl.col(name)).alias(name) for name in metrics)
    return measured.group_by(RESPONSE_KEYS, maintain_order=True).agg(*_counts(), *_extremes(), *_sums(metrics))


def _counts() -> list[pl.Expr]:
    return [
        pl.len().cast(pl.Int64).alias("n_positions"),
        pl.col("position").max().cast(pl.Int64).alias("last_position"),
        pl.col("position").cast(pl.Int64).sum().alias("position_sum"),
        pl.col("selected").sum().cast(pl.Int64).alias("n_selected"),
        MEASURED.sum().cast(pl.Int64).alias("n_measured"),
        IS_INFINITE.sum().cast(pl.Int64).alias("n_infinite"),
        (MEASURED & pl.col("k1_censored").fill_null(False)).sum().cast(pl.Int64).alias("n_k1_censored"),
    ]


def _extremes() -> list[pl.Expr]:
    failed = pl.col("selected") & pl.col("error").is_not_null()
    kl, same_top = pl.col("kl_estimate"), pl.col("same_top_token")
    return [
        pl.col("prompt_id").first(),
        pl.col("position").filter(same_top == 0).min().alias("first_flip"),
        pl.col("position").filter(same_top.is_null()).min().alias("first_unclear"),
        kl.max().alias("max_kl"),
        pl.col("position").filter(kl == kl.max()).first().alias("max_kl_position"),
        pl.col("reason").filter(failed).first().alias("first_reason"),
        pl.col("error").filter(failed).first().alias("first_error"),
    ]


def _sums(metrics: Sequence[str]) -> Iterator[pl.Expr]:
    for name in metrics:
        value = pl.col(name)
        yield (value * WEIGHT).sum().alias(f"{name}.sum")
        yield value.is_not_null().sum().cast(pl.Int64).alias(f"{name}.n")
        yield WEIGHT.filter(value.is_not_null()).sum().alias(f"{name}.weight")
    # Σ w², Σ w²v, Σ w²v²: the variance that independent tokens would have, for the design effect.
    kl = pl.col("kl_estimate")
    for power in (0, 1, 2):
        yield (kl**power * WEIGHT**2).filter(kl.is_not_null()).sum().alias(f"kl_estimate.w2v{power}")


def _merge(columns: Sequence[str]) -> list[pl.Expr]:
    special = {
        "prompt_id": pl.col("prompt_id").first(),
        "last_position": pl.col("last_position").max(),
        "first_flip": pl.col("first_flip").min(),
        "first_unclear": pl.col("first_unclear").min(),
        "max_kl": pl.col("max_kl").max(),
        "max_kl_position": pl.col("max_kl_position").filter(pl.col("max_kl") == pl.col("max_kl").max()).first(),
        "first_reason": pl.col("first_reason").drop_nulls().first(),
        "first_error": pl.col("first_error").drop_nulls().first(),
    }
    return [special.get(name, pl.col(name).sum()) for name in columns if name not in RESPONSE_KEYS]


def _check_positions(totals: pl.DataFrame) -> None:
    count, last = pl.col("n_positions"), pl.col("last_position")
    bad = totals.filter((count != last + 1) | (2 * pl.col("position_sum") != last * (last + 1)))
    if bad.height:
        row = bad.row(0, named=True)
        raise TokenTableError(
            f"{row['source_file']}#{row['response_idx']} has {row['n_positions']} rows but its last position is "
            f"{row['last_position']}; every position from 0 must stand in the token table once."
        )
