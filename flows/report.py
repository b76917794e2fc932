"""How a run ended, in a form that travels between tasks and programs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RunReport:
    """What was measured, what is missing and why, where the results are.

    ``headline`` are (label, text) rows for people; ``missing`` counts positions by reason, ``skipped`` responses and
    files by kind of defect, ``repaired`` what was mended in the input.
    """

    n_positions: int
    n_measured: int
    missing: dict[str, int]
    skipped: dict[str, int]
    repaired: dict[str, int]
    headline: list[tuple[str, str]]
    warnings: list[str]
    paths: list[str]

    @property
    def complete(self) -> bool:
        """Whether every position of every response was measured."""
        return not self.missing and not self.skipped
