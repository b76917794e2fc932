"""Whether a run of first positions is unlike the earlier ones by more than they are unlike each other.

Each run has asked one model the same G contexts, each some times; what is compared is the mean log-probability of every
listed token. One earlier run cannot tell a change of the model from a day on which its service was otherwise, so that
several are needed, and two questions must both say that today is another:

- Is it so context by context? Within each context whole runs are exchanged [1]_: what is noise of a day in one context
  alone does not add up over many.
- Is today beyond what the earlier runs let expect of one more, whatever all contexts of a day have in common? The limit
  is a prediction limit [2]_ for a distance with any part that all days have and the square of one normal number for
  each day: as if all noise of a day were one movement of all contexts together. That is the most skewed of all sums of
  squares; what varies in more ways varies less, so that the limit errs to the side of silence.

References
----------
.. [1] Good, Permutation, Parametric and Bootstrap Tests of Hypotheses, 3rd ed., 2005, ch. 3.
.. [2] Hahn and Meeker, Statistical Intervals, 1991, chapter 4.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from kl.statistics.intervals import MIN_CLUSTERS, FloatArray

FEWEST_EARLIER = 5
_DRAWS, _SIMULATED = 9_999, 100_000
_NOTHING = 1e-12  # nats: float32 log-probabilities resolve no less
_ROUNDING = 1e-9  # sums of the same numbers in another order


@dataclass(frozen=True, slots=True)
class CanaryTest:
    """What the test found.

    ``distance`` is how far today is from the mean of the earlier runs, ``limit`` what one more run like these stays
    below at ``level``, both in nats per context; of ``distance``, ``noise`` is what an unchanged model has on average.
    ``p_value`` is of the exchange within contexts.
    """

    distance: float
    noise: float
    limit: float
    p_value: float
    level: float
    n_contexts: int
    n_earlier: int

    @property
    def change(self) -> float:
        """What of the distance is no noise, nats per context; below 0 by chance."""
        return self.distance - self.noise

    def changed(self, threshold: float = 0.0) -> bool:
        """Whether both questions say so, and the change is above ``threshold`` nats per context."""
        return self.p_value <= 1 - self.level and self.distance > self.limit and self.change > threshold


def canary_test(logprobs: FloatArray, level: float = 0.99, draws: int = _DRAWS, seed: int = 0) -> CanaryTest:
    """Whether the last run differs from the earlier ones; of unchanged models it says so in at most 1 - ``level``.

    That holds for noise of a day that is as large on one day as on another, be it that of a context alone or common to
    all; `benchmarks/canary.py` has the rates. A service that is in one of two states, one of them on few days, is
    beyond this: there only a threshold helps.

    Parameters
    ----------
    logprobs : array, shape (R, G, K)
        Mean log-probability of each token that any run lists, of R runs (today last), G contexts and K tokens; NaN
        in all runs where a context has fewer tokens.
    level : float
        Above 0.5 and below 1.
    draws : int
        Random exchanges; the p-value is a multiple of ``1/(draws + 1)``.
    seed : int
        Of the exchanges.

    Raises
    ------
    ValueError
        With fewer than 6 runs or 5 contexts.
    """
    n_runs, n_contexts = logprobs.shape[:2]
    n_earlier = n_runs - 1
    if n_earlier < FEWEST_EARLIER or n_contexts < MIN_CLUSTERS:
        raise ValueError(
            f"{n_earlier} earlier runs with {n_contexts} contexts; at least {FEWEST_EARLIER} and {MIN_CLUSTERS} are "
            "needed."
        )
    weights = np.nan_to_num(np.exp(logprobs).mean(axis=0))
    values = np.nan_to_num(logprobs)
    everyone = _distances(values, weights)
    today = float(everyone[-1].mean())
    earlier = _unit(_distances(values[:-1], weights).mean(axis=1), n_earlier - 1)
    noise, spread = float(earlier.mean()), float(earlier.std(ddof=1))
    apart = 1 + 1 / n_earlier
    return CanaryTest(
        distance=today,
        noise=noise * apart,
        limit=max((noise + _factor(n_earlier, level) * spread) * apart, _NOTHING),
        p_value=_exchanged(everyone, draws, np.random.default_rng(seed)),
        level=level,
        n_contexts=n_contexts,
        n_earlier=n_earlier,
    )


def _distances(values: FloatArray, weights: FloatArray) -> FloatArray:
    """Half the squared distance of each run from the mean of the others, shape (R, G): nats, near their KL."""
    n_runs = len(values)
    away = (values - values.mean(axis=0)) * (n_runs / (n_runs - 1))
    return 0.5 * np.einsum("rgk,gk->rg", away**2, weights)


def _unit(distances: FloatArray, n_others: int) -> FloatArray:
    """Distances from a mean of few others as they were from one of very many."""
    return distances * (n_others / (n_others + 1))


@lru_cache
def _factor(n_earlier: int, level: float) -> float:
    """How many standard deviations of the earlier distances above their mean the limit is.

    A quantile of one more where each is the square of a normal number, whatever their scale and shift; by simulation,
    as it has no formula. One more is above it in half of 1 - level: the other half is for noise with longer tails.
    """
    one = np.random.default_rng(0).standard_normal((_SIMULATED, n_earlier + 1))
    earlier = one[:, :-1] - one[:, :-1].mean(axis=1, keepdims=True)
    squares = earlier**2 * (n_earlier / (n_earlier - 1))
    today = (one[:, -1] - one[:, :-1].mean(axis=1)) ** 2 * (n_earlier / (n_earlier + 1))
    return float(np.quantile((today - squares.mean(axis=1)) / squares.std(axis=1, ddof=1), (1 + level) / 2))


def _exchanged(distances: FloatArray, draws: int, rng: np.random.Generator) -> float:
    """How often the distances of runs drawn in each context add up to those of the last one."""
    n_runs = len(distances)
    found = float(distances[-1].sum()) * (1 - _ROUNDING)
    sums = np.zeros(draws)
    for of_context in distances.T:
        sums += of_context[rng.integers(n_runs, size=draws)]
    return (1 + int((sums >= found).sum())) / (draws + 1)
