"""What people read on standard output: text is folded into a terminal, a row is a line in a file or a pipe.

Names of files, models and prompts come from anywhere: what would act on a terminal is shown as a sign.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from kl.signs import on_a_line

_FILE_WIDTH = 10_000  # characters, more than any row has


def console(*, silent: bool = False) -> Console:
    """Standard output, or nothing; in a file or a pipe a row is a line, however long."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else _FILE_WIDTH, quiet=silent)


def print_pairs(out: Console, rows: Iterable[tuple[str, str]], styles: Mapping[str, str] | None = None) -> None:
    """Print (label, text) rows as two columns: the labels in bold, or the rows alone that ``styles`` names by label."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for label, text in rows:
        style = "" if styles is None else styles.get(label, "")
        label_style = "bold" if styles is None else style
        table.add_row(Text(on_a_line(label), style=label_style), Text(on_a_line(text), style=style))
    print_grid(out, table)


def print_grid(out: Console, table: Table) -> None:
    """Print a table without the blanks that fill its last column."""
    with out.capture() as drawn:
        out.print(table)
    for line in drawn.get().removesuffix("\n").split("\n"):
        text = Text.from_ansi(line)
        text.rstrip()
        out.print(text, soft_wrap=True)


def print_lines(out: Console, lines: Sequence[str], *, style: str = "") -> None:
    """Print each text as a line of its own; the terminal, not we, breaks long ones."""
    for line in lines:
        out.print(Text(on_a_line(line), style=style), soft_wrap=True)
