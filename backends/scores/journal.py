"""Answers in safety the moment they arrive, one line each, until they are written as a part of the table."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterable
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeAlias, cast

import msgspec

from backends.scores.lines import SUFFIX, lines_in
from backends.scores.rows import LISTS, WANTED, row_of
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


class BrokenLine(NamedTuple):
    """A line of a journal that is no row of scores."""

    path: Path
    line: bytes
    why: str


def recorded(paths: Iterable[Path], on_broken: Callable[[BrokenLine], None]) -> dict[str, list[dict[str, Any]]]:
    """Prompt id → rows that killed runs left in journals; their values are still to be checked (`damage`).

    The end of a killed run cuts the last line, which is dropped. Any other that is no row is for ``on_broken``.
    """
    by_prompt: dict[str, list[dict[str, Any]]] = {}
    for path, copy in local_copies(paths):
        with copy.open("rb") as file:
            for line in file:
                try:
                    prompt_id, row = _recorded(line)
                except (ValueError, TypeError, LookupError, RecursionError, msgspec.MsgspecError) as error:
                    if line.endswith(b"\n"):
                        on_broken(BrokenLine(path, line, str(error)))
                    else:
                        logger.warning("%s: a line was cut short and is left out; its context is asked again", path)
                    continue
                by_prompt.setdefault(prompt_id, []).append(row)
    return by_prompt


_Id = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
_Count = Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]
_Texts: TypeAlias = list[str | None]
_Numbers: TypeAlias = list[float | None]
_Ids: TypeAlias = list[_Id | None]
_Bytes: TypeAlias = list[bytes | None]


class _Row(msgspec.Struct, frozen=True, kw_only=True):
    """The columns of a row, by their types; lines of earlier versions lack some."""

    key: str | None
    model: str | None
    model_version: str | None
    tokens: _Texts | None
    logprobs: _Numbers | None
    token_ids: _Ids | None
    token_bytes: _Bytes | None
    sampled_token: str | None
    sampled_logprob: float | None
    sampled_id: _Id | None
    finish_reason: str | None
    input_tokens: _Id | None
    output_tokens: _Id | None
    n_dropped: _Count | None
    reason: str | None
    error: str | None
    scored_at: datetime
    full_logprobs: _Numbers | None = None
    exact_versus: str | None = None
    exact_kl: float | None = None
    exact_reverse_kl: float | None = None
    exact_js: float | None = None
    exact_tv: float | None = None
    vocabulary: _Count | None = None
    vocabulary_versus: _Count | None = None
    wanted_tokens: _Texts | None = None
    wanted_logprobs: _Numbers | None = None
    wanted_ids: _Ids | None = None
    wanted_bytes: _Bytes | None = None


def _recorded(line: bytes) -> tuple[str, dict[str, Any]]:
    read = json.loads(line)
    if not isinstance(read, dict):
        raise TypeError("it is no object")
    row = cast("dict[str, Any]", read)
    row["scored_at"] = datetime.fromisoformat(row["scored_at"])
    for name in _BYTES:
        row[name] = row.get(name) and [item if item is None else bytes(item) for item in row[name]]
    prompt_id = row.pop("prompt_id", None)
    if not isinstance(prompt_id, str) or Path(prompt_id).name != prompt_id:
        raise ValueError(f"prompt_id {prompt_id!r} is none")
    row = msgspec.structs.asdict(msgspec.convert(row, _Row))
    for names in (LISTS, WANTED):  # a table would fill them up
        if len({len(row[name] or ()) for name in names}) > 1:
            raise ValueError(f"lists of unequal lengths ({', '.join(names)})")
    return prompt_id, row


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
