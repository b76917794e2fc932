"""A run's figures at a glance: the line of a state or a log, and the rows of a small table."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from kl.output.digits import at_least, rounded
from kl.statistics.intervals import Estimate
from kl.statistics.summary import Summary


class Figure(NamedTuple):
    """A row of the table: every figure as text, empty where it is not known."""

    name: str
    estimate: str
    low: str
    high: str
    lower_bound: str


def glance(summary: Summary) -> str:
    """The KL per token in one line: estimate, 95 % interval, certified bound, positions measured of those selected.

    Such as ``0.617 nats/token (0.372 to 0.861), certainly > 0.4339, 150 of 150``. Of a sample of the positions the
    bound is an estimate, and called so.
    """
    counts, found = summary.counts, summary.kl_per_token
    parts = [_estimate(found.estimate)]
    if found.lower.value is not None:
        words = "certainly" if counts.selected == counts.positions else "lower bound"
        parts.append(f"{words} {_above(found.lower.value)}")
    return ", ".join([*parts, f"{counts.measured:,} of {counts.selected:,}"])


def figures(summary: Summary) -> list[Figure]:
    """The figures to read first, each with its 95 % interval and, of divergences, its certified lower bound."""
    token, response, floor = summary.kl_per_token, summary.kl_per_response, summary.noise_floor
    rows = [
        ("KL(P‖Q), nats per token", token.estimate, token.lower),
        ("exact, nats per token", token.exact, None),
        ("KL(P‖Q), nats per response", response.estimate, response.lower),
        ("noise floor, nats per token", None if floor is None else floor.kl_per_token, None),
        ("reverse KL(Q‖P), nats per token", summary.reverse_kl_per_token, summary.reverse_kl_lower_per_token),
        ("Jensen-Shannon, nats per token", summary.js_per_token, summary.js_lower_per_token),
        ("same top token, %", _percent(summary.same_top_p), None),
    ]
    return [_figure(name, estimate, lower) for name, estimate, lower in rows if estimate is not None and estimate.n > 0]


def _figure(name: str, estimate: Estimate, lower: Estimate | None) -> Figure:
    def text(value: float | None) -> str:
        return "" if value is None else rounded(value, estimate.se)

    bound = "" if lower is None or lower.value is None else at_least(lower.value)
    return Figure(name, text(estimate.value), text(estimate.ci_low), text(estimate.ci_high), bound)


def _percent(share: Estimate) -> Estimate:
    hundred = {name: getattr(share, name) for name in ("value", "se", "ci_low", "ci_high")}
    return replace(share, **{name: None if part is None else 100 * part for name, part in hundred.items()})


def _estimate(found: Estimate) -> str:
    if found.value is None:
        return f"KL per token not known ({found.no_interval})"
    text = f"{rounded(found.value, found.se)} nats/token"
    if found.ci_low is None or found.ci_high is None:
        return text
    return f"{text} ({rounded(found.ci_low, found.se)} to {rounded(found.ci_high, found.se)})"


def _above(bound: float) -> str:
    text = at_least(bound)
    return f"{'>' if bound > float(text.replace(',', '')) else '≥'} {text}"
