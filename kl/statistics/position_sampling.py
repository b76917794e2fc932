"""Measuring a random subset of a response's positions, and what that costs in precision.

The positions are sorted by P's entropy and every ``T/m``-th is taken from a random start: a systematic sample of fixed
size, which spreads over peaked and flat positions alike. Each position has the same inclusion probability ``m/T``, so
that ``Σ v/π`` over the sample is an unbiased estimate of the sum over all positions [1]_.

References
----------
.. [1] Horvitz & Thompson (1952), "A generalization of sampling without replacement from a finite universe".
.. [2] Madow & Madow (1944), "On the theory of systematic sampling".
.. [3] Kish (1965), *Survey Sampling*, section 5.4: the design effect ``1 + (m - 1) ρ``.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import entr, stdtrit

from kl.columns import Positions
from kl.estimators.matching.trust import listed_columns
from kl.records import Response
from kl.statistics.intervals import CONFIDENCE, MIN_CLUSTERS, Estimate

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]

# Entropies that differ by less count as equal, so that the last bit of a platform's exp and log draws no other sample.
_ENTROPY_DECIMALS = 9


@dataclass(frozen=True, slots=True)
class PositionSample:
    """How many positions of a response are measured: a fraction of them, or a fixed number.

    Attributes
    ----------
    fraction : float, optional
        In (0, 1]; of a response with T positions ``fraction * T`` are taken, rounded to the nearest whole number and at
        least 1. Exactly one of ``fraction`` and ``per_response`` is given.
    per_response : int, optional
        At least 1; responses that have no more positions are measured whole.
    seed : int
        Another seed draws other positions.

    Raises
    ------
    ValueError
        If neither or both sizes are given, or one is out of range.
    """

    fraction: float | None = None
    per_response: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.fraction is None) == (self.per_response is None):
            given = "neither" if self.fraction is None else "both"
            raise ValueError(f"a sample of positions takes a fraction or a number per_response; {given} is given.")
        if self.fraction is not None and not 0 < self.fraction <= 1:
            raise ValueError(f"fraction is {self.fraction}; it must be above 0 and at most 1.")
        if self.per_response is not None and self.per_response < 1:
            raise ValueError(f"per_response is {self.per_response}; it must be at least 1.")

    def size(self, n_positions: int) -> int:
        """How many of ``n_positions`` are taken; 0 only of 0."""
        if self.per_response is not None:
            return min(self.per_response, n_positions)
        assert self.fraction is not None
        return min(max(math.floor(self.fraction * n_positions + 0.5), 1), n_positions)


class Drawn(NamedTuple):
    """Which positions are measured, bool, shape (T,), and the inclusion probability of each, float64, shape (T,)."""

    selected: BoolArray
    pi: FloatArray


def draw(response: Response, sample: PositionSample) -> Drawn:
    """The positions of a response that are measured.

    They depend on the seed, the prompt, the response's text and P's lists, and on nothing else: not on file names, on
    the order of responses or on how they are grouped. A sample of all positions has π exactly 1, so that it gives what
    no sampling gives, bit for bit. Time grows with the listed tokens, and T log T for the sorting.

    The stop is always measured: it is one position that each response has, and the draw of the others is the same
    whether a source gives it or not.
    """
    n = len(response.positions) - response.has_stop
    m = sample.size(n)
    selected, pi = np.ones(len(response.positions), dtype=np.bool_), np.ones(len(response.positions))
    if m < n:
        order = np.argsort(listed_entropy(response)[:n].round(_ENTROPY_DECIMALS), kind="stable")  # equals by position
        drawn = order[systematic_ranks(n, m, _start(response, sample.seed, n))]
        selected[:n] = np.isin(np.arange(n), drawn)
        pi[:n] = m / n
    return Drawn(selected, pi)


def draw_again(response: Response, sample: PositionSample, among: Drawn | None = None) -> Drawn:
    """The positions that are asked a second time, drawn as `draw` does from those that are measured.

    The two draws are independent, so that the probability of a position is the product of both. Every response that
    has a measured position has one of these.

    Parameters
    ----------
    among : Drawn, optional
        The positions that are measured; default all.
    """
    n = len(response.positions)
    measured = Drawn(np.ones(n, dtype=np.bool_), np.ones(n)) if among is None else among
    frame = np.flatnonzero(measured.selected)
    m = sample.size(len(frame))
    if m == len(frame):
        return measured
    order = np.argsort(listed_entropy(response)[frame].round(_ENTROPY_DECIMALS), kind="stable")
    selected = np.zeros(n, dtype=np.bool_)
    ranks = systematic_ranks(len(frame), m, _start(response, sample.seed, len(frame), "again"))
    selected[frame[order[ranks]]] = True
    return Drawn(selected, measured.pi * (m / len(frame)))


def systematic_ranks(n: int, m: int, start: int) -> NDArray[np.int64]:
    """``m`` of the ranks 0 … n-1 at distances of ``n/m``: rank ``⌊(start + j n)/m⌋`` for j = 0 … m-1, rising.

    Parameters
    ----------
    n, m : int
        ``1 <= m <= n``; ``n/m`` need not be whole.
    start : int
        0 … n-1. Over these n starts every rank is taken exactly m times, so that a uniform start gives each rank the
        inclusion probability ``m/n`` without rounding: rank i is taken where the m whole numbers from ``i m`` on hold
        one that leaves ``start`` when divided by n, and they leave m different remainders.
    """
    return (start + np.arange(m, dtype=np.int64) * n) // m


def listed_entropy(response: Response) -> FloatArray:
    """P's entropy at each position, of the listed tokens with all others as one, nats, shape (T,); 0 without a list."""
    tops = Positions.of(response.positions).tops
    usable = listed_columns(tops)
    logs = np.full((len(tops), int(tops.lengths.max(initial=0))), -np.inf)
    logs[np.arange(logs.shape[1]) < usable.lengths[:, None]] = usable.entries.logprobs
    probs = np.exp(logs)
    rest = np.maximum(1.0 - probs.sum(axis=1), 0.0)
    return entr(probs).sum(axis=1) + entr(rest)


