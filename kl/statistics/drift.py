"""Has the KL per token risen between two runs? The interval of their difference, clustered by prompt.

Works from the response tables of the two runs (`kl.tables.responses.RESPONSES`), which may be over the same responses
of P, over fresh responses to the same prompts, or over other prompts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray
from scipy.special import stdtrit

from kl.statistics.intervals import MIN_CLUSTERS, FloatArray

BoolArray = NDArray[np.bool_]
DriftDecision = Literal["drift", "no drift", "undecided"]
Direction = Literal["up", "down", "none"]

# What is read of a response table.
COLUMNS = ("prompt_id", "n_positions", "n_selected", "n_estimated", "n_infinite", "kl_sum", "kl_mean_per_token")
# Sums over the same numbers in another order differ by less than this part of them: rounding, not a difference.
_ROUNDING = 1e-12


@dataclass(frozen=True, slots=True)
class Change:
    """KL per token of a run less that of its reference, in nats, with a two-sided t interval at ``level``.

    Without a reference ``value`` is the KL per token itself. ``run`` and ``reference`` are the two means. ``n_shared``
    prompts are in both runs, the others in one. What is not known is ``None``, and ``no_interval`` says why.
    """

    run: float | None
    reference: float | None
    value: float | None
    se: float | None
    low: float | None
    high: float | None
    level: float
    degrees_of_freedom: float | None
    n_shared: int
    n_only_run: int
    n_only_reference: int
    no_interval: str | None

    def decide(self, threshold: float) -> DriftDecision:
        """``drift`` if the whole interval lies above ``threshold`` nats, ``undecided`` without an interval."""
        if self.low is None:
            return "undecided"
        return "drift" if self.low > threshold else "no drift"

    @property
    def direction(self) -> Direction:
        """Which side of 0 the whole interval lies on; ``none`` if it holds 0 or there is no interval."""
        if self.low is None or self.high is None or self.low <= 0 <= self.high:
            return "none"
        return "up" if self.low > 0 else "down"


def change(
    run: pl.DataFrame,
    reference: pl.DataFrame | None,
    level: float,
    names: tuple[str, str] = ("this run", "the reference"),
) -> Change:
    """The change of the KL per token from one run to another, with its interval.

    ``θ = ΣN/ΣD`` in each run, with the linearised residual ``e = (N - θD)/ΣD`` of each prompt, scaled by
    ``sqrt(G/(G-1))`` [1]_. The variance of ``θ_run - θ_reference`` is ``Σ (e_run - e_ref)²`` over the prompts in both
    runs (so that what is common to both cancels), plus ``Σ e²`` over those in one run only. Each of these three sums
    has one degree of freedom less than prompts; they are joined as by Welch and Satterthwaite [2]_. With the same
    prompts in both runs this is the paired t interval, with no common prompt it is Welch's. Without a reference it is
    the clustered interval of the mean. Consistent; the ratio has a bias of order 1/G.

    Parameters
    ----------
    run, reference : pl.DataFrame
        Response tables (`kl.tables.responses.RESPONSES`).
    level : float
        Two-sided confidence of the interval, such as 0.99.
    names : tuple of str
        What the two are called where there is no interval.

    Returns
    -------
    Change
        Without an interval if a run has fewer than 5 prompts or no finite estimate.

    Raises
    ------
    ValueError
        If ``level`` is not between 0 and 1, or a table holds a sum that is not finite.

    References
    ----------
    .. [1] Cochran (1977), *Sampling Techniques*, 3rd ed., sections 6.3 and 9A.
    .. [2] Satterthwaite (1946), "An approximate distribution of estimates of variance components", Biometrics 2(6).
    """
    if not 0 < level < 1:
        raise ValueError(f"level is {level}; it lies between 0 and 1.")
    totals = prompt_totals(run)
    others = totals.clear() if reference is None else prompt_totals(reference)
    pairs = totals.join(others, on="prompt_id", how="full", coalesce=True, suffix="_reference").sort("prompt_id")
    why = _obstacle(names[0], run, totals)
    if why is None and reference is not None:
        why = _obstacle(names[1], reference, others)
    return _interval(_Pairs.of(pairs), level, why, alone=reference is None)


def prompt_totals(responses: pl.DataFrame) -> pl.DataFrame:
    """Sum of the KL (``above``, nats) and of the positions it speaks of (``below``) of each prompt, by prompt id.

    Σ above / Σ below is the KL per token of `kl.statistics.summary`. Responses without an estimate take no part. If the
    KL is infinite somewhere there is no row at all, as the mean is infinite too.

    Raises
    ------
    ValueError
        If a sum is not finite, or no denominator fits it.
    """
    complete = pl.col("n_estimated") == pl.col("n_selected")
    part = pl.col("n_estimated") * pl.col("n_positions") / pl.col("n_selected")
    # Sums are over what was sampled and estimated, scaled up to `below` positions (`kl.tables.totals.denominator`).
    below = (
        pl.when(complete)
        .then(pl.col("n_positions").cast(pl.Float64))
        .when(pl.col("kl_sum") == 0)
        .then(part)
        .otherwise(pl.col("kl_sum") / pl.col("kl_mean_per_token"))
    )
    left_out = (pl.col("n_selected") == 0) & (pl.col("n_positions") > 0)
    rows = responses.with_columns(above=pl.when(left_out).then(0.0).otherwise("kl_sum"), below=below)
    known = rows.filter(pl.col("above").is_not_null() & (pl.col("below") > 0))
    if not known.select(pl.col("above", "below").is_finite().all()).select(pl.all_horizontal(pl.all())).item():
        raise ValueError("the response table holds a sum that is not finite.")
    if responses["n_infinite"].sum():
        known = known.clear()
    return known.group_by("prompt_id").agg(pl.col("above", "below").sum()).sort("prompt_id")


def _obstacle(name: str, responses: pl.DataFrame, totals: pl.DataFrame) -> str | None:
    infinite = int(responses["n_infinite"].sum())
    if infinite:
        return f"the KL of {name} is infinite, at {infinite:,} positions"
    if totals.height == 0:
        return f"{name} has no position with an estimate"
    if totals.height < MIN_CLUSTERS:
        return f"{name} has {totals.height} prompts, at least {MIN_CLUSTERS} are needed"
    return None


class _Pairs(NamedTuple):
    """Prompts of two runs: each run's mean and scaled residuals (0 where it lacks the prompt), and who has which."""

    mean: float | None
    mean_reference: float | None
    residuals: FloatArray
    residuals_reference: FloatArray
    shared: BoolArray
    only_run: BoolArray
    only_reference: BoolArray

    @classmethod
    def of(cls, pairs: pl.DataFrame) -> _Pairs:
        mean, residuals = _linearise(pairs["above"], pairs["below"])
        mean_reference, residuals_reference = _linearise(pairs["above_reference"], pairs["below_reference"])
        run = pairs["above"].is_not_null().to_numpy()
        reference = pairs["above_reference"].is_not_null().to_numpy()
        groups = (run & reference, run & ~reference, ~run & reference)
        return cls(mean, mean_reference, residuals, residuals_reference, *groups)


