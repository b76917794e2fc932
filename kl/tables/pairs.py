"""Which positions of a response have two lists to compare, and why the others have not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from kl.estimators.align import Aligned, BoolArray, FloatArray, align
from kl.estimators.divergence import MIN_LISTED
from kl.estimators.list_checks import LARGEST_MASS, listed_mass
from kl.estimators.token_keys import Candidates, listed
from kl.records import Position, Response, Score, ScoreFailure

Scores = Sequence[Score | ScoreFailure | None]


class Missing(NamedTuple):
    """Why a position is not measured, or has no estimate: a short code and one line."""

    reason: str
    error: str


class Pair(NamedTuple):
    """One position with a usable list on both sides.

    ``n_dropped`` entries of Q's were not probabilities. ``flags`` are codes of what to know of the lists.
    """

    position: int
    top_p: Candidates
    top_q: Candidates
    n_dropped: int
    source: Position
    score: Score
    flags: frozenset[str] = frozenset()


class Paired(NamedTuple):
    """The positions of a response that can be measured, their matched lists (``None`` of none), and the other ones."""

    pairs: list[Pair]
    aligned: Aligned | None
    missing: dict[int, Missing]


def pair_up(response: Response, scores: Scores, drawn: BoolArray) -> Paired:
    """Match the lists of P and Q at the positions that were drawn."""
    check_lengths(response, scores=len(scores))
    found = {
        t: _pair(t, position, score)
        for t, (position, score) in enumerate(zip(response.positions, scores, strict=True))
        if drawn[t]
    }
    pairs = [item for item in found.values() if isinstance(item, Pair)]
    return Paired(pairs, _aligned(pairs), {t: item for t, item in found.items() if isinstance(item, Missing)})


def check_lengths(response: Response, **lengths: int) -> None:
    """Refuse anything that has not one entry per position of the response."""
    for name, length in lengths.items():
        if length != len(response.positions):
            raise ValueError(
                f"{response.name} has {len(response.positions)} positions, {name} has {length}; give one for each."
            )


def _aligned(pairs: list[Pair]) -> Aligned | None:
    if not pairs:
        return None
    return align(
        [pair.top_p for pair in pairs],
        [pair.top_q for pair in pairs],
        [pair.source.sampled for pair in pairs],
        [pair.score.sampled for pair in pairs],
    )


def _pair(t: int, position: Position, score: Score | ScoreFailure | None) -> Pair | Missing:
    if score is None:
        return Missing("not-scored", "Q has not been asked about this position, or its answer is not there; run again.")
    if isinstance(score, ScoreFailure):
        return Missing(score.reason, score.message)
    side_p, side_q = listed(position.top), listed(score.top)
    if not side_p.candidates:
        return Missing("empty-list-p", _empty("P", len(position.top), "Sample the responses again with logprobs."))
    if not side_q.candidates:
        return Missing("empty-list-q", _empty("Q", len(score.top), "Score the position again."))
    mass_p, mass_q = listed_mass(side_p.candidates), listed_mass(side_q.candidates)
    if max(mass_p, mass_q) > LARGEST_MASS:
        return _above_one(mass_p, mass_q)
    return Pair(t, side_p.candidates, side_q.candidates, score.n_dropped + side_q.n_dropped, position, score)


def _empty(side: str, n_entries: int, advice: str) -> str:
    return f"{side}'s list has no usable log-probability ({n_entries} entries). {advice}"


def _above_one(mass_p: float, mass_q: float) -> Missing:
    side, mass, advice = (
        ("p", mass_p, "Check the response file.")
        if mass_p > LARGEST_MASS
        else ("q", mass_q, "Check the backend's settings.")
    )
    return Missing(
        f"mass-above-1-{side}",
        f"{side.upper()}'s listed probabilities add up to {mass:.4f}; they are not one distribution. {advice}",
    )


def not_determined(pairs: list[Pair], estimates: FloatArray, exact: FloatArray, aligned: Aligned) -> dict[int, Missing]:
    """Reasons for measured positions without an estimate; their bounds hold."""
    found: dict[int, Missing] = {}
    for row in np.flatnonzero(np.isnan(estimates)):
        k_p, k_q = aligned.n_listed_p[row], aligned.n_listed_q[row]
        if math.isinf(exact[row]):
            gap = Missing("infinite", "P allows a token that Q excludes: KL is infinite. Its lower bound is given.")
        elif min(k_p, k_q) < MIN_LISTED:
            gap = Missing(
                "short-list",
                f"P lists {k_p} and Q {k_q} tokens; the estimate needs {MIN_LISTED} of each, only bounds are given. "
                f"Ask for top_logprobs of {MIN_LISTED} or more, or use the estimator 'lower'.",
            )
        else:
            gap = Missing(
                "not-determined",
                f"P and Q share {aligned.overlap[row]} listed tokens, too few for an estimate; only bounds are given.",
            )
        found[pairs[row].position] = gap
    return found
