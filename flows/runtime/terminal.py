"""What people read on standard output: text is folded into a terminal, a row is a line in a file or a pipe."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

_FILE_WIDTH = 10_000  # characters, more than any row has


def console(*, silent: bool = False) -> Console:
    """Standard output, or nothing; in a file or a pipe a row is a line, however long."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else _FILE_WIDTH, quiet=silent)


def print_pairs(out: Console, rows: Iterable[tuple[str, str]]) -> None:
    """Print (label, text) rows as two columns."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
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
