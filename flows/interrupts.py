"""Ctrl-C and SIGTERM: stop asking, keep what came, say how to go on."""

from __future__ import annotations

import signal
import threading
from collections.abc import Generator
from contextlib import contextmanager
from types import FrameType

from backends.errors import TokenKLError
from backends.session import BackendSession


class InterruptedRunError(TokenKLError):
    """The user stopped the run; the message says what goes on elsewhere, if anything does."""


@contextmanager
def stop_on_signal(session: BackendSession) -> Generator[threading.Event]:
    """While work is under way, the first signal stops it in an orderly way; a second one is the usual interrupt.

    Yields an event that is set when the run was stopped. Outside the main thread there are no signals to handle.
    """
    stopped = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stopped
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if stopped.is_set():
            raise KeyboardInterrupt
        stopped.set()
        session.cancel()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
