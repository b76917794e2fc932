"""How many digits of a number are worth writing."""

from __future__ import annotations

import math
from decimal import ROUND_CEILING, ROUND_FLOOR, Context

_MOST_DECIMALS = 8  # of smaller errors a number is read better with its exponent


def rounded(value: float, se: float | None = None) -> str:
    """``value`` with two digits of its standard error; without one, with four significant digits."""
    if se and (decimals := 1 - math.floor(math.log10(se))) <= _MOST_DECIMALS:
        return f"{value:,.{max(0, decimals)}f}"
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"


def at_least(value: float) -> str:
    """A lower bound with four significant digits: what is written is never more than ``value``."""
    return _towards(value, ROUND_FLOOR)


def at_most(value: float) -> str:
    """An upper limit with four significant digits: what is written is never less than ``value``."""
    return _towards(value, ROUND_CEILING)


def _towards(value: float, rounding: str) -> str:
    digits = max(4, len(f"{abs(value):.0f}"))
    # Fifteen digits first: 0.1 is not a little more than 0.1.
    return rounded(float(Context(prec=digits, rounding=rounding).create_decimal(f"{value:.15g}")))
