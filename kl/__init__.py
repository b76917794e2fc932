"""What is computed: arrays and frames in, arrays and frames out; ``from kl import compare`` and so on.

No network, no plugins, no Prefect; files only in the readers (`kl.input`, `kl.finished`) and the writers
(`kl.output`). The module of
a name is loaded when the name is first used, so that `kl.records` alone costs neither SciPy nor Polars.
`docs/library.md` has examples.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kl.estimators.align import align
    from kl.estimators.bounds import cells, lower_bounds
    from kl.estimators.censored import SpreadEvidence, SpreadPrior, pooled_prior
    from kl.estimators.comparison import PositionDivergences, compare
    from kl.estimators.diagnostic import diagnose
    from kl.estimators.divergence import exact_kl, sampled_token
    from kl.estimators.list_checks import CandidateListError
    from kl.estimators.matching.aligned import Aligned
    from kl.estimators.token_keys import listed
    from kl.finished.reading import FinishedRunError, load_run
    from kl.finished.run import Run
    from kl.input.responses import ResponseFile, read_responses
    from kl.output.files import write_part, write_responses, write_summary, write_tokens
    from kl.output.headline import headline
    from kl.records import Candidate, Position, Prompt, Response, Sampling, Score, ScoreFailure, Turn
    from kl.statistics.dataset import summarise_dataset
    from kl.statistics.intervals import Estimate, ratio_estimate
    from kl.statistics.paired import PairedDifference, paired_difference
    from kl.statistics.summary import RunFacts, Summary
    from kl.tables.responses import RESPONSES, ResponseInfo, summarise_responses
    from kl.tables.schemas import CANDIDATES, TOKENS
    from kl.tables.tokens import measure_response, response_spread

__all__ = [
    "CANDIDATES",
    "RESPONSES",
    "TOKENS",
    "Aligned",
    "Candidate",
    "CandidateListError",
    "Estimate",
    "FinishedRunError",
    "PairedDifference",
    "Position",
    "PositionDivergences",
    "Prompt",
    "Response",
    "ResponseFile",
    "ResponseInfo",
    "Run",
    "RunFacts",
    "Sampling",
    "Score",
    "ScoreFailure",
    "SpreadEvidence",
    "SpreadPrior",
    "Summary",
    "Turn",
    "align",
    "cells",
    "compare",
    "diagnose",
    "exact_kl",
    "headline",
    "listed",
    "load_run",
    "lower_bounds",
    "measure_response",
    "paired_difference",
    "pooled_prior",
    "ratio_estimate",
    "read_responses",
    "response_spread",
    "sampled_token",
    "summarise_dataset",
    "summarise_responses",
    "write_part",
    "write_responses",
    "write_summary",
    "write_tokens",
]

# The imports above once more, for the interpreter; a test holds the two and `__all__` together.
_HOMES = {
    "estimators.align": ("align",),
    "estimators.bounds": ("cells", "lower_bounds"),
    "estimators.censored": ("SpreadEvidence", "SpreadPrior", "pooled_prior"),
    "estimators.comparison": ("PositionDivergences", "compare"),
    "estimators.diagnostic": ("diagnose",),
    "estimators.divergence": ("exact_kl", "sampled_token"),
    "estimators.list_checks": ("CandidateListError",),
    "estimators.matching.aligned": ("Aligned",),
    "estimators.token_keys": ("listed",),
    "finished.reading": ("FinishedRunError", "load_run"),
    "finished.run": ("Run",),
    "input.responses": ("ResponseFile", "read_responses"),
    "output.files": ("write_part", "write_responses", "write_summary", "write_tokens"),
    "output.headline": ("headline",),
    "records": ("Candidate", "Position", "Prompt", "Response", "Sampling", "Score", "ScoreFailure", "Turn"),
    "statistics.dataset": ("summarise_dataset",),
    "statistics.intervals": ("Estimate", "ratio_estimate"),
    "statistics.paired": ("PairedDifference", "paired_difference"),
    "statistics.summary": ("RunFacts", "Summary"),
    "tables.responses": ("RESPONSES", "ResponseInfo", "summarise_responses"),
    "tables.schemas": ("CANDIDATES", "TOKENS"),
    "tables.tokens": ("measure_response", "response_spread"),
}
_HOME = {name: f"kl.{module}" for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'kl' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value  # so that this is called once a name
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
