"""Progress of long work: a bar on a terminal, plain lines in a log."""

from __future__ import annotations

import logging
import sys
import threading
import time
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

logger = logging.getLogger(__name__)

_SECONDS_BETWEEN_LINES = 10.0


class ProgressReporter:
    """Counts finished units of a known total; callable from any thread.

    Parameters
    ----------
    what : str
        What is counted: "positions scored".
    total : int
        How many there are.
    """

    def __init__(self, what: str, total: int) -> None:
        self.what = what
        self.total = total
        self._done = 0
        self._lock = threading.Lock()
        self._last_line = time.monotonic()
        self._bar = _bar() if sys.stderr.isatty() and total else None

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task(self.what, total=self.total)
        return self

    def __exit__(self, *exc: object) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif self.total:
            logger.info("%s: %d of %d", self.what, self._done, self.total)

    @property
    def percent(self) -> float:
        """How much is done, 0 to 100."""
        return 100.0 * self._done / self.total if self.total else 100.0

    def advance(self, n: int) -> None:
        """``n`` more are done."""
        with self._lock:
            self._done += n
            if self._bar is not None:
                self._bar.advance(self._task, n)
            elif time.monotonic() - self._last_line > _SECONDS_BETWEEN_LINES:
                self._last_line = time.monotonic()
                logger.info("%s: %d of %d", self.what, self._done, self.total)


def _bar() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )
