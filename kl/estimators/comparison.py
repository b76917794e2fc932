"""Two sets of top-k lists in, what they say of the divergence at every position out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from kl.estimators.align import Aligned, BoolArray, FloatArray, IntArray, align, with_hidden
from kl.estimators.censored import SpreadPrior, pooled_prior
from kl.estimators.divergence import measure
from kl.estimators.list_checks import (
    Trusted,
    check_lengths,
    check_lists,
    part_appended,
    trusted_lists,
    with_lists,
    without_contradicted,
)
from kl.estimators.outliers import Outlier, find_outliers, spread_evidence
from kl.estimators.token_keys import Candidates
from kl.records import Candidate


@dataclass(frozen=True, slots=True)
class PositionDivergences:
    """What the lists of P and Q say of T positions; arrays of shape (T,), named as the columns of `tokens.parquet`.

    Divergences are float64 in nats, and NaN where the lists do not determine one.

    Attributes
    ----------
    kl_estimate : KL(P‖Q) by the ``censored`` estimator; needs 5 listed tokens of each side
    kl_lower : certified, no completion of the two lists has a smaller KL
    kl_upper_plausible : a limit under the model of the estimate and no certificate; needs 3 shared tokens
    kl_floor, kl_bucket : by these estimators, for comparison; ``kl_floor`` can be negative
    reverse_kl_estimate, reverse_kl_lower : KL(Q‖P)
    js_estimate, js_lower : Jensen-Shannon divergence, at most log 2
    tv_lower : certified lower bound of the total variation distance, in probability
    coverage_p, coverage_q : float64, listed probability as the lists give it
    mass_above_1_p, mass_above_1_q : bool
        Whether it is above 1 by more than the noise of float32. The list was scaled to 1 then, and bounds say as much
        less as it was too high.
    overlap : int64, tokens that both sides list
    appended_p, appended_q : bool
        Whether the last entry of the list was left out, as it may be a sampled token beside the k best.
    outliers : tuple of Outlier
        Values far off all others of their position. Where one is ``certain``, as its own lists contradict it, the
        position has no divergence; any other may be real and counts.
    prior : SpreadPrior or None
        What the estimates were drawn to.
    aligned : Aligned
        The matched lists, for `sampled_token`, `diagnose` and whatever else is wanted.
    """

    kl_estimate: FloatArray
    kl_lower: FloatArray
    kl_upper_plausible: FloatArray
    kl_floor: FloatArray
    kl_bucket: FloatArray
    reverse_kl_estimate: FloatArray
    reverse_kl_lower: FloatArray
    js_estimate: FloatArray
    js_lower: FloatArray
    tv_lower: FloatArray
    coverage_p: FloatArray
    coverage_q: FloatArray
    mass_above_1_p: BoolArray
    mass_above_1_q: BoolArray
    overlap: IntArray
    appended_p: BoolArray
    appended_q: BoolArray
    outliers: tuple[Outlier, ...]
    prior: SpreadPrior | None
    aligned: Aligned


def compare(
    lists_p: Sequence[Candidates],
    lists_q: Sequence[Candidates],
    sampled: Sequence[Candidate | None] | None = None,
    prior: SpreadPrior | Literal["pooled"] | None = "pooled",
) -> PositionDivergences:
    """Match the lists of P and Q at T positions and estimate every divergence, each position for itself.

    Parameters
    ----------
    lists_p, lists_q : sequences of T candidate lists
        The k best of each side by falling log-probability (natural logarithms), known values only, at least one entry.
        All positions together decide what tokens are matched by.
    sampled : sequence of T candidates, optional
        The tokens that P sampled; ``None`` is not known. A list of either side that ends with its sampled token, is
        longer than any that does not, and leaves more probability over than this token has, may be a list of k with the
        token added; its last entry would be no limit for the tokens not listed. It is left out, and says of the sampled
        token alone: bounds are certified either way.
    prior : SpreadPrior, "pooled" or None
        The variance of log p/q to expect of a position: ``"pooled"`` takes it from these positions. Pass the
        `pooled_prior` of a whole data set where these are a part of it. ``None``: each position is left to itself.

    Raises
    ------
    CandidateListError
        If a list is empty, holds None, NaN or a sentinel, does not fall, adds up to more than 1.01, or gives one token
        everything and the others one floor.
    ValueError
        If there are not T of each.
    """
    tokens = [None] * len(lists_p) if sampled is None else sampled
    check_lengths(lists_p, lists_q, tokens)
    check_lists(lists_p, "P")
    check_lists(lists_q, "Q")
    known_p, known_q = trusted_lists(lists_p, "P"), trusted_lists(lists_q, "Q")
    side_p = part_appended([item.candidates for item in known_p], tokens)
    side_q = part_appended([item.candidates for item in known_q], tokens)
    sampled_p = [_known(*pair) for pair in zip(tokens, side_p.added, strict=True)]
    aligned = align(side_p.lists, side_q.lists, sampled_p, side_q.added)
    expected = pooled_prior(spread_evidence(aligned)) if prior == "pooled" else prior
    outliers = find_outliers(aligned, expected)
    wrong = [item.row for item in outliers if item.certain]
    limits_p, limits_q = _limits(known_p, side_p.lists, wrong), _limits(known_q, side_q.lists, wrong)
    if any(item.largest_hidden for item in (*limits_p, *limits_q)):
        kept_p, kept_q = [item.candidates for item in limits_p], [item.candidates for item in limits_q]
        aligned = with_hidden(align(kept_p, kept_q, sampled_p, side_q.added), _hidden(limits_p), _hidden(limits_q))
    found = measure(aligned, expected)

    def where_right(values: FloatArray) -> FloatArray:
        right = values.copy()
        right[wrong] = np.nan
        return right

    return PositionDivergences(
        kl_estimate=where_right(found.censored.kl),
        kl_lower=where_right(found.lower.kl),
        kl_upper_plausible=where_right(found.upper_plausible),
        kl_floor=where_right(found.floor.kl),
        kl_bucket=where_right(found.bucket.kl),
        reverse_kl_estimate=where_right(found.censored.reverse_kl),
        reverse_kl_lower=where_right(found.lower.reverse_kl),
        js_estimate=where_right(found.censored.js),
        js_lower=where_right(found.lower.js),
        tv_lower=where_right(found.lower.tv),
        coverage_p=aligned.coverage_p,
        coverage_q=aligned.coverage_q,
        mass_above_1_p=found.masses.above_1_p,
        mass_above_1_q=found.masses.above_1_q,
        overlap=aligned.overlap,
        appended_p=np.array([entry is not None for entry in side_p.added], dtype=np.bool_),
        appended_q=np.array([entry is not None for entry in side_q.added], dtype=np.bool_),
        outliers=outliers,
        prior=expected,
        aligned=aligned,
    )


def _limits(known: Sequence[Trusted], lists: Sequence[Candidates], wrong: Sequence[int]) -> list[Trusted]:
    """The lists whose smallest value is a limit, or that say what else is; those set aside stay as they are."""
    found = with_lists(known, lists)
    return [item if row in wrong else without_contradicted(item) for row, item in enumerate(found)]


def _hidden(limits: Sequence[Trusted]) -> FloatArray:
    return np.array([item.largest_hidden or 0.0 for item in limits])


def _known(sampled: Candidate | None, added: Candidate | None) -> Candidate | None:
    """The sampled token, with the value that P's list gave it where it has none of its own."""
    if sampled is None or added is None or sampled.logprob is not None:
        return sampled
    return sampled._replace(logprob=added.logprob)
