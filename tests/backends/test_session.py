"""One backend, one event loop, many threads that ask."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Sequence

import pytest

from backends.base import Backend, BackendOptions, Capabilities, ScoreRequest
from backends.session import BackendSession, SessionClosedError
from kl.records import Score, ScoreFailure


class Slow(Backend):
    """Notes what happens to it; its work lasts until it is stopped."""

    capabilities = Capabilities(max_top_logprobs=1)

    def __init__(self) -> None:
        super().__init__(BackendOptions())
        self.events: list[str] = []
        self.at_work = threading.Event()

    async def __aexit__(self, *exc: object) -> None:
        self.events.append("left")

    async def preflight(self, model: str) -> str | None:
        return None

    async def interrupted(self) -> str | None:
        self.events.append("interrupted")
        return "nothing goes on"

    async def work(self) -> None:
        self.at_work.set()
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0.2)
            self.events.append("written")

    async def block(self) -> None:
        self.at_work.set()
        await asyncio.to_thread(time.sleep, 60)

    async def score(self, requests: Sequence[ScoreRequest]) -> AsyncIterator[Score | ScoreFailure]:
        return
        yield


def in_thread(session: BackendSession, work: object) -> tuple[threading.Thread, list[SessionClosedError]]:
    errors: list[SessionClosedError] = []

    def ask() -> None:
        try:
            session.run(work)
        except SessionClosedError as error:
            errors.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    return thread, errors


def test_a_stop_lets_work_end_in_order_before_the_backend_is_told_and_left() -> None:
    backend = Slow()
    with BackendSession(backend) as session:
        thread, errors = in_thread(session, backend.work())
        assert backend.at_work.wait(5)
        assert session.interrupt() == "nothing goes on"
        thread.join(5)
    assert backend.events == ["written", "interrupted", "left"]
    assert [type(error) for error in errors] == [SessionClosedError]


def test_a_call_that_hangs_in_a_thread_does_not_hold_the_stop_up() -> None:
    backend = Slow()
    began = time.monotonic()
    with BackendSession(backend) as session:
        thread, errors = in_thread(session, backend.block())
        assert backend.at_work.wait(5)
    thread.join(5)
    assert [type(error) for error in errors] == [SessionClosedError]
    assert time.monotonic() - began < 5
    hanging = [item for item in threading.enumerate() if item.name == "backend-call"]
    assert hanging
    assert all(item.daemon for item in hanging), "the interpreter would wait for them at its end"


def test_a_closed_session_refuses_work() -> None:
    backend = Slow()
    with BackendSession(backend) as session:
        session.cancel()
        with pytest.raises(SessionClosedError):
            session.run(backend.work())


def test_no_work_is_forgotten_when_it_begins_in_the_moment_of_the_stop() -> None:
    for _ in range(30):
        backend = Slow()
        began = time.monotonic()
        with BackendSession(backend) as session:
            threads = [in_thread(session, asyncio.sleep(60))[0] for _ in range(4)]
            session.cancel()
            for thread in threads:
                thread.join(5)
        assert time.monotonic() - began < 5


def test_errors_of_the_work_reach_the_thread_that_asked() -> None:
    async def fail() -> None:
        raise OSError("no space left")

    with BackendSession(Slow()) as session, pytest.raises(OSError, match="no space left"):
        session.run(fail())
