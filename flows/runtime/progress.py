"""Progress of long work on standard error: a live panel on a terminal, a plain line a state change anywhere else."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Self

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from flows.runtime.environment import shows
from kl.signs import on_a_line

logger = logging.getLogger(__name__)

_SECONDS_BETWEEN_LINES = 10.0
_STEPS = 10  # lines from the beginning to the end, where nothing else changes
Details = Callable[[], Sequence[str]]


class ProgressReporter:
    """Counts finished units of a known total; callable from any thread.

    Parameters
    ----------
    what : str
        What is counted: "positions scored".
    total : int
        How many there are.
    details : callable, optional
        Gives what else is known of the work, in a few words each: jobs by state, what was spent. Called often.
    """

    def __init__(self, what: str, total: int, details: Details = tuple) -> None:
        self.what = what
        self.total = total
        self._details = details
        self._done = 0
        self._lock = threading.Lock()
        self._began = self._last_line = time.monotonic()
        self._next_step = 1
        self._panel = _Panel(details) if sys.stderr.isatty() and total and shows(logging.INFO) else None

    def __enter__(self) -> Self:
        self._began = self._last_line = time.monotonic()
        if self._panel is not None:
            self._panel.start()
            self._task = self._panel.add_task(self.what, total=self.total)
        return self

    def __exit__(self, *exc: object) -> None:
        if self._panel is not None:
            self._panel.stop()
        elif self.total:
            logger.info("%s", self._line(self._count(), self._details()))

    @property
    def percent(self) -> float:
        """How much is done, 0 to 100."""
        return 100.0 * self._done / self.total if self.total else 100.0

    def rows(self) -> list[tuple[str, str]]:
        """What there is to say now, as (label, text)."""
        with self._lock:
            rows = [(self.what, self._count()), ("speed", self._speed())]
        return [row for row in rows if row[1]] + [("now", detail) for detail in self._details()]

    def advance(self, n: int) -> None:
        """``n`` more are done."""
        with self._lock:
            self._done += n
            if self._panel is not None:
                self._panel.advance(self._task, n)
            elif self._done < self.total and self._is_news():
                logger.info("%s", self._line(self._count(), [self._speed(), *self._details()]))

    def _is_news(self) -> bool:
        """Whether a further tenth is done, and the last line was not just now."""
        now = time.monotonic()
        if self._done * _STEPS < self._next_step * self.total or now - self._last_line < _SECONDS_BETWEEN_LINES:
            return False
        self._last_line, self._next_step = now, self._done * _STEPS // self.total + 1
        return True

    def _count(self) -> str:
        return f"{self._done:,} of {self.total:,}"

    def _speed(self) -> str:
        seconds = time.monotonic() - self._began
        if not self._done or seconds <= 0:
            return ""
        rate = self._done / seconds
        return f"{_digits(rate)} a second, about {_duration((self.total - self._done) / rate)} left"

    def _line(self, count: str, details: Iterable[str]) -> str:
        return "; ".join([f"{self.what}: {count}", *filter(None, details)])


def _duration(seconds: float) -> str:
    """``40 s``, ``12 min``, ``3.5 h``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


class _Panel(Progress):
    """The bar, and below it what else is known."""

    def __init__(self, details: Details) -> None:
        self._details = details
        super().__init__(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            _RateColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True, highlight=False),
            transient=True,
            redirect_stdout=False,  # what is written there is a result
        )

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        details = [detail for detail in self._details() if detail]
        if details:
            yield Text(on_a_line("; ".join(details)), style="dim")


class _RateColumn(ProgressColumn):
    """Units a second."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{_digits(speed)}/s")


def _digits(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.2g}"
