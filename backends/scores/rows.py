"""A score as a row of the table of scores, and back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, NamedTuple

import numpy as np
import polars as pl

from kl.columns import NO_ID, Entries, TopLists
from kl.records import LARGEST_MASS, Candidate, ExactPair, Score, ScoreFailure
from kl.scores import FACTS, ScoreTable

SCORES = pl.Schema(
    {
        "key": pl.String,  # hash of the context
        "model": pl.String,  # the model asked
        "model_version": pl.String,  # the version the service reports
        "tokens": pl.List(pl.String),  # candidates, by falling log-probability
        "logprobs": pl.List(pl.Float64),  # nats
        "token_ids": pl.List(pl.Int64),
        "token_bytes": pl.List(pl.Binary),
        "sampled_token": pl.String,
        "sampled_logprob": pl.Float64,
        "sampled_id": pl.Int64,
        "finish_reason": pl.String,
        "input_tokens": pl.Int64,
        "output_tokens": pl.Int64,
        "n_dropped": pl.Int32,
        "full_logprobs": pl.List(pl.Float32),  # by token id, with a full vocabulary only
        "reason": pl.String,  # a final failure: asking again cannot help
        "error": pl.String,
        "scored_at": pl.Datetime("us", "UTC"),
        # Of whole vocabularies that were compared and not kept: this model from that of the score `exact_versus`.
        "exact_versus": pl.String,
        "exact_kl": pl.Float64,  # nats; null: not the same vocabulary
        "exact_reverse_kl": pl.Float64,
        "exact_js": pl.Float64,
        "exact_tv": pl.Float64,
        "vocabulary": pl.Int32,  # tokens of this model and of the other
        "vocabulary_versus": pl.Int32,
        # Tokens that the model was asked for by name and that are not among the candidates.
        "wanted_tokens": pl.List(pl.String),
        "wanted_logprobs": pl.List(pl.Float64),
        "wanted_ids": pl.List(pl.Int64),
        "wanted_bytes": pl.List(pl.Binary),
    }
)
LISTS = ["tokens", "logprobs", "token_ids", "token_bytes"]  # of the candidates, equally long
WANTED = ("wanted_tokens", "wanted_logprobs", "wanted_ids", "wanted_bytes")
_EMPTY = dict.fromkeys(SCORES.names())

EXACT = (
    "exact_versus", "exact_kl", "exact_reverse_kl", "exact_js", "exact_tv", "vocabulary", "vocabulary_versus",
)  # fmt: skip
LARGEST_LOGPROB = math.log(LARGEST_MASS)  # in a list that may still be one of rounded values
ADDED = frozenset((*EXACT, *WANTED))  # parts of earlier versions lack them


def storable(result: Score | ScoreFailure) -> Score | ScoreFailure:
    """The same without what no list of log-probabilities holds, so that nothing stored passes for damaged later.

    What has no number is dropped and counted. A value above 0 is no rounding: the list is none, and asking for it again
    would buy the same.
    """
    if isinstance(result, ScoreFailure):
        return result
    lists = (result.top, result.wanted)
    if all((value := item[1]) is not None and value <= LARGEST_LOGPROB for items in lists for item in items):
        return result
    top, wanted = (tuple(item for item in items if _has_number(item)) for items in lists)
    largest = max((value for item in (*top, *wanted) if (value := item[1]) is not None), default=0.0)
    if largest > LARGEST_LOGPROB:
        message = f"Q's list has the log-probability {largest:.4g}, above 0: it is none. Check the backend's settings."
        return ScoreFailure(result.key, "mass-above-1-q", message, final=True)
    n_dropped = result.n_dropped + len(result.top) - len(top)
    return replace(result, top=top, wanted=wanted, n_dropped=n_dropped)


def _has_number(item: Candidate) -> bool:
    return item.logprob is not None and not math.isnan(item.logprob)


def row_of(model: str, result: Score | ScoreFailure) -> dict[str, Any]:
    """A score, or a failure, of ``model`` as a row of `SCORES`."""
    result = storable(result)
    row: dict[str, Any] = {**_EMPTY, "key": result.key, "model": model, "scored_at": datetime.now(UTC)}
    if isinstance(result, ScoreFailure):
        row["reason"], row["error"] = result.reason, result.message
        return row
    lists = zip(*result.top, strict=True) if result.top else ((), (), (), ())
    row["tokens"], row["logprobs"], row["token_ids"], row["token_bytes"] = map(list, lists)
    if result.sampled:
        row["sampled_token"], row["sampled_logprob"], row["sampled_id"], _ = result.sampled
    row["model_version"], row["finish_reason"] = result.model_version, result.finish_reason
    row["input_tokens"], row["output_tokens"] = result.input_tokens, result.output_tokens
    row["n_dropped"], row["full_logprobs"] = result.n_dropped, result.full_logprobs
    if result.exact is not None:
        row |= _exact_values(result.exact)
    if result.wanted:
        row |= zip(WANTED, map(list, zip(*result.wanted, strict=True)), strict=True)
    return row


def frame_of(rows: Sequence[dict[str, Any]]) -> pl.DataFrame:
    """Rows as a table of the schema `SCORES`."""
    try:
        frame = _frame_by_columns(rows)
    except (TypeError, ValueError, OverflowError, pl.exceptions.PolarsError):
        frame = None
    # Row by row it takes several times as long, and whatever polars can make fit the schema: a number for a text.
    return pl.DataFrame(rows, schema=SCORES, orient="row") if frame is None else frame


def _frame_by_columns(rows: Sequence[dict[str, Any]]) -> pl.DataFrame | None:
    """The same for scores without full vocabularies, one of which has candidates."""
    lists = [row["tokens"] for row in rows]
    if None in lists or not any(lists) or any(row["full_logprobs"] is not None for row in rows):
        return None
    lengths = [len(tokens) for tokens in lists]
    longest = max(lengths)
    frame = pl.DataFrame(
        [_column(name, dtype, [row.get(name) for row in rows], longest) for name, dtype in SCORES.items()]
    )
    if min(lengths) < longest:
        frame = frame.with_columns(pl.col(LISTS).list.head(pl.lit(pl.Series(lengths))))
    return frame


def _column(name: str, dtype: Any, values: list[Any], longest: int) -> pl.Series:
    """A column; lists are put together first, filled up to the longest one: polars takes each list by itself slowly."""
    if name not in LISTS:
        return pl.Series(name, values, dtype=dtype)  # also those of wanted tokens: few, and mostly none
    flat = [item for value in values for item in (value if len(value) == longest else _filled(value, longest))]
    return pl.Series(name, flat, dtype=dtype.inner).reshape((len(values), longest)).cast(dtype)


def _filled(value: list[Any], longest: int) -> list[Any]:
    return value + [None] * (longest - len(value))


def _exact_values(exact: ExactPair) -> dict[str, Any]:
    # No figure is NaN but where it is not defined.
    return {
        name: None if isinstance(value, float) and math.isnan(value) else value
        for name, value in zip(EXACT, exact, strict=True)
    }


def exact_of(row: dict[str, Any]) -> ExactPair:
    """The exact figures of a row that has them (columns `EXACT`)."""
    versus, *figures, vocabulary, other = (row[name] for name in EXACT)
    kl, reverse_kl, js, tv = (math.nan if value is None else value for value in figures)
    return ExactPair(versus, kl, reverse_kl, js, tv, vocabulary, other)


class Stored(NamedTuple):
    """Scores, and final failures by key."""

    table: ScoreTable
    failures: dict[str, ScoreFailure]


def results_of(frame: pl.DataFrame) -> Stored:
    """The scores and failures that rows of `SCORES` hold, without full vocabularies."""
    failed = frame.filter(pl.col("reason").is_not_null())
    failures = {
        key: ScoreFailure(key, reason, error, final=True)
        for key, reason, error in failed.select("key", "reason", "error").iter_rows()
    }
    frame = frame.filter(pl.col("reason").is_null())
    sampled = Entries(
        frame["sampled_token"].cast(pl.Categorical),
        frame["sampled_logprob"].fill_null(float("nan")).to_numpy(),
        frame["sampled_id"].fill_null(NO_ID).to_numpy(),
    )
    facts = frame.select(FACTS.names()).cast(FACTS)
    has_wanted = WANTED[0] in frame.columns and frame[WANTED[0]].null_count() < frame.height
    wanted = _lists_of(frame, *WANTED) if has_wanted else None
    return Stored(ScoreTable(_lists_of(frame, *LISTS), sampled, facts, wanted), failures)


def _lists_of(frame: pl.DataFrame, tokens: str, logprobs: str, ids: str, stated: str) -> TopLists:
    """Four columns of lists as candidate lists; a list that is null is empty."""

    def flat(name: str) -> pl.Series:
        return frame[name].explode(empty_as_null=False, keep_nulls=False)

    lengths, known = frame[tokens].list.len().fill_null(0).to_numpy(), flat(stated)
    entries = Entries(
        flat(tokens).cast(pl.Categorical),
        flat(logprobs).cast(pl.Float64).fill_null(float("nan")).to_numpy(),
        flat(ids).fill_null(NO_ID).to_numpy(),
        None if known.null_count() == len(known) else known,
    )
    return TopLists(entries, np.concatenate(([0], np.cumsum(lengths, dtype=np.int64))))
