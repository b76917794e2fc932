"""How many digits of a number are worth writing."""

from __future__ import annotations

import math


def rounded(value: float, se: float | None = None) -> str:
    """``value`` with two digits of its standard error; without one, with four significant digits."""
    if se:
        return f"{value:,.{max(0, 1 - math.floor(math.log10(se)))}f}"
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"
