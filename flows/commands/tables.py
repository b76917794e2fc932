"""Tables for people: the worst tokens, positions and responses of a run, and the runs of a history."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import polars as pl
from rich.cells import cell_len
from rich.columns import Columns
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from flows.commands.texts import bound_text, number_text, quoted, range_text
from flows.folder.finished import Rows
from flows.runtime.terminal import print_grid, print_lines
from kl.signs import on_a_line
from kl.tables.totals import INFINITE

_GAP = 2  # characters between columns
_LONGEST_NAME = 1 / 3  # of the terminal, where a table is divided


def history_cells(frame: pl.DataFrame) -> Rows:
    """What is shown of each run; KL(Q then‖Q now) where an alert watched it."""
    rows = [*frame.iter_rows(named=True)]
    watched = any(row["then_now"] is not None for row in rows)
    return [
        {
            "began (UTC)": _text(row["started_at"] and f"{row['started_at']:%Y-%m-%d %H:%M}"),
            "Q": _text(row["model2"]),
            "version of Q": ", ".join(row["model2_versions"] or []),
            "KL per token": number_text(row["kl_per_token"]),
            "95 % CI": range_text(row["kl_per_token_low"], row["kl_per_token_high"]),
            "lower bound": bound_text(row["kl_per_token_certified_lower"]),
            "noise floor": number_text(row["noise_floor"]),
            **({"Q then‖now": _then_now(row)} if watched else {}),
            "measured": _amount(row),
            "asked": "" if row["contexts_asked"] is None else f"{row['contexts_asked']:,}",
            "USD": number_text(row["cost_usd"]),
            "drift": _drift(row),
            "results": _text(row["output_dir"]),
        }
        for row in rows
    ]


def _text(value: Any) -> str:
    return "" if value is None else str(value)


def _amount(row: dict[str, Any]) -> str:
    if row["measured"] is None or row["missing"] is None:
        return ""
    lost = f" of {row['measured'] + row['missing']:,}" if row["missing"] else ""
    return f"{row['measured']:,}{lost}"


def _then_now(row: dict[str, Any]) -> str:
    if row["then_now"] is None:
        return ""
    return f"{number_text(row['then_now'])} ({range_text(row['then_now_low'], row['then_now_high'])})"


def _drift(row: dict[str, Any]) -> str:
    if row["drift"] in (None, "undecided"):
        return _text(row["drift"])
    what = "" if row["drift_of"] in (None, "pq") else " of Q"
    if row["drift_low"] is None:  # a permutation test has no interval
        return f"{row['drift']}{what}: {number_text(row['drift_difference'])}"
    interval = range_text(row["drift_low"], row["drift_high"])
    return f"{row['drift']}{what}: {number_text(row['drift_difference'])} ({interval})"


def token_cells(rows: Rows) -> Rows:
    """What is shown of each token text."""
    return [
        {
            "token": quoted(row["token"]),
            "positions": f"{row['n_measured']:,}",
            "sum": number_text(row["kl_sum"]),
            "mean": number_text(row["kl_mean"]),
            "share": "" if row["kl_share"] is None else f"{row['kl_share']:.1%}",
        }
        for row in rows
    ]


def position_cells(rows: Rows) -> Rows:
    """What is shown of each position."""
    return [
        {
            "response, position": f"{row['source_file']}#{row['response_idx']}, {row['position']}",
            "text before": quoted(row["before"] or ""),
            "token": quoted(row["token"]),
            "KL": "infinite" if row["reason"] == INFINITE else number_text(row["kl_estimate"]),
            "lower": bound_text(row["kl_lower"]),
            "upper": number_text(row["kl_upper_plausible"], "not identified"),
            "log p": number_text(row["logprob_p"], "not stated"),
            "log q": number_text(row["logprob_q"], "not listed"),
        }
        for row in rows
    ]


def response_cells(rows: Rows) -> Rows:
    """What is shown of each response."""
    return [
        {
            "response": f"{row['source_file']}#{row['response_idx']}",
            "measured": f"{row['n_measured']:,} of {row['n_positions']:,}",
            "per token": number_text(row["kl_mean_per_token"], "infinite"),
            "sum": number_text(row["kl_sum"], "infinite"),
            "lower sum": bound_text(row["kl_lower_sum"], "not known"),
            "largest": number_text(row["max_kl"], "infinite"),
            "at position": "" if row["max_kl_position"] is None else f"{row['max_kl_position']:,}",
            "same top": "" if row["same_top_rate"] is None else f"{row['same_top_rate']:.1%}",
        }
        for row in rows
    ]


def print_table(out: Console, title: str, rows: Rows) -> None:
    """Print rows of cells below a title.

    Where a terminal is too narrow: as several tables of the same rows, or a paragraph a row if their names are long.
    """
    out.print()
    print_lines(out, [title], style="bold")
    if not rows:
        out.print("none: nothing has an estimate")
        return
    rows = [{name: on_a_line(cell) for name, cell in row.items()} for row in rows]
    widths = {name: max(cell_len(name), *(cell_len(row[name]) for row in rows)) for name in rows[0]}
    first, *others = widths
    blocks = _blocks(others, widths, out.width - widths[first])
    if len(blocks) > 1 and widths[first] > _LONGEST_NAME * out.width:
        _print_paragraphs(out, rows)
        return
    for number, names in enumerate(blocks):
        if number:
            out.print()
        table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
        for name in (first, *names):
            table.add_column(name, overflow="fold")
        for row in rows:
            table.add_row(*(Text(row[name]) for name in (first, *names)))
        print_grid(out, table)


def _blocks(names: Sequence[str], widths: Mapping[str, int], room: int) -> list[list[str]]:
    """Columns in a row, divided where no further one has room."""
    blocks: list[list[str]] = [[]]
    left = room
    for name in names:
        width = widths[name] + _GAP
        if width > left and blocks[-1]:
            blocks.append([])
            left = room
        blocks[-1].append(name)
        left -= width
    return blocks


def _print_paragraphs(out: Console, rows: Rows) -> None:
    for row in rows:
        (_, first), *others = row.items()
        print_lines(out, [first])
        cells = [Text(f"{name} {cell}") for name, cell in others if cell]
        out.print(Padding(Columns(cells, padding=(0, _GAP)), (0, 0, 0, 2)))
