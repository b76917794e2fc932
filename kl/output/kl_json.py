"""Writes the `*_kl.json` of an input file: its responses with the KL of every token.

A token is about a kilobyte of JSON, and the numbers outweigh all else. Polars encodes them, some thousand rows at a
time; only the texts of the input, which may hold what is no Unicode, go through Python's own encoder.
"""

from __future__ import annotations

import io
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray

from kl.output.atomic import json_bytes
from kl.records import Prompt
from kl.statistics.breakdowns import weighted_quantiles
from kl.tables.schemas import TOKENS
from kl.tables.totals import MEASURED, RESPONSE_KEYS

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
_OF_THE_ROW = ("n_missing", "n_infinite", "kl_mean_per_token", "kl_sum", "reason", "error")
LEFT_OUT = "left out by position sampling"
_ROWS_AT_ONCE = 4096  # some 6 MB of JSON; more leave the processor's cache

_FloatArray = NDArray[np.float64]


class ResponseText(NamedTuple):
    """A response's place in `*_kl.json`; with ``error`` and its short ``reason`` if it could not be scored at all."""

    response_idx: int
    text: str | None
    reason: str | None = None
    error: str | None = None


class ScoredResponse(NamedTuple):
    """What the token table says of a response; ``numbers`` are the entries ``num_tokens`` to ``statistics``."""

    source_file: str
    response_idx: int
    numbers: Sequence[bytes | memoryview]
    reason: str | None
    error: str | None


def write_kl_json(
    path: Path,
    *,
    prompt: Prompt | None,
    model_p: str | None,
    model_q: str,
    responses: Sequence[ResponseText],
    scored: Iterable[ScoredResponse],
    error: str | None = None,
) -> None:
    """Write the results of one input file; `kl.output.atomic` lets it appear whole.

    Parameters
    ----------
    prompt : Prompt or None
        ``None`` if it could not be read.
    model_p, model_q : str
        Written as ``model1`` and ``model2``.
    responses : sequence of ResponseText
        All that the file holds, in its order.
    scored : iterable of ScoredResponse
        Those of them that have tokens (`scored_responses`), in the same order; one at a time is held.
    error : str, optional
        Why the file as a whole could not be read.

    Raises
    ------
    ValueError
        If a response is named twice, or ``scored`` has one that is not in ``responses``, or not in their order.
    """
    named = Counter(response.response_idx for response in responses)
    twice = [index for index, n in named.items() if n > 1]
    if twice:
        raise ValueError(f"response {twice[0]} is named {named[twice[0]]} times.")
    head: dict[str, Any] = {"prompt": _prompt_payload(prompt)}
    if prompt is not None and prompt.system is not None:
        head["system"] = prompt.system
    head |= {"model1": model_p, "model2": model_q, "num_responses": len(responses)}
    if error is not None:
        head["error"] = error
    with path.open("wb") as file:
        file.write(json_bytes(head)[:-1] + b',"responses":[')
        for number, response in enumerate(_responses(responses, scored)):
            file.write(b"," if number else b"")
            file.writelines(response)
        file.write(b"]}\n")


def _responses(
    responses: Sequence[ResponseText], scored: Iterable[ScoredResponse]
) -> Iterator[list[bytes | memoryview]]:
    waiting = iter(scored)
    found = next(waiting, None)
    for response in responses:
        if found is not None and found.response_idx == response.response_idx:
            yield _response(response, found)
            found = next(waiting, None)
        else:
            yield _response(response, _unscored(response))
    if found is not None:
        where = f"the {len(responses)} of the file, or not in their order"
        raise ValueError(f"there are tokens of response {found.response_idx}, which is not among {where}.")


def _prompt_payload(prompt: Prompt | None) -> str | list[dict[str, str]] | None:
    if prompt is None:
        return None
    if len(prompt.turns) == 1 and prompt.turns[0].role == "user":
        return prompt.turns[0].content
    return [{"role": turn.role, "content": turn.content} for turn in prompt.turns]


def _response(response: ResponseText, scored: ScoredResponse) -> list[bytes | memoryview]:
    head = json_bytes({"response_idx": response.response_idx, "text": response.text})
    error = response.error or scored.error
    why = (
        b"" if error is None else b"," + json_bytes({"reason": response.reason or scored.reason, "error": error})[1:-1]
    )
    return [head[:-1], b",", *scored.numbers, why, b"}"]


def _unscored(response: ResponseText) -> ScoredResponse:
    nothing = np.empty(0)
    statistics = _statistics(nothing, nothing, 0, {"n_missing": 0})
    numbers = json_bytes({"num_tokens": 0, "kl_per_token": [], "token_details": [], "statistics": statistics})[1:-1]
    return ScoredResponse("", response.response_idx, [numbers], None, "the response has no positions")


def scored_responses(batches: Iterable[pl.DataFrame], rows: pl.DataFrame) -> Iterator[ScoredResponse]:
    """Each response of a token table, in its order.

    Parameters
    ----------
    batches : iterable of pl.DataFrame
        Consecutive rows (`kl.tables.totals.token_batches`, all columns), in order of response and position.
    rows : pl.DataFrame
        The rows of the response table (`kl.tables.responses.RESPONSES`); sums and means are theirs.

    Raises
    ------
    ValueError
        If a response is not in ``rows``.
    """
    of_rows = rows.select(*RESPONSE_KEYS, *_OF_THE_ROW)
    for tokens, starts in _whole_responses(batches):
        known = tokens.select(RESPONSE_KEYS)[starts].join(of_rows, on=RESPONSE_KEYS, how="left", maintain_order="left")
        if known["n_missing"].null_count():
            raise ValueError(f"a response of {known['source_file'][0]} has tokens and is not among the rows.")
        yield from _encoded(tokens, starts, known)


