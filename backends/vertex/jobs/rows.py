"""The rows of a batch job: which keys, in which files, and what came back for them."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence, Set
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from backends.base import ScoreRequest
from backends.scores.raw_log import RawLog
from backends.vertex import answers, wire
from backends.vertex.jobs.bucket import lines_of
from kl.records import Score, ScoreFailure

L = TypeVar("L")
logger = logging.getLogger(__name__)


class RowSet:
    """Distinct contexts of one model, as the lines of a batch input file.

    Iterating gives the lines; it can be done again, so that an upload can be repeated. Equal contexts are one row;
    requests that are ``distinct``, as those of other rows are, need no look for them.
    """

    def __init__(self, requests: Sequence[ScoreRequest], *, distinct: bool = False) -> None:
        seen: set[str] = set()
        once = requests if distinct else [_first_of(request, seen) for request in requests]
        self.requests = tuple(request for request in once if request.keys)
        self.keys: tuple[str, ...] = tuple(key for request in self.requests for key in request.keys)

    @property
    def model(self) -> str:
        """The model that answers; one job has one model."""
        return self.requests[0].model

    @property
    def name(self) -> str:
        """The name of the first response."""
        return self.requests[0].name

    def __iter__(self) -> Iterator[bytes]:
        for request in self.requests:
            yield from wire.RequestBodies(request).lines()

    def only(self, keys: Collection[str]) -> RowSet:
        """The rows of these keys."""
        wanted = keys if isinstance(keys, Set) else frozenset(keys)
        return RowSet([request.only(wanted) for request in self.requests], distinct=True)

    def by(self, label: Callable[[str], L]) -> dict[L, RowSet]:
        """The rows by what ``label`` says of their keys."""
        parts: dict[L, list[ScoreRequest]] = {}
        for request in self.requests:
            keys: dict[L, set[str]] = {}
            for key in request.keys:
                keys.setdefault(label(key), set()).add(key)
            for name, wanted in keys.items():
                parts.setdefault(name, []).append(request.only(wanted))
        return {name: RowSet(requests, distinct=True) for name, requests in parts.items()}

    def without(self, keys: Collection[str]) -> RowSet:
        """The rows of all other keys."""
        return self.only(set(self.keys).difference(keys)) if keys else self

    def key_by_request(self) -> dict[bytes, str]:
        """Digest of the canonical request → key, to recognise rows that came back without their key."""
        return {_digest(row["request"]): row["key"] for row in (json.loads(line) for line in self)}


def _digest(request: dict[str, Any]) -> bytes:
    return hashlib.blake2b(wire.canonical_request(request).encode("ascii"), digest_size=16).digest()


def _first_of(request: ScoreRequest, seen: set[str]) -> ScoreRequest:
    fresh = set(request.keys) - seen
    seen |= fresh
    return request if len(fresh) == len(request.keys) else request.only(fresh)


def split_rows(rows: RowSet, max_rows: int, max_bytes: int) -> Iterator[RowSet]:
    """Row sets of one model each, no larger than a job may be; only lengths are kept, never the lines."""
    by_model: dict[str, list[ScoreRequest]] = {}
    for request in rows.requests:
        by_model.setdefault(request.model, []).append(request)
    for requests in by_model.values():
        yield from _split(requests, max_rows, max_bytes)


def _split(requests: Iterable[ScoreRequest], max_rows: int, max_bytes: int) -> Iterator[RowSet]:
    part: list[ScoreRequest] = []
    n = size = 0
    for request in requests:
        start = 0
        for index, length in enumerate(wire.RequestBodies(request).line_lengths()):
            if n and (n == max_rows or size + length > max_bytes):
                yield RowSet([*part, _between(request, start, index)], distinct=True)
                part, start, n, size = [], index, 0, 0
            n += 1
            size += length
        part.append(_between(request, start, None))
    if n:
        yield RowSet(part, distinct=True)


def _between(request: ScoreRequest, start: int, stop: int | None) -> ScoreRequest:
    return replace(request, positions=request.positions[start:stop], keys=request.keys[start:stop])


class OutputReader:
    """Matches output lines to the rows of a job: by our key, else by the echoed request, never by order.

    Parameters
    ----------
    rows : RowSet
        The rows that an answer is wanted for; answers to others are counted and left alone.
    raw : RawLog, optional
        Keeps every row that answers one of them, as it came.
    """

    def __init__(self, rows: RowSet, raw: RawLog | None = None) -> None:
        self._rows = rows
        self._raw = raw
        self._known = frozenset(rows.keys)
        self._wanted = set(rows.keys)
        self._by_request: dict[bytes, str] | None = None
        self._unreadable = 0
        self._foreign = 0

    def read(self, path: Path) -> Iterator[Score | ScoreFailure]:
        """The results in one output file; the first success for a key counts."""
        for line in lines_of(path):
            score = answers.usual_row(line) if self._raw is None else None
            if score is not None and score.key in self._known:
                if score.key in self._wanted:
                    self._wanted.discard(score.key)
                    yield score
                else:
                    self._foreign += 1
            elif line.strip():
                yield from self._read_any(line)

    def _read_any(self, line: bytes) -> Iterator[Score | ScoreFailure]:
        """The result in a row of any shape, if it has one that is wanted."""
        try:
            row = json.loads(line)
        except ValueError:
            self._unreadable += 1
            return
        key = self._key(row) if isinstance(row, dict) else None
        if key is None:
            self._foreign += 1
            return
        if self._raw is not None:
            self._raw.add(key, row)
        result = answers.read_row(key, row)
        if isinstance(result, Score) or result.final:
            self._wanted.discard(key)
        yield result

    def _key(self, row: dict[str, Any]) -> str | None:
        """Our key, wherever the row carries it; else that of the request which it echoes."""
        echo = _echo(row)
        for place in (row, row.get("instance"), echo):
            for name in ("key", "custom_id"):
                key = place.get(name) if isinstance(place, dict) else None
                if isinstance(key, str) and key in self._known:
                    return key if key in self._wanted else None
        if echo is None:
            return None
        if self._by_request is None:
            self._by_request = self._rows.key_by_request()
        try:
            key = self._by_request.get(_digest(echo))
        except wire.SHAPE_ERRORS:
            return None
        return key if key in self._wanted else None

    def log_oddities(self, job_name: str) -> None:
        """Say what in the output was no answer to anything asked."""
        if self._unreadable:
            logger.warning("batch job %s: %d output lines are not JSON, hence missing", job_name, self._unreadable)
        if self._foreign:
            logger.debug("batch job %s: %d output lines answer no open row", job_name, self._foreign)


def _echo(row: dict[str, Any]) -> dict[str, Any] | None:
    """The request that a row answers; some services put it, or its envelope, one level down."""
    echo = row.get("request", row.get("instance"))
    while isinstance(echo, dict) and "contents" not in echo and isinstance(echo.get("request"), dict):
        echo = echo["request"]
    return echo if isinstance(echo, dict) else None
