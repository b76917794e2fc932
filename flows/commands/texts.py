"""Numbers and texts as the tables and sentences of the command line show them."""

from __future__ import annotations

from collections.abc import Sequence

from kl.output.digits import at_least, rounded
from kl.statistics.intervals import CONFIDENCE, Estimate
from kl.statistics.summary import Summary

INTERVAL = f"{100 * CONFIDENCE:.0f} % CI"


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
