"""The response table: a row per response, from the token table and what the input says."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import polars as pl

from kl.tables.totals import RESPONSE_KEYS, TokenTableError, denominator, response_totals

RESPONSES = pl.Schema(
    {
        "source_file": pl.String,  # path below the input directory
        "prompt_id": pl.String,
        "response_idx": pl.Int32,  # null: the whole file could not be read
        "model": pl.String,  # that wrote the response, as the file says
        "finish_reason": pl.String,
        "n_positions": pl.Int64,  # null: not known, the response could not be read
        "n_selected": pl.Int64,  # asked; fewer than n_positions if positions were sampled
        "n_measured": pl.Int64,
        "n_missing": pl.Int64,  # asked and not measured
        "n_estimated": pl.Int64,  # measured positions with a point estimate; too short a list has bounds only
        "n_infinite": pl.Int64,  # positions with an infinite exact KL
        "kl_sum": pl.Float64,  # Σ v/π over the estimated positions; null if n_infinite > 0
        "kl_mean_per_token": pl.Float64,  # kl_sum / n_positions; if some lack an estimate, over those that have one
        "kl_lower_sum": pl.Float64,
        "kl_upper_plausible_sum": pl.Float64,  # null if n_unidentified > 0
        "n_unidentified": pl.Int64,  # measured positions without a plausible upper limit
        "kl_floor_sum": pl.Float64,
        "kl_bucket_sum": pl.Float64,
        "kl_exact_sum": pl.Float64,
        "reverse_kl_sum": pl.Float64,
        "js_sum": pl.Float64,
        "k1_sum": pl.Float64,  # a lower bound if n_k1_censored > 0
        "k3_sum": pl.Float64,
        "n_k1_censored": pl.Int64,
        "same_top_rate": pl.Float64,
        "max_kl": pl.Float64,
        "max_kl_position": pl.Int32,
        "mean_rest_mass_p": pl.Float64,
        "mean_rest_mass_q": pl.Float64,
        "reason": pl.String,  # short code, where no position of the response has an estimate
        "error": pl.String,  # the same in words
    }
)
_SUMS = {"reverse_kl_sum": "reverse_kl_estimate", "js_sum": "js_estimate"}
# Null unless known at every measured position.
_WHOLE_SUMS = {
    "kl_lower_sum": "kl_lower",
    "kl_upper_plausible_sum": "kl_upper_plausible",
    "kl_floor_sum": "kl_floor",
    "kl_bucket_sum": "kl_bucket",
    "kl_exact_sum": "kl_exact",
    "k1_sum": "logratio_k1",
    "k3_sum": "k3",
}
_MEANS = {"same_top_rate": "same_top_token", "mean_rest_mass_p": "rest_mass_p", "mean_rest_mass_q": "rest_mass_q"}


class ResponseInfo(NamedTuple):
    """What the input says of a response, beside its tokens.

    A response that could not be read has ``reason`` and ``error``; a file that could not be read has one entry with
    the ``response_idx`` ``None``.
    """

    source_file: str
    response_idx: int | None
    prompt_id: str | None = None
    model: str | None = None
    finish_reason: str | None = None
    reason: str | None = None
    error: str | None = None


def summarise_responses(tokens: pl.LazyFrame, responses: Iterable[ResponseInfo] = ()) -> pl.DataFrame:
    """A row per response (`RESPONSES`), by file and index; also for responses that have no tokens.

    Raises
    ------
    TokenTableError
        If the token table contradicts itself (`kl.tables.totals.response_totals`), or ``responses`` names one twice.
    """
    return response_rows(response_totals(tokens), info_frame(responses))


def info_frame(responses: Iterable[ResponseInfo]) -> pl.DataFrame:
    """``responses`` as a frame.

    Raises
    ------
    TokenTableError
        If a response is named twice.
    """
    schema = {name: RESPONSES[name] for name in ResponseInfo._fields}
    frame = pl.DataFrame(list(responses), schema=schema, orient="row")
    twice = frame.filter(pl.struct(RESPONSE_KEYS).is_duplicated())
    if twice.height:
        raise TokenTableError(f"the response {twice['source_file'][0]}#{twice['response_idx'][0]} is named twice.")
    return frame


def response_rows(totals: pl.DataFrame, info: pl.DataFrame) -> pl.DataFrame:
    """`RESPONSES` from the sums per response (`response_totals`) and `info_frame`."""
    measured, estimated = pl.col("n_measured") > 0, pl.col("kl_estimate.n") > 0
    finite = pl.col("n_infinite") == 0
    rows = totals.with_columns(
        _sum("kl_estimate", estimated & finite).alias("kl_sum"),
        *(_sum(metric, pl.col(f"{metric}.n") > 0).alias(name) for name, metric in _SUMS.items()),
        *(_sum(metric, measured & _everywhere(metric)).alias(name) for name, metric in _WHOLE_SUMS.items()),
        *(_mean(metric).alias(name) for name, metric in _MEANS.items()),
        pl.col("kl_estimate.n").alias("n_estimated"),
        pl.when(finite).then(_mean("kl_estimate")).alias("kl_mean_per_token"),
        pl.when(finite).then("max_kl").alias("max_kl"),
        pl.when(finite).then("max_kl_position").alias("max_kl_position"),
        (pl.col("n_measured") - pl.col("kl_upper_plausible.n")).alias("n_unidentified"),
        pl.when(~estimated).then("first_reason").alias("reason"),
        pl.when(~estimated).then("first_error").alias("error"),
    )
    joined = rows.join(info, on=RESPONSE_KEYS, how="full", coalesce=True, suffix="_info")
    both = [pl.coalesce(name, f"{name}_info").alias(name) for name in ("prompt_id", "reason", "error")]
    ordered = joined.with_columns(both).sort(RESPONSE_KEYS, nulls_last=True)
    return ordered.select(pl.col(name).cast(kind) for name, kind in RESPONSES.items())


def _everywhere(metric: str) -> pl.Expr:
    return pl.col(f"{metric}.n") == pl.col("n_measured")


def _mean(metric: str) -> pl.Expr:
    # Over the positions where it is known; null where it is known at none.
    return pl.when(pl.col(f"{metric}.n") > 0).then(pl.col(f"{metric}.sum") / denominator(metric))


def _sum(metric: str, known: pl.Expr) -> pl.Expr:
    return pl.when(known).then(f"{metric}.sum")
