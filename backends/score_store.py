"""Scores on disk: what was paid for, kept under the hash of its context.

One folder per prompt, so that reading what one prompt needs never touches the rest::

    scores/<prompt_id>/<part>.parquet

While a group of responses is at work its answers go, one by one as they arrive, to a journal; from time to time and at
the end they become a part and the journal goes away. A journal that a killed run left behind is taken in by the next::

    scores/journals/<name>.jsonl

A part is written whole or not at all. The same score may stand in two parts (a run was killed between writing a merged
part and removing its pieces); the answers are equal and the first one read counts. All parts are one plain table:
``polars.read_parquet("scores/*/*.parquet")``.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from backends.errors import ConfigError
from kl.records import Candidate, Score, ScoreFailure

logger = logging.getLogger(__name__)

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
_JOURNALS = "journals"
_PARTS_WORTH_MERGING = 4
_SYNC_INTERVAL_S = 1.0
_LIGHT = [name for name in SCORES.names() if name != "full_logprobs"]


class ScoreStore:
    """The scores below one folder.

    Parameters
    ----------
    root : Path
        The ``scores`` folder of an output directory; made when the first score is written.
    every_failure : bool
        Also keep failures that may pass: for the record of one run, never where it is decided what is bought.
    """

    def __init__(self, root: Path, *, every_failure: bool = False) -> None:
        self.root = root
        self._every_failure = every_failure

    def known_keys(self, prompt_id: str) -> set[str]:
        """Keys that need not be asked again: scores, and failures that are final."""
        parts = self._parts(prompt_id)
        return {key for part in parts for key in self._read(part, ["key"])["key"]}

    def load(self, prompt_id: str, keys: Iterable[str]) -> dict[str, Score | ScoreFailure]:
        """The stored results among ``keys``, without full vocabularies."""
        wanted = list(dict.fromkeys(keys))
        found: dict[str, Score | ScoreFailure] = {}
        for part in self._parts(prompt_id):
            for row in self._read(part, _LIGHT, wanted).iter_rows(named=True):
                found.setdefault(row["key"], _result(row))
        return found

    def load_full(self, prompt_id: str, keys: Sequence[str]) -> dict[str, np.ndarray[Any, np.dtype[np.float32]]]:
        """The full-vocabulary log-probabilities stored under ``keys``: float32, shape (V,), by token id."""
        found: dict[str, np.ndarray[Any, np.dtype[np.float32]]] = {}
        for part in self._parts(prompt_id):
            missing = [key for key in keys if key not in found]
            if not missing:
                break
            frame = self._read(part, ["key", "full_logprobs"], missing)
            for key, values in zip(frame["key"], frame["full_logprobs"], strict=True):
                if values is not None:
                    found[key] = values.to_numpy()
        return found

    def append(self, prompt_id: str, model: str, results: Sequence[Score | ScoreFailure]) -> None:
        """Write scores and final failures as one part."""
        self.write_rows(prompt_id, [_row(model, result) for result in results if self._keeps(result)])

    def _keeps(self, result: Score | ScoreFailure) -> bool:
        return isinstance(result, Score) or result.final or self._every_failure

    def write_rows(self, prompt_id: str, rows: Sequence[dict[str, Any]]) -> None:
        """Write rows of the schema `SCORES` as one part."""
        if rows:
            frame = pl.DataFrame(rows, schema=SCORES, orient="row")
            digest = hashlib.sha256("".join(frame["key"]).encode("ascii")).hexdigest()[:16]
            self._write(frame, self.root / prompt_id / f"{digest}.parquet")

    def journal(self, name: str) -> ScoreJournal:
        """A journal for the answers of one group; ``name`` must be free among those open."""
        return ScoreJournal(self.root / _JOURNALS / f"{name}.jsonl", self)

    def recover(self) -> int:
        """Take in what killed runs left in journals; returns how many answers. No other run may be using the folder."""
        count = 0
        for path in sorted((self.root / _JOURNALS).glob("*.jsonl")):
            count += ScoreJournal(path, self).recover()
        return count

    def compact_all(self) -> None:
        """Merge small parts, prompt by prompt. No other run may be using the folder."""
        for folder in sorted(self.root.iterdir()) if self.root.is_dir() else ():
            if folder.is_dir() and folder.name != _JOURNALS:
                self.compact(folder.name)

    def compact(self, prompt_id: str) -> None:
        """Merge the many small parts of a prompt into one, sorted by key."""
        parts = self._parts(prompt_id)
        if len(parts) < _PARTS_WORTH_MERGING or any(self._has_full(part) for part in parts):
            return
        frame = pl.concat(self._read(part, SCORES.names()) for part in parts).unique("key", keep="first").sort("key")
        digest = hashlib.sha256("".join(frame["key"]).encode("ascii")).hexdigest()[:16]
        target = self.root / prompt_id / f"{digest}.parquet"
        self._write(frame, target)
        for part in parts:
            if part != target:
                part.unlink()

    def _parts(self, prompt_id: str) -> list[Path]:
        return sorted((self.root / prompt_id).glob("*.parquet"))

    def _has_full(self, part: Path) -> bool:
        return bool(
            pl.scan_parquet(part, glob=False, hive_partitioning=False)
            .select(pl.col("full_logprobs").is_not_null().any())
            .collect()
            .item()
        )

    def _read(self, part: Path, columns: list[str], keys: list[str] | None = None) -> pl.DataFrame:
        try:
            frame = pl.read_parquet(part, columns=columns, glob=False, hive_partitioning=False)
        except (pl.exceptions.PolarsError, OSError) as error:
            raise ConfigError(
                f"the stored scores in {part} cannot be read ({error}). Restore the file, or move it away: "
                "its scores are then asked for, and paid for, again."
            ) from error
        return frame if keys is None else frame.filter(pl.col("key").is_in(keys))

    def _write(self, frame: pl.DataFrame, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        # Two tasks write a part of one name only with equal keys; their temporary names differ all the same.
        temporary = target.with_name(f".{target.name}.{os.getpid()}-{id(frame)}.tmp")
        try:
            with temporary.open("wb") as file:
                frame.write_parquet(file, compression="zstd")
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        finally:
            with suppress(FileNotFoundError):
                temporary.unlink()


class ScoreJournal:
    """Answers on disk the moment they arrive, one line each, until they are written as a part.

    A line reaches the operating system before `add` returns, so that killing the process loses none; the disk is told
    about once a second, for the machine's own failures. Full vocabularies are left out: they are large, and no service
    sells them.
    """

    def __init__(self, path: Path, store: ScoreStore) -> None:
        self._path = path
        self._store = store
        self._file: io.BufferedWriter | None = None
        self._synced = 0.0

    def add(self, prompt_id: str, model: str, result: Score | ScoreFailure) -> None:
        """Append one answer; failures that may pass are not kept."""
        if isinstance(result, ScoreFailure):
            if not result.final:
                return
        elif result.full_logprobs is not None:
            return
        if self._file is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("ab")
        line = json.dumps({"prompt_id": prompt_id, **_row(model, result)}, default=_plain) + "\n"
        self._file.write(line.encode("ascii"))
        self._file.flush()
        if time.monotonic() - self._synced > _SYNC_INTERVAL_S:
            os.fsync(self._file.fileno())
            self._synced = time.monotonic()

    def clear(self) -> None:
        """Forget the lines: they stand in a part now."""
        if self._file is not None:
            self._file.close()
            self._file = None
        self._path.unlink(missing_ok=True)

    def recover(self) -> int:
        """Write the lines of a killed run as parts, then clear; a line that was cut short is dropped."""
        by_prompt: dict[str, list[dict[str, Any]]] = {}
        with self._path.open("rb") as file:
            for line in file:
                try:
                    prompt_id, row = _recorded(line)
                except (ValueError, KeyError, TypeError, AttributeError):
                    # The end of a killed run cuts the last line; a machine that fails may leave any bytes.
                    logger.warning("%s: a line was cut short and is left out; its context is asked again", self._path)
                    continue
                by_prompt.setdefault(prompt_id, []).append(row)
        for prompt_id, rows in by_prompt.items():
            self._store.write_rows(prompt_id, rows)
        self.clear()
        return sum(len(rows) for rows in by_prompt.values())


def _recorded(line: bytes) -> tuple[str, dict[str, Any]]:
    row = json.loads(line)
    row["scored_at"] = datetime.fromisoformat(row["scored_at"])
    row["token_bytes"] = row["token_bytes"] and [item if item is None else bytes(item) for item in row["token_bytes"]]
    return row.pop("prompt_id"), row


def _plain(value: object) -> Any:
    if isinstance(value, bytes):
        return list(value)
    if isinstance(value, datetime):
        return value.isoformat()
    raise TypeError(f"{type(value).__name__} has no place in a journal")


def _row(model: str, result: Score | ScoreFailure) -> dict[str, Any]:
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


def _result(row: dict[str, Any]) -> Score | ScoreFailure:
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
