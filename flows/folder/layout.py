"""What is called what in an output folder: the one place that knows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from backends.scores.store import Alone, ScoreStore
from backends.service.counting import COUNTS
from kl.finished import names

HISTORY_FILE = "history.parquet"  # of many runs: beside their folders, or in one that all of them use
# Files of a run, or a sampling, that asked nothing: locks, who would have been asked, and what its prompts are.
LEFT_BY_NOTHING = frozenset({".lock", f".{HISTORY_FILE}.lock", "identity", "models", COUNTS})


@dataclass(frozen=True, slots=True)
class OutputFolder:
    """The places in an output folder, on a disk or in a bucket."""

    path: Path
    shared: Path | None = None  # a store of scores that several runs use, in the place of this folder's own

    @property
    def scores(self) -> Path:
        """What was bought; the backend keeps beside it what must survive a crash."""
        return self.own_scores if self.shared is None else self.shared

    @property
    def own_scores(self) -> Path:
        """What was bought, unless the folder's runs use a shared store."""
        return self.path / "scores"

    @property
    def shared_note(self) -> Path:
        """The address of the shared store that the folder's runs use."""
        return self.path / ".scores_dir"

    @property
    def raw(self) -> Path:
        """The service's own rows, with ``keep_raw``."""
        return self.scores / "raw"

    @property
    def jobs(self) -> Path:
        """The records of batch jobs."""
        return self.scores / "jobs"

    @property
    def refusals(self) -> Path:
        """Models that wrote responses and cannot be asked again; take it away to have them tried anew."""
        return self.scores / "not_asked_again.json"

    @property
    def lock(self) -> Path:
        """Held by the run that uses the folder."""
        return self.path / ".lock"

    @property
    def unfinished(self) -> Path:
        """What a run needs until its results are whole; while it is there, they are not."""
        return self.path / names.UNFINISHED

    @property
    def token_parts(self) -> Path:
        """The token table, file by file of the input."""
        return self.unfinished / "tokens"

    @property
    def tokens(self) -> Path:
        """The token table."""
        return self.path / names.TOKENS

    @property
    def candidates(self) -> Path:
        """Both lists of every position, unless a run was told to keep none."""
        return self.path / names.CANDIDATES

    @property
    def first_lists(self) -> Path:
        """What Q listed at first positions each time it was asked, of a run of these alone."""
        return self.path / names.FIRST_LISTS

    @property
    def responses(self) -> Path:
        """The response table."""
        return self.path / names.RESPONSES

    @property
    def summary(self) -> Path:
        """The figures of the data set."""
        return self.path / names.SUMMARY

    @property
    def report(self) -> Path:
        """The page for people."""
        return self.path / names.REPORT

    @property
    def run(self) -> Path:
        """The record of the run, which is written last."""
        return self.path / names.RECORD

    def stores(self, journals: Path | None = None, alone: Alone | None = None) -> Stores:
        """Where answers go; the arguments are as of `ScoreStore`."""
        failures = ScoreStore(self.unfinished / "failures", every_failure=True)
        return Stores(ScoreStore(self.scores, journals=journals, alone=alone), failures)


@dataclass(frozen=True, slots=True)
class Stores:
    """Where answers go: scores and final failures for good, everything that failed for this run's report."""

    scores: ScoreStore
    failures: ScoreStore
