"""What people read on standard output: folded into a terminal, one line per row in a file or a pipe."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

_FILE_WIDTH = 10_000  # characters, more than any row has


def console() -> Console:
    """Standard output; in a file or a pipe a row is a line, however long."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else _FILE_WIDTH)


def print_pairs(out: Console, rows: Iterable[tuple[str, str]]) -> None:
    """Print (label, text) rows as two columns."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for label, text in rows:
        table.add_row(Text(label), Text(text))
    out.print(table)


def print_lines(out: Console, lines: Sequence[str]) -> None:
    """Print each text as a line of its own; the terminal, not we, breaks long ones."""
    for line in lines:
        out.print(Text(line), soft_wrap=True)
