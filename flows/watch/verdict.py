"""Whether a run drifted: what its alert asks, decided on the interval, and said in a line."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import polars as pl

from flows.config.alert import AlertConfig
from flows.watch.reference import Reference
from kl.finished.between import Between
from kl.output.digits import at_least, rounded
from kl.output.headline import bounded_text
from kl.statistics.canary import CanaryTest
from kl.statistics.drift import Change, Direction, DriftDecision, change
from kl.tables.totals import RESPONSE_KEYS


@dataclass(frozen=True, slots=True)
class Verdict:
    """What an alert decided. ``change`` is ``None`` if there was nothing to compare with; ``reason`` then says why.

    ``noise_floor`` is the run's, nats per token; ``None`` if it has none. ``between`` is the KL of Q then from Q now,
    where the alert is of that; ``change`` is then what of it is above the noise floor of Q, if that was measured.
    ``canary`` is what decides of first positions, in the place of ``change``.
    """

    alert: AlertConfig
    reference: Reference | None
    change: Change | None
    reason: str | None
    warnings: list[str] = field(default_factory=list[str])
    noise_floor: float | None = None
    between: Between | None = None
    canary: CanaryTest | None = None

    @property
    def below_noise_floor(self) -> bool | None:
        """Whether the difference is smaller than that of a model from itself; ``None`` if either is not known."""
        if self.noise_floor is None or self.change is None or self.change.value is None:
            return None
        if self.alert.of == "q":
            return self.change.run is not None and self.change.run < self.noise_floor
        return abs(self.change.value) < self.noise_floor

    @property
    def decision(self) -> DriftDecision:
        """Drift, no drift or undecided."""
        if self.canary is not None:
            return "drift" if self.canary.changed(self.alert.kl_per_token) else "no drift"
        return "undecided" if self.change is None else self.change.decide(self.alert.kl_per_token)

    def left_open(self, reason: str) -> Verdict:
        """The same without a decision."""
        warnings = [*self.warnings, f"drift is undecided: {reason}"]
        return replace(self, change=None, reason=reason, warnings=warnings)

    @property
    def direction(self) -> Direction | None:
        """Which way the KL went; ``None`` without a run to compare with."""
        return None if self.change is None or self.reference is None else self.change.direction

    @property
    def message(self) -> str:
        """The verdict with its figures, in a line."""
        found = self.change
        if self.canary is not None:
            return f"{self.decision}: {self._first_positions(self.canary)}"
        if found is None or found.value is None or found.low is None or found.high is None:
            return f"{self.decision}: {self.reason or (found.no_interval if found is not None else None)}"
        if self.between is not None:
            return f"{self.decision}: {self._then_now(found, self.between, found.value, found.low, found.high)}"
        return (
            f"{self.decision}: KL per token {self._figures(found, found.value, found.low, found.high)}{self._noise()}"
        )

    @property
    def rows(self) -> list[tuple[str, str]]:
        """What the verdict adds to the figures of the run, for people."""
        rows = [("Drift", self.message)]
        found = self.between
        if found is None:
            return rows
        text = bounded_text(found.per_token, found.lower, found.plausible_upper)
        return [("KL(Q then‖Q now) per token", f"{text}; {found.n_measured:,} contexts of both runs"), *rows]

    def _first_positions(self, found: CanaryTest) -> str:
        side = "above" if found.change >= 0 else "below"
        return (
            f"Q's lists at {found.n_contexts:,} first positions are {rounded(found.distance)} nats from the mean of "
            f"{found.n_earlier} earlier runs, {rounded(abs(found.change))} {side} their noise "
            f"(p = {found.p_value:.2g}); the alert is for p of {1 - found.level:.2g} or less, beyond the "
            f"{rounded(found.limit)} that one more like them stays below, and more than "
            f"{self.alert.kl_per_token:g} above the noise"
        )

    def _then_now(self, found: Change, between: Between, value: float, low: float, high: float) -> str:
        show = partial(rounded, se=found.se)
        interval = f"{100 * found.level:g} % interval {show(low)} to {show(high)}"
        prompts = f"{between.per_token.n_clusters:,} prompts"
        assert self.reference is not None, "Q now is compared with Q in another run"
        where = f"from {self.reference.label}"
        lower = between.lower.value
        certain = "" if lower is None else f", certainly {at_least(lower)} or more"
        limit = f"the alert is for an interval above {self.alert.kl_per_token:g}"
        if found.reference is None or found.run is None:
            what = f"{show(value)} nats per token ({interval}, {prompts}{certain}) {where}"
            return f"KL(Q then‖Q now) is {what}; no noise floor of Q was measured; {limit}"
        side = "above" if value >= 0 else "below"
        floor = f"{show(abs(value))} ({interval}, {prompts}) {side} Q's noise floor of {rounded(found.reference)}"
        return f"KL(Q then‖Q now) is {rounded(found.run)} nats per token{certain} {where}, {floor}; {limit}"

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
            "of": self.alert.of,
            "decision": self.decision,
            "direction": self.direction,
            "message": self.message,
            "threshold": self.alert.kl_per_token,
            "level": self.alert.level,
            "interval_level": found.get("level"),
            "test": self.alert.test,
            "kl_per_token": found.get("run"),
            "kl_per_token_reference": found.get("reference"),
            "difference": found.get("value") if self.canary is None else self.canary.change,
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
            "first_positions": None if self.canary is None else asdict(self.canary),
            "then_against_now": None if self.between is None else self.between.to_json(),
        }


def decide(alert: AlertConfig, responses: pl.DataFrame, reference: Reference | None) -> Verdict:
    """The verdict over a run's response table, against that of another run if there is one."""
    found = change(responses, None if reference is None else reference.responses, _two_sided(alert))
    warnings: list[str] = []
    if found.no_interval is not None:
        warnings.append(f"drift is undecided: {found.no_interval}")
    if reference is not None and found.n_only_run + found.n_only_reference and found.low is not None:
        warnings.append(
            f"drift: {found.n_shared:,} prompts were measured in both runs, {found.n_only_run:,} only in this one and "
            f"{found.n_only_reference:,} only in the other; a part of the difference may be that of the prompts"
        )
    return Verdict(alert, reference, found, None, warnings)


