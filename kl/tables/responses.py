"""The response table: a row per response, from the token table and what the input says."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import polars as pl

from kl.tables.schemas import Column, schema_of
from kl.tables.totals import RESPONSE_KEYS, TokenTableError, denominator, response_totals

RESPONSE_COLUMNS = {
    "source_file": Column(pl.String, "path below the input directory"),
    "prompt_id": Column(pl.String, "content hash of the prompt: the cluster of the statistics"),
    "response_idx": Column(pl.Int32, "which response of the file; null: the whole file could not be read"),
    "model": Column(pl.String, "that wrote the response, as the file says"),
    "finish_reason": Column(pl.String, "how the response ended, as the file says"),
    "n_positions": Column(pl.Int64, "null: not known, the response could not be read", "tokens"),
    "n_selected": Column(pl.Int64, "asked; fewer than n_positions if positions were sampled", "tokens"),
    "n_measured": Column(pl.Int64, "asked and answered", "tokens"),
    "n_missing": Column(pl.Int64, "asked and not measured", "tokens"),
    "n_estimated": Column(
        pl.Int64, "measured positions with a point estimate; too short a list has bounds only", "tokens"
    ),
    "n_infinite": Column(pl.Int64, "positions with an infinite exact KL", "tokens"),
    "kl_sum": Column(pl.Float64, "Σ v/π over the estimated positions; null if n_infinite > 0", "nats"),
    "kl_mean_per_token": Column(
        pl.Float64, "kl_sum / n_positions; if some lack an estimate, over those that have one", "nats/token"
    ),
    "kl_lower_sum": Column(pl.Float64, "certified lower bound; Σ v/π", "nats"),
    "kl_upper_plausible_sum": Column(pl.Float64, "Σ v/π; null if n_unidentified > 0", "nats"),
    "n_unidentified": Column(pl.Int64, "measured positions without a plausible upper limit", "tokens"),
    "kl_floor_sum": Column(pl.Float64, "Σ v/π", "nats"),
    "kl_bucket_sum": Column(pl.Float64, "Σ v/π", "nats"),
    "kl_exact_sum": Column(pl.Float64, "Σ v/π", "nats"),
    "reverse_kl_sum": Column(pl.Float64, "KL(Q‖P); Σ v/π", "nats"),
    "js_sum": Column(pl.Float64, "Jensen-Shannon divergence; Σ v/π", "nats"),
    "k1_sum": Column(pl.Float64, "Σ v/π of log p/q of the sampled tokens; a lower bound if n_k1_censored > 0", "nats"),
    "k3_sum": Column(pl.Float64, "Σ v/π of k3 of the sampled tokens", "nats"),
    "n_k1_censored": Column(pl.Int64, "sampled tokens that Q does not list", "tokens"),
    "same_top_rate": Column(pl.Float64, "share of positions where both have the same most probable token"),
    "max_kl": Column(pl.Float64, "the largest estimate of a position", "nats"),
    "max_kl_position": Column(pl.Int32, "where that is", "tokens"),
    "mean_rest_mass_p": Column(pl.Float64, "mass outside P's lists", "probability"),
    "mean_rest_mass_q": Column(pl.Float64, "mass outside Q's lists", "probability"),
    "reason": Column(pl.String, "short code, where no position of the response has an estimate"),
    "error": Column(pl.String, "the same in words"),
}
RESPONSES = schema_of(RESPONSE_COLUMNS)
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
