"""What a finished run is for those who go on from it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from kl.statistics.summary import Summary


@dataclass(frozen=True, slots=True)
class Run:
    """A finished run.

    Attributes
    ----------
    folder : Path
    summary : Summary
        The figures of the data set.
    tokens, responses : pl.LazyFrame
        Schemas `kl.tables.schemas.TOKENS` and `kl.tables.responses.RESPONSES`; columns that an earlier version did not
        write are null.
    candidates : pl.LazyFrame or None
        Both lists of every position (`kl.tables.schemas.CANDIDATES`), row for row beside ``tokens``; None where the run
        kept none, as those of earlier versions.
    record : dict
        What ``run.json`` says: settings, versions, times.
    """

    folder: Path
    summary: Summary
    tokens: pl.LazyFrame
    responses: pl.LazyFrame
    candidates: pl.LazyFrame | None
    record: dict[str, Any]
