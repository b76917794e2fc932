"""A score as a row of the table of scores, and back."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import polars as pl

from kl.records import Candidate, Score, ScoreFailure

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
    }
)


def row_of(model: str, result: Score | ScoreFailure) -> dict[str, Any]:
    """A score, or a failure, of ``model`` as a row of `SCORES`."""
    row: dict[str, Any] = dict.fromkeys(SCORES.names())
    row |= {"key": result.key, "model": model, "scored_at": datetime.now(UTC)}
    if isinstance(result, ScoreFailure):
        return row | {"reason": result.reason, "error": result.message}
    return row | {
        "model_version": result.model_version,
        "tokens": [candidate.token for candidate in result.top],
        "logprobs": [candidate.logprob for candidate in result.top],
        "token_ids": [candidate.token_id for candidate in result.top],
        "token_bytes": [candidate.token_bytes for candidate in result.top],
        "sampled_token": result.sampled.token if result.sampled else None,
        "sampled_logprob": result.sampled.logprob if result.sampled else None,
        "sampled_id": result.sampled.token_id if result.sampled else None,
        "finish_reason": result.finish_reason,
        "input_tokens": result.input_tokens,
        "output_tokens": result.output_tokens,
        "n_dropped": result.n_dropped,
        "full_logprobs": result.full_logprobs,
    }


def result_of(row: dict[str, Any]) -> Score | ScoreFailure:
    """The score or failure that a row holds, without a full vocabulary."""
    if row["reason"] is not None:
        return ScoreFailure(row["key"], row["reason"], row["error"], final=True)
    top = tuple(
        Candidate(*values)
        for values in zip(row["tokens"], row["logprobs"], row["token_ids"], row["token_bytes"], strict=True)
    )
    sampled = None
    if row["sampled_token"] is not None:
        sampled = Candidate(row["sampled_token"], row["sampled_logprob"], row["sampled_id"])
    return Score(
        key=row["key"],
        top=top,
        sampled=sampled,
        model_version=row["model_version"],
        finish_reason=row["finish_reason"],
        input_tokens=row["input_tokens"],
        output_tokens=row["output_tokens"],
        n_dropped=row["n_dropped"],
    )
