"""What people read: results on standard output, progress of long work on standard error.

On standard output text is folded into a terminal, and a row is a line in a file or a pipe. Progress is a bar on a
terminal, plain lines in a log.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

logger = logging.getLogger(__name__)

_SECONDS_BETWEEN_LINES = 10.0
_FILE_WIDTH = 10_000  # characters, more than any row has


def console(*, silent: bool = False) -> Console:
    """Standard output, or nothing; in a file or a pipe a row is a line, however long."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else _FILE_WIDTH, quiet=silent)


def print_pairs(out: Console, rows: Iterable[tuple[str, str]]) -> None:
    """Print (label, text) rows as two columns."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for label, text in rows:
        table.add_row(Text(label, style="bold"), Text(text))
    print_grid(out, table)


def print_grid(out: Console, table: Table) -> None:
    """Print a table; where no terminal folds it, without the blanks that fill the last column."""
    if out.is_terminal:
        out.print(table)
        return
    with out.capture() as text:
        out.print(table)
    print_lines(out, [line.rstrip() for line in text.get().splitlines()])


def print_lines(out: Console, lines: Sequence[str], *, style: str = "") -> None:
    """Print each text as a line of its own; the terminal, not we, breaks long ones."""
    for line in lines:
        out.print(Text(line, style=style), soft_wrap=True)


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
