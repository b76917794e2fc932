"""Whether a run drifted: what its alert asks, decided on the interval, and said in a line."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import polars as pl

from flows.config.alert import AlertConfig
from flows.watch.reference import Reference
from kl.output.digits import rounded
from kl.statistics.drift import Change, Direction, DriftDecision, change


@dataclass(frozen=True, slots=True)
class Verdict:
    """What an alert decided. ``change`` is ``None`` if there was nothing to compare with; ``reason`` then says why.

    ``noise_floor`` is the run's, nats per token; ``None`` if it has none.
    """

    alert: AlertConfig
    reference: Reference | None
    change: Change | None
    reason: str | None
    warnings: list[str] = field(default_factory=list[str])
    noise_floor: float | None = None

    @property
    def below_noise_floor(self) -> bool | None:
        """Whether the difference is smaller than that of a model from itself; ``None`` if either is not known."""
        if self.noise_floor is None or self.change is None or self.change.value is None:
            return None
        return abs(self.change.value) < self.noise_floor

    @property
    def decision(self) -> DriftDecision:
        """Drift, no drift or undecided."""
        return "undecided" if self.change is None else self.change.decide(self.alert.kl_per_token)

    @property
    def direction(self) -> Direction | None:
        """Which way the KL went; ``None`` without a run to compare with."""
        return None if self.change is None or self.reference is None else self.change.direction

    @property
    def message(self) -> str:
        """The verdict with its figures, in a line."""
        found = self.change
        if found is None or found.value is None or found.low is None or found.high is None:
            return f"{self.decision}: {self.reason or (found.no_interval if found is not None else None)}"
        return (
            f"{self.decision}: KL per token {self._figures(found, found.value, found.low, found.high)}{self._noise()}"
        )

    def _noise(self) -> str:
        if self.noise_floor is None:
            return ""
        floor = f"the noise floor of {rounded(self.noise_floor)}"
        return f"; below {floor}, the service's own unrest" if self.below_noise_floor else f"; above {floor}"

    def _figures(self, found: Change, value: float, low: float, high: float) -> str:
        show = partial(rounded, se=found.se)
        prompts = found.n_shared + found.n_only_run + found.n_only_reference
        interval = f"{100 * found.level:g} % interval {show(low)} to {show(high)}, {prompts:,} prompts"
        limit = f"{self.alert.kl_per_token:g}"
        if self.reference is None:
            return f"is {show(value)} nats ({interval}); the alert is for an interval above {limit}"
        if low <= 0 <= high:
            what = f"differs by {'+' if value > 0 else ''}{show(value)} nats"
        else:
            what = f"{'rose' if value > 0 else 'fell'} by {show(abs(value))} nats"
        return f"{what} ({interval}) from {self.reference.label}; the alert is for a rise above {limit}"

    def to_json(self) -> dict[str, Any]:
        """The same as plain values, for ``summary.json``, ``run.json`` and events."""
        found = {} if self.change is None else asdict(self.change)
        return {
            "decision": self.decision,
            "direction": self.direction,
            "message": self.message,
            "threshold": self.alert.kl_per_token,
            "level": self.alert.level,
            "test": self.alert.test,
            "kl_per_token": found.get("run"),
            "kl_per_token_reference": found.get("reference"),
            "difference": found.get("value"),
            "difference_se": found.get("se"),
            "difference_low": found.get("low"),
            "difference_high": found.get("high"),
            "degrees_of_freedom": found.get("degrees_of_freedom"),
            "prompts_in_both": found.get("n_shared"),
            "prompts_only_here": found.get("n_only_run"),
            "prompts_only_there": found.get("n_only_reference"),
            "reference": None
            if self.reference is None
            else {"kind": self.reference.kind, "folder": self.reference.folder} | self.reference.about,
            "reason": self.reason or found.get("no_interval"),
            "noise_floor": self.noise_floor,
            "below_noise_floor": self.below_noise_floor,
        }


def decide(alert: AlertConfig, responses: pl.DataFrame, reference: Reference | None) -> Verdict:
    """The verdict over a run's response table, against that of another run if there is one."""
    found = change(responses, None if reference is None else reference.responses, alert.level)
    warnings: list[str] = []
    if found.no_interval is not None:
        warnings.append(f"drift is undecided: {found.no_interval}")
    if reference is not None and found.n_only_run + found.n_only_reference and found.low is not None:
        warnings.append(
            f"drift: {found.n_shared:,} prompts were measured in both runs, {found.n_only_run:,} only in this one and "
            f"{found.n_only_reference:,} only in the other; a part of the difference may be that of the prompts"
        )
    return Verdict(alert, reference, found, None, warnings)


def undecided(alert: AlertConfig, reason: str, *, warn: bool = True) -> Verdict:
    """The verdict where there is nothing to compare with."""
    return Verdict(alert, None, None, reason, [f"drift is undecided: {reason}"] if warn else [])
