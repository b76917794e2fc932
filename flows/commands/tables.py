"""The history as a table for people."""

from __future__ import annotations

from typing import Any

import polars as pl

from backends.errors import ConfigError
from backends.storage import as_location
from flows.config.templates import HISTORY_FILE
from flows.watch.history import read_history

Rows = list[dict[str, Any]]


def load_history(place: str) -> pl.DataFrame:
    """The rows of a history, by when the runs began; ``place`` is the file, or the folder that it is in.

    Raises
    ------
    ConfigError
        If it is no history, or has no row.
    """
    path = as_location(place)
    path = path if path.suffix == ".parquet" else path / HISTORY_FILE
    frame = read_history(path)
    if frame.height == 0:
        raise ConfigError(f"there is no history in {path}; it is made when a run ends.")
    return frame.sort("started_at", maintain_order=True)


def history_cells(frame: pl.DataFrame) -> Rows:
    """What is shown of each run."""
    return [
        {
            "began (UTC)": _text(row["started_at"] and f"{row['started_at']:%Y-%m-%d %H:%M}"),
            "Q": _text(row["model2"]),
            "version of Q": ", ".join(row["model2_versions"] or []),
            "KL per token": _number(row["kl_per_token"]),
            "95 % CI": _range(row["kl_per_token_low"], row["kl_per_token_high"]),
            "lower bound": _number(row["kl_per_token_certified_lower"]),
            "measured": _amount(row),
            "asked": "" if row["contexts_asked"] is None else f"{row['contexts_asked']:,}",
            "USD": _number(row["cost_usd"]),
            "drift": _drift(row),
            "results": _text(row["output_dir"]),
        }
        for row in frame.iter_rows(named=True)
    ]


def _text(value: Any) -> str:
    return "" if value is None else str(value)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _range(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f"{low:.4g} to {high:.4g}"


def _amount(row: dict[str, Any]) -> str:
    if row["measured"] is None or row["missing"] is None:
        return ""
    lost = f" of {row['measured'] + row['missing']:,}" if row["missing"] else ""
    return f"{row['measured']:,}{lost}"


def _drift(row: dict[str, Any]) -> str:
    if row["drift"] in (None, "undecided"):
        return _text(row["drift"])
    return f"{row['drift']}: {_number(row['drift_difference'])} ({_range(row['drift_low'], row['drift_high'])})"
