"""Ctrl-C and SIGTERM: stop asking, keep what came, say how to go on."""

from __future__ import annotations

import logging
import signal
import socket
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager, nullcontext
from types import FrameType

from backends.errors import TokenKLError
from backends.session import BackendSession
from flows.config.models import CommonConfig

logger = logging.getLogger(__name__)


class InterruptedRunError(TokenKLError):
    """The user stopped the run; the message says what goes on elsewhere, if anything does.

    ``config`` is that of the run, with its folders filled in.
    """

    def __init__(self, message: str, config: CommonConfig) -> None:
        super().__init__(message, config)
        self.config = config

    def __str__(self) -> str:
        return str(self.args[0])


@contextmanager
def stop_on_signal(session: BackendSession) -> Generator[threading.Event]:
    """While work is under way, the first signal stops it in an orderly way; a second one is the usual interrupt.

    Yields an event that is set when the run was stopped. Outside the main thread there are no signals to handle.

    Of a run that a worker started, SIGTERM belongs to Prefect: its handler tells a cancel from a worker's end, and must
    stay in place for that. It ends the flow with `TerminationSignal`, which waits for the tasks; they are stopped here.
    """
    # Imported late: a program prepares Prefect's settings before anything loads it.
    from prefect.context import FlowRunContext
    from prefect.exceptions import TerminationSignal

    stopped = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stopped
        return

    def stop() -> None:
        stopped.set()
        session.cancel()

    def handle(number: int, frame: FrameType | None) -> None:
        if stopped.is_set():
            raise KeyboardInterrupt
        stop()

    run = FlowRunContext.get()
    supervised = run is not None and run.flow_run is not None and run.flow_run.deployment_id is not None
    own = (signal.SIGINT,) if supervised else (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, handle) for number in own}
    try:
        with _noticed(signal.SIGTERM, stop) if supervised else nullcontext():
            yield stopped
    except TerminationSignal:
        stop()
        logger.warning("the run was stopped; %s", session.interrupt() or "nothing goes on elsewhere.")
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _noticed(number: signal.Signals, call: Callable[[], None]) -> Generator[None]:
    """Call a function, in a thread of its own, when a signal arrives, whoever handles it."""
    reading, writing = socket.socketpair()
    writing.setblocking(False)

    def watch() -> None:
        while numbers := reading.recv(64):
            if number in numbers:
                call()

    watching = threading.Thread(target=watch, name="signal-watch", daemon=True)
    watching.start()
    before = signal.set_wakeup_fd(writing.fileno(), warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        writing.close()
        watching.join()
        reading.close()
