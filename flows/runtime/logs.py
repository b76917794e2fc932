"""Our own log lines in the log of the Prefect run.

Prefect sends what its own loggers get, and what the loggers in PREFECT_LOGGING_EXTRA_LOGGERS get in processes that had
that setting when they started. Here the same handler is attached to our loggers for as long as a run is at work. Lines
of threads that know no run (a backend's own) go to the only one at work.
"""

from __future__ import annotations

import contextvars
import logging
import threading
from collections.abc import Generator
from contextlib import contextmanager

from prefect.context import FlowRunContext, TaskRunContext
from prefect.logging.handlers import APILogHandler

from backends.errors import TokenKLError
from flows.runtime.environment import LineFormatter

_OUR_LOGGERS = ("flows", "backends", "kl")
# Said when the state with the reason is set already.
_LAST_WORD = "Engine execution exited with unexpected exception"
_ENGINE_LOGGERS = ("prefect.engine", "prefect.flow_runs", "prefect.task_runs")


class _RunLogHandler(APILogHandler):
    """Sends lines to the run in whose context they were written, else to the only one at work."""

    def emit(self, record: logging.LogRecord) -> None:
        if _sent_by_prefect(record.name):
            return
        if FlowRunContext.get() is not None or TaskRunContext.get() is not None:
            super().emit(record)
            return
        at_work = list(_at_work.values())
        if len({run for run, _ in at_work}) == 1:
            at_work[0][1].copy().run(super().emit, record)


_handler = _RunLogHandler()
_handler.setLevel(logging.INFO)
_handler.setFormatter(LineFormatter())
_at_work: dict[object, tuple[str, contextvars.Context]] = {}  # flow run, and the context to send in
_lock = threading.Lock()


def _sent_by_prefect(name: str) -> bool:
    """Whether the user's own settings send the lines of a logger already."""
    logger: logging.Logger | None = logging.getLogger(name)
    while logger is not None:
        if any(isinstance(item, APILogHandler) and item is not _handler for item in logger.handlers):
            return True
        logger = logger.parent if logger.propagate else None
    return False


class _OneLine(logging.Filter):
    """Takes the traceback from lines on an error that says in one line what is wrong, where and what to do."""

    def filter(self, record: logging.LogRecord) -> bool:
        if not record.exc_info or not isinstance(record.exc_info[1], TokenKLError | OSError):
            return True
        record.exc_info = record.exc_text = None
        return not record.getMessage().startswith(_LAST_WORD)


_one_line = _OneLine()


def expected_errors_in_one_line() -> None:
    """From now on, Prefect's own lines on a failed task or run have a traceback only for faults of a program."""
    for name in _ENGINE_LOGGERS:
        logging.getLogger(name).addFilter(_one_line)


@contextmanager
def run_logging() -> Generator[None]:
    """While this is entered, inside a flow run, our log lines go to the run's log from INFO on."""
    me = object()
    with _lock:
        _at_work[me] = _flow_run(), contextvars.copy_context()
        for name in _OUR_LOGGERS:
            logger = logging.getLogger(name)
            if _handler not in logger.handlers:
                logger.addHandler(_handler)
            if logger.level == logging.NOTSET:
                logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        with _lock:
            del _at_work[me]
            if not _at_work:
                for name in _OUR_LOGGERS:
                    logging.getLogger(name).removeHandler(_handler)


def _flow_run() -> str:
    run = FlowRunContext.get()
    return str(run.flow_run.id) if run is not None and run.flow_run is not None else ""
