"""Numbers and texts as the tables and sentences of the command line show them."""

from __future__ import annotations

import math
from collections.abc import Sequence

from kl.statistics.intervals import CONFIDENCE, Estimate
from kl.statistics.summary import Summary

INTERVAL = f"{100 * CONFIDENCE:.0f} % CI"


def rounded(value: float, estimate: Estimate) -> str:
    """With two digits of the standard error."""
    if not estimate.se:
        return number_text(value)
    return f"{value:,.{max(0, 1 - math.floor(math.log10(estimate.se)))}f}"


def signed(value: float, estimate: Estimate) -> str:
    """As `rounded`, with the sign of a positive value."""
    return rounded(value, estimate) if value <= 0 else f"+{rounded(value, estimate)}"


def number_text(value: float | None, unknown: str = "") -> str:
    """Four digits, or all that stand before the point; ``unknown`` for None."""
    if value is None:
        return unknown
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"


def quoted(text: str) -> str:
    """A text as a literal: spaces, line breaks and control characters are seen, and the terminal is left alone."""
    return repr(text)


def warnings_of(summary: Summary) -> list[str]:
    """The run's warnings, and what its alignment diagnostic found."""
    reasons: Sequence[str] = (summary.alignment or {}).get("reasons", ())
    return [*summary.warnings, *(reason for reason in reasons if reason not in " ".join(summary.warnings))]
