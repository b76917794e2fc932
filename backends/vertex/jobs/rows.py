"""The rows of a batch job: which keys, in which files, and what came back for them."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Sequence, Set
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, Protocol, Self, TypeVar

from backends.base import Sample, SampleRequest, ScoreRequest
from backends.scores.raw_log import RawLog
from backends.vertex import answers, samples, wire
from backends.vertex.jobs.bucket import lines_of
from kl.records import Score, ScoreFailure

L = TypeVar("L")
A = TypeVar("A", bound=Score | Sample)
A_co = TypeVar("A_co", bound=Score | Sample, covariant=True)
logger = logging.getLogger(__name__)


class Rows(Protocol[A_co]):
    """Rows of one model that belong together, and how their answers are read."""

    @property
    def model(self) -> str:
        """The model that answers."""
        ...

    @property
    def name(self) -> str:
        """How they are called in the names of files."""
        ...

    @property
    def keys(self) -> Sequence[str]:
        """One key a row."""
        ...

    def only(self, wanted: Container[str]) -> Self:
        """Those of these keys."""
        ...

    def between(self, start: int, stop: int | None) -> Self:
        """Those with these numbers."""
        ...

    def lines(self) -> Iterator[bytes]:
        """The rows as lines of an input file."""
        ...

    def line_lengths(self) -> Iterator[int]:
        """The length of each line in bytes."""
        ...

    def usual_row(self, line: bytes) -> A_co | None:
        """The answer in an output line of the usual shape, quickly; None for any other line."""
        ...

    def read_row(self, key: str, row: dict[str, Any]) -> A_co | ScoreFailure:
        """The answer in an output row of any shape."""
        ...


@dataclass(frozen=True, slots=True)
class ScoreRows:
    """The contexts of one response."""

    request: ScoreRequest

    @property
    def model(self) -> str:
        """The model that is asked."""
        return self.request.model

    @property
    def name(self) -> str:
        """Of the response."""
        return self.request.name

    @property
    def keys(self) -> tuple[str, ...]:
        """One a context."""
        return self.request.keys

    def only(self, wanted: Container[str]) -> ScoreRows:
        """The contexts of these keys."""
        return ScoreRows(self.request.only(wanted))

    def between(self, start: int, stop: int | None) -> ScoreRows:
        """The contexts with these numbers."""
        keys, positions = self.request.keys[start:stop], self.request.positions[start:stop]
        return ScoreRows(replace(self.request, positions=positions, keys=keys))

    def lines(self) -> Iterator[bytes]:
        """One a context."""
        return wire.RequestBodies(self.request).lines()

    def line_lengths(self) -> Iterator[int]:
        """Without making the lines."""
        return wire.RequestBodies(self.request).line_lengths()

    def usual_row(self, line: bytes) -> Score | None:
        """A score with its key, read straight into typed fields."""
        return answers.usual_row(line)

    def read_row(self, key: str, row: dict[str, Any]) -> Score | ScoreFailure:
        """A score."""
        return answers.read_row(key, row)


@dataclass(frozen=True)
class SampleRows:
    """Responses that one model is to write, a row each."""

    requests: tuple[SampleRequest, ...]

    @property
    def model(self) -> str:
        """The model that writes."""
        return self.requests[0].model

    @property
    def name(self) -> str:
        """Of the first response."""
        return self.requests[0].name

    @property
    def keys(self) -> tuple[str, ...]:
        """One a response."""
        return tuple(request.key for request in self.requests)

    def only(self, wanted: Container[str]) -> SampleRows:
        """The responses of these keys."""
        return SampleRows(tuple(request for request in self.requests if request.key in wanted))

    def between(self, start: int, stop: int | None) -> SampleRows:
        """The responses with these numbers."""
        return SampleRows(self.requests[start:stop])

    def lines(self) -> Iterator[bytes]:
        """One a response."""
        for request in self.requests:
            yield b"".join((b'{"key":"', request.key.encode("ascii"), b'","request":', samples.body(request), b"}\n"))

    def line_lengths(self) -> Iterator[int]:
        """The length of each line."""
        return (len(line) for line in self.lines())

    def usual_row(self, line: bytes) -> None:
        """None: a response is read in one way."""
        return None

    @cached_property
    def _by_key(self) -> dict[str, SampleRequest]:
        return {request.key: request for request in self.requests}

    def read_row(self, key: str, row: dict[str, Any]) -> Sample | ScoreFailure:
        """A response."""
        return samples.read_row(self._by_key[key], row)


class RowSet(Generic[A]):
    """Distinct rows, as the lines of a batch input file.

    Iterating gives the lines; it can be done again, so that an upload can be repeated. Equal keys are one row; parts
    that are ``distinct``, as those of other rows are, need no look for them.
    """

    def __init__(self, parts: Sequence[Rows[A]], *, distinct: bool = False) -> None:
        seen: set[str] = set()
        once = parts if distinct else [_first_of(part, seen) for part in parts]
        self.parts = tuple(part for part in once if part.keys)
        self.keys: tuple[str, ...] = tuple(key for part in self.parts for key in part.keys)

    @property
    def model(self) -> str:
        """The model that answers; one job has one model."""
        return self.parts[0].model

    @property
    def name(self) -> str:
        """The name of the first response."""
        return self.parts[0].name

    def __iter__(self) -> Iterator[bytes]:
        for part in self.parts:
            yield from part.lines()

    def only(self, keys: Collection[str]) -> RowSet[A]:
        """The rows of these keys."""
        wanted = keys if isinstance(keys, Set) else frozenset(keys)
        return RowSet([part.only(wanted) for part in self.parts], distinct=True)

    def by(self, label: Callable[[str], L]) -> dict[L, RowSet[A]]:
        """The rows by what ``label`` says of their keys."""
        parts: dict[L, list[Rows[A]]] = {}
        for part in self.parts:
            keys: dict[L, set[str]] = {}
            for key in part.keys:
                keys.setdefault(label(key), set()).add(key)
            for name, wanted in keys.items():
                parts.setdefault(name, []).append(part.only(wanted))
        return {name: RowSet(found, distinct=True) for name, found in parts.items()}

    def without(self, keys: Collection[str]) -> RowSet[A]:
        """The rows of all other keys."""
        return self.only(set(self.keys).difference(keys)) if keys else self

    def usual_row(self, line: bytes) -> A | None:
        """The answer in an output line of the usual shape, for whatever key; None for any other line."""
        return self.parts[0].usual_row(line) if self.parts else None

    @cached_property
    def _part_of(self) -> dict[str, Rows[A]]:
        return {key: part for part in self.parts for key in part.keys}

    def read_row(self, key: str, row: dict[str, Any]) -> A | ScoreFailure:
        """The answer to one of the rows, in an output row of any shape."""
        return self._part_of[key].read_row(key, row)

    def key_by_request(self) -> dict[bytes, str]:
        """Digest of the canonical request → key, to recognise rows that came back without their key."""
        return {_digest(row["request"]): row["key"] for row in (json.loads(line) for line in self)}


def _digest(request: dict[str, Any]) -> bytes:
    return hashlib.blake2b(wire.canonical_request(request).encode("ascii"), digest_size=16).digest()


def score_rows(requests: Iterable[ScoreRequest]) -> RowSet[Score]:
    """The contexts of some responses, each distinct one a row."""
    return RowSet([ScoreRows(request) for request in requests])


def sample_rows(requests: Iterable[SampleRequest]) -> RowSet[Sample]:
    """Responses that are to be written, each a row."""
    by_model: dict[str, list[SampleRequest]] = {}
    for request in requests:
        by_model.setdefault(request.model, []).append(request)
    parts: list[Rows[Sample]] = [SampleRows(tuple(asked)) for asked in by_model.values()]
    return RowSet(parts)


def _first_of(part: Rows[A], seen: set[str]) -> Rows[A]:
    fresh = set(part.keys) - seen
    seen |= fresh
    return part if len(fresh) == len(part.keys) else part.only(fresh)


def split_rows(rows: RowSet[A], max_rows: int, max_bytes: int) -> Iterator[RowSet[A]]:
    """Row sets of one model each, no larger than a job may be; only lengths are kept, never the lines."""
    by_model: dict[str, list[Rows[A]]] = {}
    for part in rows.parts:
        by_model.setdefault(part.model, []).append(part)
    for parts in by_model.values():
        yield from _split(parts, max_rows, max_bytes)


def _split(parts: Iterable[Rows[A]], max_rows: int, max_bytes: int) -> Iterator[RowSet[A]]:
    taken: list[Rows[A]] = []
    n = size = 0
    for part in parts:
        start = 0
        for index, length in enumerate(part.line_lengths()):
            if n and (n == max_rows or size + length > max_bytes):
                yield RowSet([*taken, part.between(start, index)], distinct=True)
                taken, start, n, size = [], index, 0, 0
            n += 1
            size += length
        taken.append(part.between(start, None))
    if n:
        yield RowSet(taken, distinct=True)


class OutputReader(Generic[A]):
    """Matches output lines to the rows of a job: by our key, else by the echoed request, never by order.

    Parameters
    ----------
    rows : RowSet
        The rows that an answer is wanted for; answers to others are counted and left alone.
    raw : RawLog, optional
        Keeps every row that answers one of them, as it came.
    """

    def __init__(self, rows: RowSet[A], raw: RawLog | None = None) -> None:
        self._rows = rows
        self._raw = raw
        self._known = frozenset(rows.keys)
        self._wanted = set(rows.keys)
        self._by_request: dict[bytes, str] | None = None
        self._unreadable = 0
        self._foreign = 0

    def read(self, path: Path) -> Iterator[A | ScoreFailure]:
        """The results in one output file; the first success for a key counts."""
        for line in lines_of(path):
            answer = self._rows.usual_row(line) if self._raw is None else None
            if answer is not None and answer.key in self._known:
                if answer.key in self._wanted:
                    self._wanted.discard(answer.key)
                    yield answer
                else:
                    self._foreign += 1
            elif line.strip():
                yield from self._read_any(line)

    def _read_any(self, line: bytes) -> Iterator[A | ScoreFailure]:
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
        result = self._rows.read_row(key, row)
        if not isinstance(result, ScoreFailure) or result.final:
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
