"""The positions and responses at which two models differ most."""

from __future__ import annotations

import polars as pl

from kl.tables.totals import IS_INFINITE, MEASURED, RESPONSE_KEYS

PLACE = (*RESPONSE_KEYS, "position")
_CONTEXT_TOKENS = 8  # shown before a position
_INFINITY = pl.lit(float("inf"))
_OF_POSITION = ("token", "kl_estimate", "kl_lower", "kl_upper_plausible", "logprob_p", "logprob_q", "reason")
_OF_RESPONSE = (
    *("source_file", "response_idx", "n_positions", "n_measured", "n_infinite", "kl_mean_per_token", "kl_sum"),
    *("kl_lower_sum", "max_kl", "max_kl_position", "same_top_rate", "finish_reason"),
)


def worst_positions(tokens: pl.LazyFrame, top: int) -> pl.DataFrame:
    """The measured positions with the largest KL, infinite ones first, each with the text ``before`` it.

    ``kl_estimate`` is null where the KL is infinite (``reason`` is ``infinite``).
    """
    order = pl.when(IS_INFINITE).then(_INFINITY).otherwise("kl_estimate")
    measured = tokens.filter(MEASURED).select(*PLACE, *_OF_POSITION, order=order)
    ranked = measured.drop_nulls("order").sort(["order", *PLACE], descending=[True, False, False, False])
    worst = ranked.head(top).drop("order").collect()
    return worst.join(texts_before(tokens, worst), on=PLACE, how="left", maintain_order="left")


def texts_before(tokens: pl.LazyFrame, places: pl.DataFrame) -> pl.DataFrame:
    """``source_file, response_idx, position, before`` of those of the places that have a text before them."""
    at = places.select(*RESPONSE_KEYS, at="position").lazy()
    pairs = tokens.select(*RESPONSE_KEYS, "position", "token").join(at, on=RESPONSE_KEYS, how="inner")
    near = pairs.filter(pl.col("position").is_between(pl.col("at") - _CONTEXT_TOKENS, pl.col("at") - 1))
    grouped = near.sort("position").group_by(*RESPONSE_KEYS, "at", maintain_order=True)
    return grouped.agg(before=pl.col("token").str.join("")).rename({"at": "position"}).collect()


def worst_responses(responses: pl.LazyFrame, top: int) -> pl.DataFrame:
    """The responses with the largest mean KL per token, those with an infinite one first."""
    order = pl.when(pl.col("n_infinite") > 0).then(_INFINITY).otherwise("kl_mean_per_token")
    ranked = responses.select(*_OF_RESPONSE, order=order).drop_nulls("order")
    by = ["order", *RESPONSE_KEYS]
    return ranked.sort(by, descending=[True, False, False]).head(top).drop("order").collect()