def decide_q(alert: AlertConfig, between: Between, again: pl.DataFrame | None, reference: Reference) -> Verdict:
    """The verdict over Q then against Q now.

    Parameters
    ----------
    again : pl.DataFrame, optional
        Response table of Q against itself, asked again in this run: what of the KL is above that counts, over the
        responses that are the same as a whole, as a floor of other positions is another floor.
    """
    responses, apart = between.responses, between.not_whole
    if again is not None:
        responses, again = (table.join(apart, on=RESPONSE_KEYS, how="anti") for table in (responses, again))
    found = change(responses, again, _two_sided(alert), ("Q then against Q now", "Q's noise floor"))
    warnings: list[str] = []
    if again is not None and apart.height:
        whole = f"{responses.height:,} of {between.responses.height:,} responses are the same as a whole in both runs"
        if found.no_interval is not None:
            reason = f"{whole}, and the noise floor is compared over these alone: ask about the same files each time"
            return Verdict(alert, reference, None, reason, [f"drift is undecided: {reason}"], between=between)
        warnings.append(f"drift: {whole}; these alone decide, as the noise floor is known by response")
    if found.no_interval is not None:
        warnings.append(f"drift is undecided: {found.no_interval}")
    elif again is None and between.per_token.value:
        warnings.append(
            "drift: how far Q is from itself on one day was not measured (noise_floor: {fraction: 0.2}), so that the "
            "unrest of its service counts as a change"
        )
    if alone := between.n_only_first + between.n_only_second:
        warnings.append(
            f"drift: {between.n_contexts:,} contexts were asked in both runs; {between.n_only_second:,} positions of "
            f"this run and {between.n_only_first:,} of the other have no such context and take no part ({alone:,} in "
            f"all, such as {between.example})"
        )
    if between.missing:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in sorted(between.missing.items()))
        warnings.append(f"drift: contexts of both runs without two lists of Q to compare: {reasons}")
    return Verdict(alert, reference, found, None, warnings, between=between)


def _two_sided(alert: AlertConfig) -> float:
    """The confidence of the interval whose lower end alone is too high in 1 - level of all cases."""
    return 2 * alert.level - 1


def undecided(alert: AlertConfig, reason: str, *, warn: bool = True) -> Verdict:
    """The verdict where there is nothing to compare with."""
    return Verdict(alert, None, None, reason, [f"drift is undecided: {reason}"] if warn else [])
