"""The parts of a measured data set, put together."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from typing import Any, NamedTuple

import polars as pl

from flows.stages.measuring import MeasuredPart


class Joined(NamedTuple):
    """Token table as Python rows, and texts of the files."""

    rows: list[tuple[Any, ...]]
    texts: list[Any]


def joined(parts: Sequence[MeasuredPart]) -> Joined:
    """Of all parts, in their order."""
    tables = [pl.read_parquet(part.tokens) for part in parts if part.tokens is not None]
    assert tables, "something was measured"
    return Joined(pl.concat(tables).rows(), [text for part in parts for text in pickle.loads(part.texts.read_bytes())])
