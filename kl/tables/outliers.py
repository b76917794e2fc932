"""Positions whose own lists contradict a value are set aside; of others the estimate is not determined."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from kl.columns import BoolArray, FloatArray, IntArray
from kl.estimators.align import Aligned
from kl.estimators.censored import SpreadPrior
from kl.estimators.divergence import MIN_LISTED, measure
from kl.estimators.outliers import Outlier, find_outliers
from kl.estimators.token_keys import logprob_of
from kl.tables.pairs import LONE_VALUE, Missing, Paired, Pairs, above


def without_outliers(paired: Paired, prior: SpreadPrior | None) -> Paired:
    """The same without the positions whose own lists contradict a value; doubtful ones stay, with a flag.

    A value in the others that leaves more over than any vocabulary has is taken out: it is no cap.
    """
    if paired.aligned is None:
        return paired
    found = {item.row: item for item in find_outliers(paired.aligned, prior)}
    lone = np.zeros(len(paired.pairs), dtype=np.bool_)
    lone[[*found]] = True
    wrong = np.zeros(len(lone), dtype=np.bool_)
    wrong[[row for row, item in found.items() if item.certain]] = True
    pairs = paired.pairs.flagged(LONE_VALUE, lone)
    clipped, changed = _without_contradicted(pairs, ~wrong)
    aligned = _aligned_again(paired.aligned, clipped, changed)
    if not wrong.any():
        return paired._replace(pairs=clipped, aligned=aligned)
    at = np.flatnonzero(wrong)
    counted = measure(paired.aligned.only(at), prior)
    kl = np.where(np.isnan(counted.censored.kl), counted.lower.kl, counted.censored.kl).tolist()
    missing = {
        int(pairs.place[row]): Missing("outlier", _contradiction(paired.pairs, int(row), found[int(row)], value), value)
        for row, value in zip(at, kl, strict=True)
    }
    kept = np.flatnonzero(~wrong)
    return _with_set_aside(paired, pairs.take(at))._replace(
        pairs=clipped.take(kept), aligned=aligned.only(kept) if len(kept) else None, missing=paired.missing | missing
    )


def _with_set_aside(paired: Paired, pairs: Pairs) -> Paired:
    """The same with the lists of pairs that are measured no more among those of the others, if these are kept."""
    if paired.unpaired_p is None or paired.unpaired_q is None:
        return paired
    return paired._replace(
        unpaired_p=paired.unpaired_p.with_others(pairs.place, pairs.p.lists, None),
        unpaired_q=paired.unpaired_q.with_others(pairs.place, pairs.q.lists, pairs.wanted_q),
    )


def _without_contradicted(pairs: Pairs, judged: BoolArray) -> tuple[Pairs, BoolArray]:
    """The pairs without values that their lists contradict, and which of them have changed."""
    p, changed_p = pairs.p.without_contradicted(judged)
    q, changed_q = pairs.q.without_contradicted(judged)
    changed = changed_p | changed_q
    if not changed.any():
        return pairs, changed
    fewer = replace(
        pairs,
        p=p,
        q=q,
        n_dropped=pairs.n_dropped + q.n_clipped - pairs.q.n_clipped,
        sampled_p=above(pairs.sampled_p, p.floor),
    )
    return fewer.flagged("clipped-p", changed_p).flagged("clipped-q", changed_q), changed


def _aligned_again(aligned: Aligned, pairs: Pairs, changed: BoolArray) -> Aligned:
    """The matched lists, those of responses with a changed one matched again."""
    if not changed.any():
        return aligned
    touched = np.isin(pairs.response, pairs.response[changed])
    rows = np.flatnonzero(touched)
    return aligned.replaced(rows, pairs.take(rows).aligned())


def _contradiction(pairs: Pairs, row: int, outlier: Outlier, kl: float) -> str:
    logp, logq = outlier.logp, outlier.logq
    lists, value = (pairs.q.lists, logq) if math.isnan(logp) else (pairs.p.lists, logp)
    known = lists[row] if pairs.wanted_q is None else (*lists[row], *pairs.wanted_q[row])
    token = min(known, key=lambda candidate: abs(logprob_of(candidate) - value)).token
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


def not_determined(
    place: IntArray, estimates: FloatArray, exact: FloatArray, aligned: Aligned
) -> Mapping[int, Missing]:
    """Reasons for measured positions without an estimate, by place; their bounds hold."""
    found: dict[int, Missing] = {}
    for row in map(int, np.flatnonzero(np.isnan(estimates))):
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
        found[int(place[row])] = gap
    return found