def _start(response: Response, seed: int, n: int, *purpose: str) -> int:
    """A uniform number from 0 to n-1, another for each purpose.

    The hash is itself the random number, because NumPy's streams may change between versions, and another sample would
    have to be bought anew. The remainder of 256 bits is uniform up to n/2**256.
    """
    parts = [seed, response.prompt.prompt_id, response.text, *purpose]
    named = json.dumps(parts, ensure_ascii=False, separators=(",", ":"))
    digest = hashlib.sha256(named.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest, "big") % n


@dataclass(frozen=True, slots=True)
class Variation:
    """How token KL varies over positions.

    Attributes
    ----------
    cv_token : float
        Standard deviation divided by mean.
    icc : float
        Correlation of two positions of one prompt, at least 0.
    assumed : bool
        Whether the values were not measured on the data at hand.
    """

    cv_token: float
    icc: float
    assumed: bool = False


# Measured on a model of 135M parameters against itself with fewer bits a weight and with another system prompt: CV 0.6
# to 3.2, correlation .03 to .13 (benchmarks/estimator_table.py, docs/estimators.md).
ASSUMED = Variation(cv_token=1.6, icc=0.05, assumed=True)


def variation_of_pilot(per_token: Estimate) -> Variation | None:
    """How token KL varies in a finished run, from its mean KL per token.

    With n positions in G prompts, ``ρ = (deff - 1)/(n/G - 1)`` and ``CV = sqrt(n SE²/deff)/mean``: the design effect
    and the standard error solved for the two. ``None`` where the run is too small for an interval, or all its KL equal.
    """
    if per_token.ci_low is None or not per_token.value or not per_token.se or not per_token.design_effect:
        return None
    per_prompt = per_token.n / per_token.n_clusters
    if per_prompt <= 1:
        return None
    icc = (per_token.design_effect - 1.0) / (per_prompt - 1.0)
    independent = per_token.n * per_token.se**2 / per_token.design_effect
    return Variation(math.sqrt(independent) / per_token.value, min(max(icc, 0.0), 1.0))


def expected_half_width(n_prompts: int, positions_per_prompt: float, variation: Variation = ASSUMED) -> float | None:
    """Half the width of the 95 % interval that a run will have, divided by its mean KL per token.

    ``t(.975, G-1) · CV · sqrt((1 + (m - 1) ρ)/(m G))`` for G prompts with m measured positions each [3]_. Sampling
    without replacement adds ``(1 - m/T)`` of the variance within a prompt to that of the prompts, which together is the
    same as m of infinitely many positions. What sorting by entropy saves (5 to 20 % of the variance of sampling) is
    left out; so are prompts of unequal length, which cost some. Against measured widths with T = 48 and ρ = .04: a
    fraction of .3, .2, .1 gives 1.3, 1.5 and 2.0 times the width of all positions.

    Parameters
    ----------
    n_prompts : int
        Distinct prompts.
    positions_per_prompt : float
        Measured positions of all responses to a prompt, on average; at least 1.

    Returns
    -------
    float or None
        ``None`` below 5 prompts, which have no interval.
    """
    if n_prompts < MIN_CLUSTERS:
        return None
    if positions_per_prompt < 1:
        raise ValueError(f"positions_per_prompt is {positions_per_prompt}; each prompt has at least 1.")
    effect = 1.0 + (positions_per_prompt - 1.0) * variation.icc
    variance = variation.cv_token**2 * effect / (positions_per_prompt * n_prompts)
    return float(stdtrit(n_prompts - 1, (1 + CONFIDENCE) / 2)) * math.sqrt(variance)


def expected_width_text(n_prompts: int, n_selected: int, pilot: Variation | None = None) -> str:
    """What a dry run says of the precision to expect, with where the figure comes from.

    Parameters
    ----------
    n_prompts, n_selected : int
        Distinct prompts, and positions that will be measured, of all of them.
    pilot : Variation, optional
        From `variation_of_pilot`; without it the documented values stand in, and the text says so.
    """
    if n_prompts < MIN_CLUSTERS:
        return f"none: an interval needs at least {MIN_CLUSTERS} prompts, these are {n_prompts}"
    variation = pilot or ASSUMED
    per_prompt = n_selected / n_prompts
    half = expected_half_width(n_prompts, max(per_prompt, 1.0), variation)
    assert half is not None
    source = (
        "assumed, as there is no pilot; on small models they were 0.6 to 3.2 and 0.03 to 0.13"
        if variation.assumed
        else "from the pilot"
    )
    return (
        f"about ±{100 * half:.0f} % of the KL per token ({n_prompts:,} prompts with {per_prompt:,.0f} positions each; "
        f"CV of token KL {variation.cv_token:.2g}, correlation within a prompt {variation.icc:.2g}: {source})"
    )