def _whole_responses(batches: Iterable[pl.DataFrame]) -> Iterator[tuple[pl.DataFrame, list[int]]]:
    """Rows that end where a response does, with the first row of each response."""
    begun: list[pl.DataFrame] = []
    for part in (part for batch in batches for part in batch.iter_slices(_ROWS_AT_ONCE)):
        tokens = pl.concat([*begun, part])
        starts = _first_rows(tokens)
        if len(starts) > 1:
            yield tokens[: starts[-1]], starts[:-1]
        begun = [tokens[starts[-1] :]] if starts else []
    if begun:
        yield begun[0], [0]


def _first_rows(tokens: pl.DataFrame) -> list[int]:
    differs = pl.any_horizontal(pl.col(key) != pl.col(key).shift() for key in RESPONSE_KEYS)
    return tokens.select(differs.fill_null(value=True).arg_true()).to_series().to_list()


def _encoded(tokens: pl.DataFrame, starts: list[int], known: pl.DataFrame) -> Iterator[ScoredResponse]:
    details = _Objects.of(_details(tokens))
    values = tokens["kl_estimate"].to_numpy()
    weights = 1.0 / tokens["pi"].to_numpy()
    measured = tokens.select(MEASURED).to_series().to_numpy()
    ends = [*starts[1:], tokens.height]
    lists = _Objects.of(_lists(tokens["kl_estimate"], np.subtract(ends, starts)))
    for number, (start, end, row) in enumerate(zip(starts, ends, known.iter_rows(named=True), strict=True)):
        of_response = slice(start, end)
        estimated = measured[of_response] & ~np.isnan(values[of_response])
        n_measured = int(measured[of_response].sum())
        statistics = _statistics(values[of_response][estimated], weights[of_response][estimated], n_measured, row)
        of_list, of_tokens = lists.joined(number, number + 1)[1:-1], details.joined(start, end)
        numbers = [of_list, b',"token_details":[', of_tokens, b'],"statistics":', json_bytes(statistics)]
        yield ScoredResponse(row["source_file"], row["response_idx"], numbers, row["reason"], row["error"])


class _Objects(NamedTuple):
    """Rows as JSON objects, with a comma after each. Floats are the shortest that read the same."""

    text: memoryview
    commas: NDArray[np.int64]

    @classmethod
    def of(cls, frame: pl.DataFrame) -> _Objects:
        """Of all rows of a frame."""
        made = io.BytesIO()
        frame.write_ndjson(made)
        text = made.getbuffer()
        signs = np.frombuffer(text, dtype=np.uint8)  # the same memory: a copy costs as much as all else here
        ends = np.flatnonzero(signs == ord("\n"))  # those in texts are written as two letters
        signs[ends] = ord(",")
        return cls(text, ends)

    def joined(self, start: int, stop: int) -> memoryview:
        """Those from one row to another."""
        return self.text[self.commas[start - 1] + 1 if start else 0 : self.commas[stop - 1]]


def _lists(values: pl.Series, lengths: NDArray[np.int64]) -> pl.DataFrame:
    """``num_tokens`` and ``kl_per_token`` of each response."""
    runs = pl.DataFrame({"response": np.repeat(np.arange(len(lengths)), lengths), "value": values})
    grouped = runs.group_by("response", maintain_order=True).agg(num_tokens=pl.len(), kl_per_token="value")
    return grouped.drop("response")


def _details(tokens: pl.DataFrame) -> pl.DataFrame:
    others = [name for name in TOKENS if name not in DETAIL_NAMES and name not in _OF_THE_RESPONSE]
    left_out = ~pl.col("selected") & pl.col("error").is_null()
    explained = tokens.with_columns(pl.when(left_out).then(pl.lit(LEFT_OUT)).otherwise("error").alias("error"))
    return explained.select(*(pl.col(name).alias(new) for name, new in DETAIL_NAMES.items()), *others)


def _statistics(values: _FloatArray, weights: _FloatArray, n_measured: int, row: Mapping[str, Any]) -> dict[str, Any]:
    """Statistics over the measured positions; the standard deviation is that of a sample (n - 1)."""
    statistics: dict[str, Any] = dict.fromkeys(("mean_kl", "median_kl", "std_kl", "min_kl", "max_kl", "total_kl"))
    statistics |= {"n_measured": n_measured, "n_missing": row["n_missing"]}
    statistics["n_without_estimate"] = n_measured - len(values)  # measured, but the lists give bounds only
    if not len(values) or row["n_infinite"]:
        return statistics
    return statistics | {
        "mean_kl": row["kl_mean_per_token"],
        "median_kl": _median(values, weights),
        "std_kl": _sample_deviation(values, weights),
        "min_kl": float(values.min()),
        "max_kl": float(values.max()),
        "total_kl": row["kl_sum"],
    }


def _median(values: _FloatArray, weights: _FloatArray) -> float:
    if weights.min() != weights.max():
        return float(weighted_quantiles(values, 0.5, weights)[0])
    # The same bits as `weighted_quantiles`, at a tenth of the time of `numpy.quantile`.
    n, data = len(values), np.sort(values)
    low, high = float(data[(n - 1) // 2]), float(data[n // 2])
    return high - (high - low) * 0.5


def _sample_deviation(values: _FloatArray, weights: _FloatArray) -> float | None:
    n = len(values)
    if n < 2:
        return None
    total = weights.sum()
    squares = (values - (values * weights).sum() / total) ** 2
    return math.sqrt(float((squares * weights).sum() / total) * n / (n - 1))
