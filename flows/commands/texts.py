"""Numbers and texts as the tables and sentences of the command line show them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kl.output.digits import at_least, rounded
from kl.output.glance import Figure
from kl.output.headline import ANSWER
from kl.statistics.intervals import CONFIDENCE, Estimate
from kl.statistics.summary import Summary

INTERVAL = f"{100 * CONFIDENCE:.0f} % CI"
ALARM = "bold red"
WARNING = "yellow"
_DRIFT = {"drift": ALARM, "no drift": "bold green"}


def signed(value: float, estimate: Estimate) -> str:
    """A difference with two digits of its standard error, and the sign of a positive one."""
    text = rounded(value, estimate.se)
    return text if value <= 0 else f"+{text}"


def number_text(value: float | None, unknown: str = "") -> str:
    """Four digits, or all that stand before the point; ``unknown`` for None."""
    return unknown if value is None else rounded(value)


def bound_text(value: float | None, unknown: str = "") -> str:
    """A lower bound, never rounded up; ``unknown`` for None."""
    return unknown if value is None else at_least(value)


def range_text(low: float | None, high: float | None, se: float | None = None) -> str:
    """Two ends of an interval, with two digits of the standard error if it is given; nothing without them."""
    return "" if low is None or high is None else f"{rounded(low, se)} to {rounded(high, se)}"


def quoted(text: str) -> str:
    """A text as a literal: spaces, line breaks and control characters are seen, and the terminal is left alone."""
    return repr(text)


def warnings_of(summary: Summary) -> list[str]:
    """The run's warnings, and what its alignment diagnostic found."""
    reasons: Sequence[str] = (summary.alignment or {}).get("reasons", ())
    return [*summary.warnings, *(reason for reason in reasons if reason not in " ".join(summary.warnings))]


def headline_styles(
    figures: Sequence[Figure], *, alarms: bool, whole: bool, verdict: Sequence[tuple[str, str]] = ()
) -> Mapping[str, str]:
    """How a terminal shows the rows of the headline that answer the question, by label.

    The KL per token is green if it has an interval over all positions (``whole``), red if it is not known or something
    is alarming, and yellow between the two; an alert's ``verdict`` has the colour of its decision.
    """
    answer = next((figure for figure in figures if figure.estimate), None)
    sure = answer is not None and answer.low != "" and whole
    style = ALARM if answer is None or alarms else "bold green" if sure else "bold yellow"
    decided = {label: _DRIFT.get(text.partition(":")[0], "bold yellow") for label, text in verdict}
    return {ANSWER: style} | decided
