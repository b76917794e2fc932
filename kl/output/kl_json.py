"""Writes the `*_kl.json` of an input file: its responses with the KL of every token."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray

from kl.output.atomic import write_json_atomic
from kl.records import Prompt
from kl.statistics.breakdowns import weighted_quantiles
from kl.tables.responses import info_frame, response_rows
from kl.tables.schemas import TOKENS
from kl.tables.totals import MEASURED, response_totals

# The contract's names of token columns; all others keep their own.
DETAIL_NAMES = {
    "position": "position",
    "token": "token",
    "kl_estimate": "kl_divergence",
    "logprob_p": "model1_chosen_logprob",
    "logprob_q": "model2_chosen_logprob",
    "entropy_p": "entropy1",
    "entropy_q": "entropy2",
}
_OF_THE_RESPONSE = ("source_file", "prompt_id", "response_idx")
LEFT_OUT = "left out by position sampling"


class ResponseText(NamedTuple):
    """A response's place in `*_kl.json`; with ``error`` and its short ``reason`` if it could not be scored at all."""

    response_idx: int
    text: str | None
    reason: str | None = None
    error: str | None = None


def write_kl_json(
    target: Path,
    *,
    prompt: Prompt | None,
    model_p: str | None,
    model_q: str,
    responses: Sequence[ResponseText],
    tokens: pl.DataFrame,
    error: str | None = None,
) -> None:
    """Write the results of one input file.

    Parameters
    ----------
    prompt : Prompt or None
        ``None`` if it could not be read.
    model_p, model_q : str
        Written as ``model1`` and ``model2``.
    responses : sequence of ResponseText
        All that the file holds, in its order.
    tokens : pl.DataFrame
        The file's rows of the token table (`kl.tables.schemas.TOKENS`), in order of response and position.
    error : str, optional
        Why the file as a whole could not be read.

    Raises
    ------
    ValueError
        If the tokens are not of one file, or belong to a response that is not in ``responses``.
    TokenTableError
        If the token table contradicts itself.
    """
    write_json_atomic(
        target, kl_payload(prompt, model_p, model_q, responses, tokens, error), indent=None
    )  # compact: a token takes a kilobyte as it is


def kl_payload(
    prompt: Prompt | None,
    model_p: str | None,
    model_q: str,
    responses: Sequence[ResponseText],
    tokens: pl.DataFrame,
    error: str | None = None,
) -> dict[str, Any]:
    """What `write_kl_json` writes."""
    by_index = {int(key[0]): frame for key, frame in tokens.partition_by("response_idx", as_dict=True).items()}
    _check_responses(tokens, responses, by_index)
    rows = response_rows(response_totals(tokens.lazy()), info_frame(()))
    totals = {row["response_idx"]: row for row in rows.iter_rows(named=True)}
    payload: dict[str, Any] = {"prompt": _prompt_payload(prompt)}
    if prompt is not None and prompt.system is not None:
        payload["system"] = prompt.system
    payload |= {"model1": model_p, "model2": model_q, "num_responses": len(responses)}
    if error is not None:
        payload["error"] = error
    payload["responses"] = [
        _response_payload(response, by_index[response.response_idx], totals[response.response_idx])
        if response.response_idx in by_index
        else _unscored_payload(response)
        for response in responses
    ]
    return payload


def _check_responses(tokens: pl.DataFrame, responses: Sequence[ResponseText], by_index: Iterable[int]) -> None:
    if tokens["source_file"].n_unique() > 1:
        raise ValueError(f"tokens of {tokens['source_file'].n_unique()} files were given for one result file.")
    named = Counter(response.response_idx for response in responses)
    twice = [index for index, n in named.items() if n > 1]
    if twice:
        raise ValueError(f"response {twice[0]} is named {named[twice[0]]} times.")
    unknown = sorted(set(by_index) - set(named))
    if unknown:
        raise ValueError(f"there are tokens of response {unknown[0]}, which is not among the {len(named)} of the file.")


def _prompt_payload(prompt: Prompt | None) -> str | list[dict[str, str]] | None:
    if prompt is None:
        return None
    if len(prompt.turns) == 1 and prompt.turns[0].role == "user":
        return prompt.turns[0].content
    return [{"role": turn.role, "content": turn.content} for turn in prompt.turns]


def _unscored_payload(response: ResponseText) -> dict[str, Any]:
    return {
        "response_idx": response.response_idx,
        "text": response.text,
        "num_tokens": 0,
        "kl_per_token": [],
        "token_details": [],
        "statistics": _statistics(pl.DataFrame(schema=TOKENS), None),
        "reason": response.reason,
        "error": response.error or "the response has no positions",
    }


def _response_payload(response: ResponseText, tokens: pl.DataFrame, row: Mapping[str, Any]) -> dict[str, Any]:
    payload: dict[str, Any] = {
        "response_idx": response.response_idx,
        "text": response.text,
        "num_tokens": tokens.height,
        "kl_per_token": tokens["kl_estimate"].to_list(),
        "token_details": _details(tokens).to_dicts(),
        "statistics": _statistics(tokens, row),
    }
    error = response.error or row["error"]
    if error is not None:
        payload |= {"reason": response.reason or row["reason"], "error": error}
    return payload


def _details(tokens: pl.DataFrame) -> pl.DataFrame:
    others = [name for name in TOKENS if name not in DETAIL_NAMES and name not in _OF_THE_RESPONSE]
    left_out = ~pl.col("selected") & pl.col("error").is_null()
    explained = tokens.with_columns(pl.when(left_out).then(pl.lit(LEFT_OUT)).otherwise("error").alias("error"))
    return explained.select(*(pl.col(name).alias(new) for name, new in DETAIL_NAMES.items()), *others)


def _statistics(tokens: pl.DataFrame, row: Mapping[str, Any] | None) -> dict[str, Any]:
    """Statistics over the measured positions; the standard deviation is that of a sample (n - 1)."""
    rows = tokens.filter(MEASURED)
    statistics: dict[str, Any] = dict.fromkeys(("mean_kl", "median_kl", "std_kl", "min_kl", "max_kl", "total_kl"), None)
    estimated = rows.filter(pl.col("kl_estimate").is_not_null())
    statistics |= {"n_measured": rows.height, "n_missing": 0 if row is None else row["n_missing"]}
    statistics["n_without_estimate"] = rows.height - estimated.height  # measured, but the lists give bounds only
    if row is None or estimated.height == 0 or row["n_infinite"]:
        return statistics
    values, weights = estimated["kl_estimate"].to_numpy(), 1.0 / estimated["pi"].to_numpy()
    return statistics | {
        "mean_kl": row["kl_mean_per_token"],
        "median_kl": float(weighted_quantiles(values, 0.5, weights)[0]),
        "std_kl": _sample_deviation(values, weights),
        "min_kl": float(values.min()),
        "max_kl": float(values.max()),
        "total_kl": row["kl_sum"],
    }


def _sample_deviation(values: NDArray[np.float64], weights: NDArray[np.float64]) -> float | None:
    n = len(values)
    if n < 2:
        return None
    mean = np.average(values, weights=weights)
    return math.sqrt(float(np.average((values - mean) ** 2, weights=weights)) * n / (n - 1))
