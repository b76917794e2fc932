"""One event loop per process for all backend work, shared by the threads that ask.

The tasks of a flow run in threads; what they share (the limit on calls in flight, the poller of remote jobs, the
reaction to a cancel) lives here, on one loop in one thread.
"""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from typing import Any, Self, TypeVar

from backends.base import Backend
from backends.errors import TokenKLError

T = TypeVar("T")

_SETTLE_S = 1.0
# The loop wakes for every answer, and each time waits for a thread that computes to give way: 5 ms by default.
_SWITCH_INTERVAL_S = 0.0005


class SessionClosedError(TokenKLError):
    """The session was closed while work was under way."""


class _DaemonThreads(ThreadPoolExecutor):
    """Threads for blocking calls that do not keep the process alive.

    The interpreter waits at its end for the threads of the usual pool; a call that hangs in a network would make the
    user who stopped the run wait for its timeout. The callers limit how many calls there are.
    """

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()

        def work() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                result = fn(*args, **kwargs)
            except BaseException as error:  # noqa: BLE001 - handed to whoever waits
                future.set_exception(error)
            else:
                future.set_result(result)

        threading.Thread(target=work, name="backend-call", daemon=True).start()
        return future


class BackendSession:
    """A backend in use: its event loop, and a blocking door to it for other threads.

    Parameters
    ----------
    backend : Backend
        Entered on the loop when the session starts, left when it is closed.
    """

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self._loop = asyncio.new_event_loop()
        self._loop.set_default_executor(_DaemonThreads())
        self._thread = threading.Thread(target=self._loop.run_forever, name="backend-loop", daemon=True)
        self._lock = threading.Lock()
        self._running: set[Future[Any]] = set()
        self._closed = False

    def __enter__(self) -> Self:
        sys.setswitchinterval(_SWITCH_INTERVAL_S)
        self._thread.start()
        try:
            self.run(self.backend.__aenter__())
        except BaseException:
            self._stop_loop()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self.cancel()
        try:
            self._settle()
            asyncio.run_coroutine_threadsafe(self.backend.__aexit__(*exc), self._loop).result()
        finally:
            self._stop_loop()

    def _settle(self) -> None:
        """Let cancelled work end in order: what it has is written, its files are closed."""

        async def others() -> None:
            left = asyncio.all_tasks() - {asyncio.current_task()}
            if left:
                await asyncio.wait(left, timeout=_SETTLE_S)

        asyncio.run_coroutine_threadsafe(others(), self._loop).result()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the loop and wait for it.

        Raises
        ------
        SessionClosedError
            If the session was cancelled meanwhile.
        """
        with self._lock:
            if self._closed:
                work.close()
                raise SessionClosedError("the run was stopped")
            future = asyncio.run_coroutine_threadsafe(work, self._loop)
            self._running.add(future)
        if self._closed:  # cancelled meanwhile, by a signal perhaps, which cannot wait for the lock
            future.cancel()
        try:
            return future.result()
        except CancelledError as error:
            raise SessionClosedError("the run was stopped") from error
        finally:
            with self._lock:
                self._running.discard(future)

    @property
    def cancelled(self) -> bool:
        """Whether all work was cancelled; no more is taken."""
        return self._closed

    def cancel(self) -> None:
        """Cancel all work under way and refuse more; callable from any thread or signal handler."""
        self._closed = True
        for future in list(self._running):
            future.cancel()

    def interrupt(self, timeout_s: float = 2.0) -> str | None:
        """Stop all work, let the backend settle its affairs, and return what it says of them."""
        self.cancel()
        self._settle()
        last = asyncio.run_coroutine_threadsafe(self.backend.interrupted(), self._loop)
        try:
            return last.result(timeout_s)
        except TimeoutError:
            last.cancel()
            return "the service did not answer in time; what runs there goes on."

    def _stop_loop(self) -> None:
        self._closed = True
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
