"""Settings of Prefect and of logging for a program that is run by hand, without a server of its own."""

from __future__ import annotations

import logging
import os
import signal
import sys
from typing import TextIO

from dotenv import find_dotenv, load_dotenv

from kl.signs import on_a_line

# Each can be overridden in the environment or in .env.
_PREFECT_DEFAULTS = {
    # What goes wrong is said once, by the program; Prefect would add its own lines and tracebacks.
    "PREFECT_LOGGING_LEVEL": "CRITICAL",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
    "PREFECT_SERVER_LOGGING_LEVEL": "ERROR",
    # A server that is restarted is asked again for about four minutes (waits double from 2 s on); its events are lost.
    "PREFECT_CLIENT_MAX_RETRIES": "7",
    "PREFECT_INTERNAL_LOGGING_LEVEL": "CRITICAL",
    "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
}
_OUR_LOGGERS = ("flows", "backends")


class _StandardError(logging.StreamHandler[TextIO]):
    """Writes to what standard error is when a line comes: a live panel takes its place, and lets the line pass."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # pyright: ignore[reportIncompatibleVariableOverride]
        return sys.stderr


class LineFormatter(logging.Formatter):
    """Keeps a message on its line: names of files and models in it may hold anything."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        """The line, before a traceback."""
        record.message = on_a_line(record.message)
        return super().formatMessage(record)


def say(line: str) -> None:
    """Print a line on standard error."""
    print(on_a_line(line), file=sys.stderr)  # noqa: T201


_terminal = _StandardError()  # one a process, however often it is prepared
_terminal.setFormatter(LineFormatter("%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S"))


def prepare_environment() -> None:
    """Read ``.env``, keep Prefect quiet, send our own log lines to standard error.

    Must run before Prefect is imported.
    """
    # From the folder that the user works in, or one above; by default it would be looked for beside this file.
    load_dotenv(find_dotenv(usecwd=True), override=False)
    for name, value in _PREFECT_DEFAULTS.items():
        os.environ.setdefault(name, value)
    show_lines(logging.INFO)
    for name in _OUR_LOGGERS:
        logger = logging.getLogger(name)
        logger.addHandler(_terminal)
        logger.propagate = False


def show_lines(level: int) -> None:
    """Show our log lines on standard error from a level on; the log of a Prefect run keeps those from INFO on."""
    _terminal.setLevel(level)
    for name in _OUR_LOGGERS:
        logging.getLogger(name).setLevel(min(level, logging.INFO))


def shows(level: int) -> bool:
    """Whether the user of this program wants to see lines of a level."""
    return level >= _terminal.level


def start_own_server() -> None:
    """Start the temporary server that Prefect starts where it is told of none, out of reach of Ctrl-C.

    A program has begun one before (`flows.runtime.server`), unless Prefect was loaded already or that one failed.

    A terminal sends that to the whole process group. Without its server the run could not end: it would ask it again
    for minutes. A blocked signal stays blocked in a new process; the run ends its server itself.
    """
    from prefect.client.orchestration import get_client

    if not hasattr(signal, "pthread_sigmask"):  # Windows
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        get_client(sync_client=True)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
