"""Writes the results: `tokens.parquet`, `responses.parquet`, `summary.json`, `run.json` and a `*_kl.json` per file.

Every file appears whole or not at all: it is written under a temporary name beside its place, synced, and renamed.
JSON is strict (no NaN, no infinity) and UTF-8.
"""

from __future__ import annotations

import json
import math
import os
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray

from kl.records import Prompt
from kl.statistics.breakdowns import weighted_quantiles
from kl.statistics.summary import Summary
from kl.tables.responses import RESPONSES, info_frame, response_rows
from kl.tables.schemas import TOKENS
from kl.tables.totals import MEASURED, check_rows, response_totals

# Fixed, because the default depends on how the rows arrive; the bytes of a file must depend on its rows alone.
ROW_GROUP_ROWS = 65_536

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


def result_paths(source_files: Iterable[str]) -> dict[str, str]:
    """Where the results of each input file go, below the output directory: ``sub/a.json`` → ``sub/a_kl.json``.

    Files of one folder whose stems are the same (``a.json`` and ``a.jsonl``) keep their whole names:
    ``a.json_kl.json`` and ``a.jsonl_kl.json``.

    Raises
    ------
    ValueError
        If a path is absolute, leaves the directory or is named twice.
    """
    sources = [PurePosixPath(name) for name in source_files]
    for source, n in Counter(sources).items():
        if source.is_absolute() or ".." in source.parts or not source.name:
            raise ValueError(f"input file {str(source)!r} is not a path below the input directory.")
        if n > 1:
            raise ValueError(f"input file {str(source)!r} is named {n} times.")
    targets = {source: source.with_name(f"{source.stem}_kl.json") for source in sources}
    # A whole name can meet another file's stem ("a.json" and "a.json.json"); then that one takes its whole name too.
    while clashes := {target for target, n in Counter(targets.values()).items() if n > 1}:
        for source, target in targets.items():
            if target in clashes:
                targets[source] = source.with_name(f"{source.name}_kl.json")
    return {str(source): str(target) for source, target in targets.items()}


def write_tokens(parts: Sequence[Path], target: Path) -> None:
    """Join token tables, in the order given, into one; the same parts give the same bytes.

    Streams: memory does not grow with the parts. Without parts the table has the columns and no row.

    Raises
    ------
    polars.exceptions.SchemaError
        If a part does not have exactly the columns of `kl.tables.schemas.TOKENS`.
    """
    if parts:
        # A bracket or "=" in a directory's name is neither a pattern nor a partition.
        tokens = pl.scan_parquet(list(parts), schema=TOKENS, glob=False, hive_partitioning=False)
    else:
        tokens = pl.LazyFrame(schema=TOKENS)
    _write_atomic(
        target,
        lambda path: tokens.select(TOKENS.names()).sink_parquet(
            path, compression="zstd", row_group_size=ROW_GROUP_ROWS, maintain_order=True
        ),
    )


def write_part(tokens: pl.DataFrame, target: Path) -> None:
    """Write the token table of one input file.

    Raises
    ------
    polars.exceptions.PolarsError
        If a column of `kl.tables.schemas.TOKENS` is absent or does not fit its type.
    TokenTableError
        If a row contradicts itself (`kl.tables.totals.check_rows`).
    """
    fitted = tokens.select(pl.col(name).cast(kind) for name, kind in TOKENS.items())
    check_rows(fitted)
    _write_atomic(target, lambda path: fitted.write_parquet(path, row_group_size=ROW_GROUP_ROWS))


def write_responses(responses: pl.DataFrame, target: Path) -> None:
    """Write the response table (`kl.tables.responses.RESPONSES`)."""
    fitted = responses.select(pl.col(name).cast(kind) for name, kind in RESPONSES.items())
    _write_atomic(target, lambda path: fitted.write_parquet(path, row_group_size=ROW_GROUP_ROWS))


def write_summary(summary: Summary, target: Path) -> None:
    """Write `summary.json`."""
    write_json_atomic(target, summary.to_json())


def write_run_info(run: Mapping[str, Any], target: Path) -> None:
    """Write `run.json`."""
    write_json_atomic(target, dict(run))


def write_json_atomic(path: Path, payload: Any, *, indent: int | None = 2) -> None:
    """Write ``payload`` as strict JSON.

    Raises
    ------
    ValueError
        If a number in it is NaN or infinite.
    TypeError
        If it holds something that JSON has no form for.
    """
    text = json.dumps(payload, ensure_ascii=False, allow_nan=False, indent=indent)
    # Half of a surrogate pair has no UTF-8 form; this writes it as \\udXXX, which is what JSON calls it.
    data = text.encode("utf-8", errors="backslashreplace") + b"\n"
    _write_atomic(path, lambda temporary: temporary.write_bytes(data))


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


def _write_atomic(target: Path, write: Callable[[Path], Any]) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name[:100]}.{uuid.uuid4().hex}.tmp")
    try:
        write(temporary)
        _sync(temporary)
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync(target.parent)


def _sync(path: Path) -> None:
    if path.is_dir() and os.name == "nt":  # Windows cannot open a directory; it syncs the entry with the file
        return
    handle = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
