"""What a model listed at first positions, each context asked some times: one run's table, and many runs as an array."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import polars as pl

from kl.columns import FloatArray

FIRST_LISTS = pl.Schema(
    {
        "key": pl.String,  # of the context, as it was asked the first time
        "asked": pl.Int32,  # which time, from 1
        "tokens": pl.List(pl.String),
        "token_ids": pl.List(pl.Int64),
        "token_bytes": pl.List(pl.Binary),
        "logprobs": pl.List(pl.Float64),  # nats
    }
)
_LISTS = ("tokens", "token_ids", "token_bytes", "logprobs")
_TOKEN = ("tokens", "token_ids", "token_bytes")
_ANSWER = ("run", "key", "asked")


def mean_logprobs(runs: Sequence[pl.DataFrame]) -> FloatArray:
    """Mean log-probability of each token over the times that a run asked, of the contexts that every run has a list of.

    A token that one list lacks and another has is at most as likely as the last in the list, and counts as that.

    Parameters
    ----------
    runs : sequence of pl.DataFrame
        R tables, schema `FIRST_LISTS`.

    Returns
    -------
    array, shape (R, G, K)
        NaN where a context has fewer than K tokens.
    """
    lists = pl.concat([table.with_columns(run=pl.lit(run, pl.Int32)) for run, table in enumerate(runs)])
    entries = lists.explode(_LISTS).filter(pl.col("logprobs").is_finite())
    in_all = entries.group_by("key").agg(pl.col("run").n_unique()).filter(pl.col("run") == len(runs)).select("key")
    entries = entries.join(in_all, on="key", how="semi")
    entries = entries.group_by(*_ANSWER, *_TOKEN).agg(pl.col("logprobs").max())  # a source may list one twice
    places = entries.select("key", *_TOKEN).unique().sort("key", *_TOKEN).with_columns(
        context=pl.col("key").rank("dense") - 1, place=pl.int_range(pl.len()).over("key")
    )  # fmt: skip
    lowest = entries.group_by(_ANSWER).agg(pl.col("logprobs").min().alias("lowest"))
    known = lowest.join(places, on="key").join(
        entries, on=[*_ANSWER, *_TOKEN], how="left", nulls_equal=True
    )  # fmt: skip
    means = known.group_by("run", "context", "place").agg(pl.col("logprobs").fill_null(pl.col("lowest")).mean())
    shape = len(runs), in_all.height, int(places.select(pl.col("place").max() + 1).item() or 0)
    found = np.full(shape, np.nan)
    found[means["run"].to_numpy(), means["context"].to_numpy(), means["place"].to_numpy()] = means["logprobs"]
    return found
