"""From scores on disk to one table of tokens per input file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from flows.inputs import InputFile, read_input
from flows.plan import Asker, Plan
from flows.progress import ProgressReporter
from flows.scoring import Stores
from kl.exact import exact_kl
from kl.measure import DatasetFacts, measure_response, survey_response
from kl.records import Response, Sampling, Score, ScoreFailure
from kl.responses import ResponseFile
from kl.results import write_part
from kl.summary import ResponseInfo

# Full vocabularies are compared so many positions at a time: two float32 arrays of this many rows are in memory.
_FULL_CHUNK = 64
# How far a list that P gives now may be from the one on record before it is another model's.
_SAME_MODEL_NATS = 0.01

Results = list[Score | ScoreFailure | None]


@dataclass(slots=True)
class Measured:
    """The parts of the token table, and what the input says beside it."""

    files: list[InputFile]
    parts: list[Path] = field(default_factory=list[Path])
    responses: list[ResponseInfo] = field(default_factory=list[ResponseInfo])
    samplings: set[Sampling] = field(default_factory=set[Sampling])
    models_p: set[str] = field(default_factory=set[str])
    warnings: list[str] = field(default_factory=list[str])
    facts: DatasetFacts | None = None