def _interval(pairs: _Pairs, level: float, why: str | None, *, alone: bool) -> Change:
    value = se = low = high = df = None
    base = 0.0 if alone else pairs.mean_reference
    if pairs.mean is not None and base is not None:
        rounding = _ROUNDING * (abs(pairs.mean) + abs(base))
        value = _without_rounding(pairs.mean - base, rounding)
        if why is None:
            se, df = _spread(pairs)
            se = _without_rounding(se, rounding)
            half = float(stdtrit(df, (1 + level) / 2)) * se
            low, high = value - half, value + half
    return Change(
        run=pairs.mean,
        reference=pairs.mean_reference,
        value=value,
        se=se,
        low=low,
        high=high,
        level=level,
        degrees_of_freedom=df,
        n_shared=int(pairs.shared.sum()),
        n_only_run=int(pairs.only_run.sum()),
        n_only_reference=int(pairs.only_reference.sum()),
        no_interval=why,
    )


def _without_rounding(value: float, rounding: float) -> float:
    return 0.0 if abs(value) <= rounding else value


def _linearise(above: pl.Series, below: pl.Series) -> tuple[float | None, FloatArray]:
    present = above.is_not_null().to_numpy()
    numerators, denominators = (values.fill_null(0.0).to_numpy() for values in (above, below))
    n, total = int(present.sum()), float(denominators.sum())
    if n == 0:
        return None, np.zeros(len(above))
    mean = float(numerators.sum()) / total
    scale = math.sqrt(n / (n - 1)) if n > 1 else 1.0
    return mean, scale * (numerators - mean * denominators) / total


def _spread(pairs: _Pairs) -> tuple[float, float]:
    """Standard error of the difference, and its degrees of freedom."""
    squares = (pairs.residuals - pairs.residuals_reference) ** 2
    groups = [squares[group] for group in (pairs.shared, pairs.only_run, pairs.only_reference)]
    sums = [float(group.sum()) for group in groups]
    variance = sum(sums)
    if variance == 0:
        return 0.0, float(max(len(group) for group in groups))
    shares = [(total / variance) ** 2 / max(len(group) - 1, 1) for total, group in zip(sums, groups, strict=True)]
    return math.sqrt(variance), 1.0 / sum(shares)
