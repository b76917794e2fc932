"""Which positions of a response have two lists to compare, and why the others have not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from kl.estimators.align import Aligned, BoolArray, FloatArray, align, with_hidden
from kl.estimators.censored import SpreadPrior
from kl.estimators.divergence import MIN_LISTED, measure
from kl.estimators.list_checks import Trusted, common_floors, truncated, trusted, without_contradicted
from kl.estimators.outliers import Outlier, find_outliers
from kl.estimators.token_keys import Candidates, listed, logprob_of
from kl.records import LARGEST_MASS, Candidate, Response, Score, ScoreFailure

LONE_VALUE = "lone-value"  # the flag of a position where one token is far off all others, and may be right

Scores = Sequence[Score | ScoreFailure | None]


class Missing(NamedTuple):
    """Why a position is not measured, or has no estimate: a short code and one line.

    ``kl`` is what the position would have counted, nats, where it was set aside.
    """

    reason: str
    error: str
    kl: float | None = None


class Pair(NamedTuple):
    """One position with a usable list on both sides.

    ``n_dropped`` entries of Q's were not probabilities. ``flags`` are codes of what to know of the lists.
    """

    position: int
    p: Trusted
    q: Trusted
    n_dropped: int
    sampled_p: Candidate
    sampled_q: Candidate | None
    is_stop: bool = False
    flags: frozenset[str] = frozenset()


class Paired(NamedTuple):
    """The positions of a response that can be measured, their matched lists (``None`` of none), and the other ones."""

    pairs: list[Pair]
    aligned: Aligned | None
    missing: dict[int, Missing]


class _List(NamedTuple):
    """One list with what was left out of it before, and whether it is of a truncated law."""

    found: Trusted
    n_entries: int
    n_listed: int
    n_dropped: int
    is_truncated: bool = False


def pair_up(response: Response, scores: Scores, drawn: BoolArray) -> Paired:
    """Match the lists of P and Q at the positions that were drawn."""
    check_lengths(response, scores=len(scores))
    side_p = _lists([None if p.defect is not None else (p.top, p.n_dropped) for p in response.positions])
    side_q = _lists([(score.top, score.n_dropped) if isinstance(score, Score) else None for score in scores])
    found: dict[int, Pair | Missing] = {}
    for t in np.flatnonzero(drawn).tolist():
        list_p, list_q, score, defect = side_p[t], side_q[t], scores[t], response.positions[t].defect
        if defect is not None:
            found[t] = Missing(*defect)
        elif list_p is None or list_q is None or not isinstance(score, Score):
            found[t] = _not_scored(score)
        else:
            found[t] = _refused(list_p, list_q) or _pair(t, list_p, list_q, response, score)
    pairs = [item for item in found.values() if isinstance(item, Pair)]
    return Paired(pairs, _aligned(pairs), {t: item for t, item in found.items() if isinstance(item, Missing)})


def check_lengths(response: Response, **lengths: int) -> None:
    """Refuse anything that has not one entry per position of the response."""
    for name, length in lengths.items():
        if length != len(response.positions):
            raise ValueError(
                f"{response.name} has {len(response.positions)} positions, {name} has {length}; give one for each."
            )


def _lists(tops: Sequence[tuple[Candidates, int] | None]) -> list[_List | None]:
    """The lists of one side, each in the light of the others."""
    usable = [None if top is None else listed(top[0]) for top in tops]
    floors = common_floors([part.candidates for part in usable if part is not None])
    found: list[_List | None] = []
    for top, part in zip(tops, usable, strict=True):
        if top is None or part is None:
            found.append(None)
            continue
        n_dropped = top[1] + part.n_dropped
        found.append(
            _List(trusted(part.candidates, n_dropped, floors), len(top[0]) + top[1], len(part.candidates), n_dropped)
        )
    cut = truncated([None if item is None else item.found for item in found])
    return [
        None if item is None else item._replace(is_truncated=is_cut) for item, is_cut in zip(found, cut, strict=True)
    ]


def _aligned(pairs: list[Pair]) -> Aligned | None:
    if not pairs:
        return None
    aligned = align(
        [pair.p.candidates for pair in pairs],
        [pair.q.candidates for pair in pairs],
        [pair.sampled_p for pair in pairs],
        [pair.sampled_q for pair in pairs],
        [pair.is_stop for pair in pairs],
    )
    return with_hidden(aligned, [pair.p for pair in pairs], [pair.q for pair in pairs])


def _not_scored(score: Score | ScoreFailure | None) -> Missing:
    if isinstance(score, ScoreFailure):
        return Missing(score.reason, score.message)
    return Missing("not-scored", "Q has not been asked about this position, or its answer is not there; run again.")


def _refused(list_p: _List, list_q: _List) -> Missing | None:
    """Why two lists cannot be compared, if they cannot."""
    reasons = (_problem("P", list_p, *_ADVICE_P), _problem("Q", list_q, *_ADVICE_Q))
    return next((reason for reason in reasons if reason is not None), None)


_ADVICE_P = ("Sample the responses again with logprobs.", "Check the response file.")
_ADVICE_Q = ("Score the position again.", "Check the backend's settings.")


def _problem(side: str, item: _List, again: str, check: str) -> Missing | None:
    code = side.lower()
    if not item.n_listed:
        what = f"{side}'s list has no usable log-probability ({item.n_entries} entries)"
        return Missing(f"empty-list-{code}", f"{what}. {again}")
    if item.found.mass > LARGEST_MASS:
        what = f"{side}'s listed probabilities add up to {item.found.mass:.4f}; they are not one distribution"
        return Missing(f"mass-above-1-{code}", f"{what}. {check}")
    if item.found.is_degenerate:
        what = f"{side}'s list gives one token everything and the other {item.n_entries - 1} a mark or one floor"
        return Missing(f"degenerate-{code}", f"{what}; it is not a distribution. {check}")
    return None


def _pair(t: int, list_p: _List, list_q: _List, response: Response, score: Score) -> Pair:
    sampled = _above(response.positions[t].sampled, list_p.found.floor)
    flags = {
        "clipped-p": list_p.found.n_clipped,
        "clipped-q": list_q.found.n_clipped,
        "truncated-p": list_p.is_truncated,
        "truncated-q": list_q.is_truncated,
    }
    named = frozenset(code for code, is_so in flags.items() if is_so)
    n_dropped = list_q.n_dropped + list_q.found.n_clipped
    is_stop = response.has_stop and t == len(response.positions) - 1
    found_p = list_p.found.unlimited() if response.positions[t].may_lack else list_p.found
    return Pair(t, found_p, list_q.found, n_dropped, sampled, score.sampled, is_stop, named)


def _above(sampled: Candidate, floor: float | None) -> Candidate:
    """The sampled token, without a value that is no probability."""
    is_none = floor is not None and sampled.logprob is not None and sampled.logprob <= floor
    return sampled._replace(logprob=None) if is_none else sampled


def _without_contradicted(pair: Pair) -> Pair:
    p, q = without_contradicted(pair.p), without_contradicted(pair.q)
    clipped = {code for code, is_so in (("clipped-p", p is not pair.p), ("clipped-q", q is not pair.q)) if is_so}
    n_dropped = pair.n_dropped + q.n_clipped - pair.q.n_clipped
    return pair._replace(
        p=p, q=q, n_dropped=n_dropped, sampled_p=_above(pair.sampled_p, p.floor), flags=pair.flags | clipped
    )


def without_outliers(paired: Paired, prior: SpreadPrior | None) -> Paired:
    """The same without the positions whose own lists contradict a value; doubtful ones stay, with a flag.

    A value in the others that leaves more over than any vocabulary has is taken out: it is no cap.
    """
    if paired.aligned is None:
        return paired
    found = {item.row: item for item in find_outliers(paired.aligned, prior)}
    wrong = [row for row, item in found.items() if item.certain]
    flagged = [
        pair._replace(flags=pair.flags | {LONE_VALUE}) if row in found else pair
        for row, pair in enumerate(paired.pairs)
    ]
    clipped = [pair if row in wrong else _without_contradicted(pair) for row, pair in enumerate(flagged)]
    aligned = paired.aligned if clipped == flagged else _aligned(clipped)
    pairs = [pair for row, pair in enumerate(clipped) if row not in wrong]
    if not wrong or aligned is None:
        return Paired(pairs, aligned, paired.missing)
    counted = measure(paired.aligned.only(wrong), prior)
    kl = np.where(np.isnan(counted.censored.kl), counted.lower.kl, counted.censored.kl).tolist()
    missing = {
        paired.pairs[row].position: Missing("outlier", _contradiction(paired.pairs[row], found[row], value), value)
        for row, value in zip(wrong, kl, strict=True)
    }
    kept = [row for row in range(len(paired.pairs)) if row not in wrong]
    return Paired(pairs, aligned.only(kept) if kept else None, paired.missing | missing)


def _contradiction(pair: Pair, outlier: Outlier, kl: float) -> str:
    logp, logq = outlier.logp, outlier.logq
    top, value = (pair.q.candidates, logq) if math.isnan(logp) else (pair.p.candidates, logp)
    token = min(top, key=lambda candidate: abs(logprob_of(candidate) - value)).token
    values = f"P {_shown(logp)}, Q {_shown(logq)}"
    if outlier.side is None:
        what = (
            f"a log-probability of {token!r} is wrong ({values}): the other tokens agree within {outlier.spread:.2g} "
            "nats and have not taken or given what it would have lost or gained"
        )
    else:
        what = (
            f"{outlier.side}'s log-probability of {token!r} is wrong ({values}): the k best tokens have none so far "
            "below the others while that much probability is left to smaller ones"
        )
    return f"{what}. The position is set aside; it would have counted {kl:.3g} nats. Ask for the list again."


def _shown(logprob: float) -> str:
    return "does not list it" if math.isnan(logprob) else f"{logprob:.4g}"


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
