"""What the world saw and sold: for assertions. It lives in the test's process and survives the product's."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, NamedTuple


class RequestLine(NamedTuple):
    """One HTTP request."""

    method: str
    path: str


class Refusal(NamedTuple):
    """A request that was refused: ``where`` is ``online``, ``create``, ``list`` or ``job ID line N``."""

    where: str
    message: str
    body: Any


class OnlineCall(NamedTuple):
    """One generateContent call that passed validation; its times are those of a clock that only goes on, in seconds."""

    model: str
    request_hash: str
    request: dict[str, Any]
    status: int
    arrived_s: float
    answered_s: float


class Ledger:
    """Thread-safe records.

    Attributes
    ----------
    rejected : list of Refusal
        Malformed requests: the caller's fault. A test of good behaviour asserts that this is empty.
    refused : list of Refusal
        Well-formed requests for what a model cannot do, or for a model that is not there.
    rows_bought : Counter
        By `canonical_request_hash`: answers that were delivered where the caller could read them.
    crashes : list of str
        Tracebacks of the world itself; a world that has any fails when it is closed.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._in_flight = 0
        self._seen: Counter[str] = Counter()
        self._answers = 0
        self._logprob_answers: Counter[str] = Counter()
        self.requests: list[RequestLine] = []
        self.rejected: list[Refusal] = []
        self.refused: list[Refusal] = []
        self.rows_bought: Counter[str] = Counter()
        self.online_calls: list[OnlineCall] = []
        self.max_online_in_flight = 0
        self.token_requests = 0
        self.crashes: list[str] = []

    def note_request(self, method: str, path: str) -> None:
        with self._lock:
            self.requests.append(RequestLine(method, path))

    def note_token(self) -> None:
        with self._lock:
            self.token_requests += 1

    def note_refusal(self, where: str, message: str, body: Any, *, malformed: bool) -> None:
        with self._lock:
            (self.rejected if malformed else self.refused).append(Refusal(where, message, body))

    def note_online(self, call: OnlineCall) -> None:
        with self._lock:
            self.online_calls.append(call)

    def note_bought(self, hashes: Counter[str]) -> None:
        with self._lock:
            self.rows_bought.update(hashes)

    def note_crash(self, traceback: str) -> None:
        with self._lock:
            self.crashes.append(traceback)

    def next_attempt(self, request_hash: str) -> int:
        """How often this request was seen before."""
        with self._lock:
            self._seen[request_hash] += 1
            return self._seen[request_hash] - 1

    def next_answer(self) -> int:
        """The number of the next answer, from 0."""
        with self._lock:
            self._answers += 1
            return self._answers - 1

    def take_logprobs_quota(self, model: str, quota: int | None) -> bool:
        """Use up one answer with log-probabilities; False when the quota of the model is spent."""
        with self._lock:
            if quota is not None and self._logprob_answers[model] >= quota:
                return False
            self._logprob_answers[model] += 1
            return True

    @contextmanager
    def online_in_flight(self) -> Generator[None]:
        """Count an online call as in flight."""
        with self._lock:
            self._in_flight += 1
            self.max_online_in_flight = max(self.max_online_in_flight, self._in_flight)
        try:
            yield
        finally:
            with self._lock:
                self._in_flight -= 1
