"""Scales of an axis: from values to places in a drawing, and which values to name."""

from __future__ import annotations

import math
from dataclasses import dataclass

_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True, slots=True)
class Linear:
    """Values ``low`` to ``high`` (which differ) on the places ``start`` to ``stop``; what lies outside is clamped."""

    low: float
    high: float
    start: float
    stop: float

    def __call__(self, value: float) -> float:
        """The place of a value."""
        share = (min(max(value, self.low), self.high) - self.low) / (self.high - self.low)
        return self.start + share * (self.stop - self.start)

    def ticks(self, n: int = 5) -> list[float]:
        """About ``n`` round values, from low to high."""
        step = _round_step((self.high - self.low) / n)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [number * step for number in range(first, last + 1)]


@dataclass(frozen=True, slots=True)
class Log:
    """Positive values on a logarithmic axis; what lies outside is clamped."""

    low: float
    high: float
    start: float
    stop: float

    def __call__(self, value: float) -> float:
        """The place of a value."""
        share = math.log(min(max(value, self.low), self.high) / self.low) / math.log(self.high / self.low)
        return self.start + share * (self.stop - self.start)

    def ticks(self, n: int = 5) -> list[float]:
        """Powers of ten; with two decades or fewer their halves and fifths too, with more than ``n`` only some."""
        first, last = math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9)
        if last - first >= 2:
            return [10.0**power for power in range(first, last + 1, max(1, math.ceil((last - first) / n)))]
        values = (digit * 10.0**power for power in range(first - 1, last + 1) for digit in (1, 2, 5))
        return [value for value in values if self.low * (1 - 1e-9) <= value <= self.high * (1 + 1e-9)]


@dataclass(frozen=True, slots=True)
class Counting:
    """Whole numbers from 0 on an axis where each doubling has the same length: ``log(1 + value)``."""

    high: float
    start: float
    stop: float

    def __call__(self, value: float) -> float:
        """The place of a value."""
        share = math.log1p(min(max(value, 0.0), self.high)) / math.log1p(max(self.high, 1.0))
        return self.start + share * (self.stop - self.start)

    def ticks(self) -> list[float]:
        """Values 0, 1, 3, 10, 30, 100 and so on."""
        values = [0.0, *(digit * 10.0**power for power in range(10) for digit in (1, 3))]
        return [value for value in values if value <= max(self.high, 1.0)]


def label(value: float) -> str:
    """A tick in words: 0.001, 25, 10⁻⁶."""
    if value and abs(value) < 1e-3:
        mantissa, exponent = f"{value:.0e}".split("e")
        power = "10" + str(int(exponent)).translate(_SUPERSCRIPTS)
        return power if mantissa == "1" else f"{mantissa}·{power}"
    return f"{value:,.10g}" if abs(value) >= 1000 else f"{value:.3g}"


def _round_step(least: float) -> float:
    power = 10.0 ** math.floor(math.log10(least))
    return next(digit * power for digit in (1, 2, 5, 10) if digit * power >= least * (1 - 1e-9))
