"""How a run ended, in a form that travels between tasks and programs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from flows.config.models import RunConfig

if TYPE_CHECKING:
    from kl.output.glance import Figure  # which loads SciPy; a command's help needs none

EXIT_COMPLETE = 0
EXIT_ERROR = 1
EXIT_USAGE = 2
EXIT_INCOMPLETE = 3
EXIT_DRIFT = 4  # with fail_on_drift
EXIT_WAITING = 5  # with stage collect
EXIT_INTERRUPTED = 130

EXIT_CODES = (
    "exit codes: 0 every position measured; 3 finished, but positions or responses are missing (each with its reason "
    "in the outputs); 4 drifted, with --fail-on-drift; 5 with --stage collect: jobs still run, collect again later; "
    "2 a mistake in the settings or the call, or an input of which nothing can be used; 130 stopped by a signal; "
    "1 anything else"
)


@dataclass(frozen=True, slots=True)
class Excerpt:
    """What is shown of the results where there is room for little: the largest tokens and positions, and a chart.

    ``tokens`` are rows of `kl.statistics.summary.Summary.by_token`, ``positions`` those of
    `kl.finished.run.Run.worst_positions`, ``picture`` is SVG, or None if there is nothing to draw.
    """

    tokens: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    positions: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    picture: str | None = None


@dataclass(frozen=True, slots=True)
class RunReport:
    """What was measured, what is missing and why, where the results are.

    ``line`` says the KL per token, ``figures`` have it and others with their intervals. ``headline`` are (label, text)
    rows for people; ``missing`` counts positions by reason, ``skipped`` responses and
    files by kind of defect, ``repaired`` what was mended in the input. ``alarms`` are the first of the ``warnings``,
    which come before any number. ``verdict`` are the last rows of the headline: how the run stands to an earlier one.
    ``failed_on_drift`` says that the run drifted and ends as failed for it.
    """

    n_positions: int
    n_measured: int
    missing: dict[str, int]
    skipped: dict[str, int]
    repaired: dict[str, int]
    headline: list[tuple[str, str]]
    warnings: list[str]
    paths: list[str]
    line: str
    figures: list[Figure]
    alarms: list[str] = field(default_factory=list[str])
    excerpt: Excerpt = Excerpt()
    verdict: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])
    failed_on_drift: bool = False

    @property
    def exit_code(self) -> int:
        """How a program ends that has nothing but this to tell."""
        return EXIT_DRIFT if self.failed_on_drift else EXIT_COMPLETE if self.complete else EXIT_INCOMPLETE

    @property
    def complete(self) -> bool:
        """Whether every position of every response was measured."""
        return not self.missing and not self.skipped


_written: list[RunReport] = []


def note_written(report: RunReport) -> None:
    """Keep the report of results that are on disk for the program, should the Prefect server not answer any more."""
    _written.append(report)


def last_written() -> RunReport | None:
    """The report of the results that this process wrote last."""
    return _written[-1] if _written else None


@dataclass(frozen=True, slots=True)
class PendingReport:
    """How a run ended that measured nothing.

    ``n_waiting`` contexts are in jobs, or in a group that could not be looked at; ``n_not_submitted`` in none;
    ``failures`` counts by reason those that no job was made for in spite of the try (submit only). ``config`` is that
    of the run, with its folders filled in. ``n_missing`` contexts have no answer, and nothing that may still bring one
    (unchanged only).
    """

    name: Literal["Submitted", "Waiting", "Skipped", "Unchanged"]
    n_on_disk: int = 0
    n_waiting: int = 0
    n_not_submitted: int = 0
    n_jobs: int = 0
    n_missing: int = 0
    failures: dict[str, int] = field(default_factory=dict[str, int])
    reason: str | None = None
    config: RunConfig | None = None

    @property
    def complete(self) -> bool:
        """Whether nothing went wrong."""
        return not (self.failures or self.n_missing)

    @property
    def lines(self) -> list[str]:
        """What a person is told."""
        if self.name == "Skipped":
            return [f"skipped: {self.reason} Nothing was changed; collect again later."]
        if self.name == "Unchanged":
            what = f"all {self.n_on_disk:,} contexts" if not self.n_missing else f"{self.n_on_disk:,} contexts"
            rest = f"; {self.n_missing:,} have no answer, as there" if self.n_missing else ""
            return [f"unchanged: {what} were measured by the run that ended {self.reason}{rest}."]
        if self.name == "Submitted":
            first = f"submitted: {self.n_waiting:,} contexts are in {self.n_jobs:,} batch jobs"
        else:
            first = f"waiting: {self.n_waiting:,} contexts are in batch jobs that have not answered them yet"
        lines = [f"{first}; {self.n_on_disk:,} are on disk. Nothing was measured."]
        if self.n_not_submitted:
            lines.append(
                f"{self.n_not_submitted:,} contexts are in no batch job: --stage submit, or a run without --stage, "
                "buys them."
            )
        return lines + [
            f"{count:,} contexts could not be submitted ({reason}): submit again"
            for reason, count in sorted(self.failures.items())
        ]
