"""Answers in safety the moment they arrive, one line each, until they are written as a part of the table."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec

from backends.scores.lines import SUFFIX, lines_in
from backends.scores.rows import row_of
from backends.storage import local_copies
from kl.records import Score, ScoreFailure

logger = logging.getLogger(__name__)

__all__ = ["SUFFIX", "ScoreJournal", "recorded"]

_BYTES = ("token_bytes", "wanted_bytes")  # columns of lists of bytes
_encode = msgspec.json.Encoder().encode


class ScoreJournal:
    """The answers of one group of responses until they stand in a part.

    On a disk a line reaches the operating system before `add` returns, so that killing the process loses none; the disk
    is told about once a second, for the machine's own failures. In a bucket the lines of all groups of the process are
    stored together about once a second: a kill loses what arrived in the last one (rows of a batch job are still in the
    job's output; online answers are asked again). Full vocabularies are left out: they are large, and no service sells
    them; so are infinite figures of them.

    Parameters
    ----------
    folder : Path
        The journals of a store.
    name : str
        Free among those open.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self._lines = lines_in(folder, name)

    def add(self, prompt_id: str, model: str, result: Score | ScoreFailure) -> None:
        """Append one answer; failures that may pass are not kept."""
        if isinstance(result, ScoreFailure):
            if not result.final:
                return
        elif result.full_logprobs is not None or (result.exact is not None and math.inf in result.exact):
            return  # JSON has no infinity
        self._lines.append(_line({"prompt_id": prompt_id, **row_of(model, result)}))

    def clear(self) -> None:
        """Forget the lines: they stand in a part now."""
        self._lines.clear()


def recorded(paths: Iterable[Path]) -> dict[str, list[dict[str, Any]]]:
    """Prompt id → rows that killed runs left in journals; a line that was cut short is dropped."""
    by_prompt: dict[str, list[dict[str, Any]]] = {}
    for path, copy in local_copies(paths):
        with copy.open("rb") as file:
            for line in file:
                try:
                    prompt_id, row = _recorded(line)
                except (ValueError, KeyError, TypeError, AttributeError):
                    # The end of a killed run cuts the last line; a machine that fails may leave any bytes.
                    logger.warning("%s: a line was cut short and is left out; its context is asked again", path)
                    continue
                by_prompt.setdefault(prompt_id, []).append(row)
    return by_prompt


def _recorded(line: bytes) -> tuple[str, dict[str, Any]]:
    row = json.loads(line)
    row["scored_at"] = datetime.fromisoformat(row["scored_at"])
    for name in _BYTES:
        row[name] = row.get(name) and [item if item is None else bytes(item) for item in row[name]]
    return row.pop("prompt_id"), row


def _line(row: dict[str, Any]) -> bytes:
    row["scored_at"] = row["scored_at"].isoformat()
    for name in _BYTES:
        if (items := row[name]) and any(item is not None for item in items):
            row[name] = [item if item is None else list(item) for item in items]
    return (_plain(row) or json.dumps(row).encode("ascii")) + b"\n"


def _plain(row: dict[str, Any]) -> bytes | None:
    """A row as JSON; None where it holds what JSON has no word for: an infinite number, half a surrogate pair."""
    try:
        known = sum(row["logprobs"] or ()) + sum(row["wanted_logprobs"] or ())
        return _encode(row) if math.isfinite(known) else None
    except (TypeError, ValueError):
        return None
