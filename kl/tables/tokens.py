"""From a response of P and the scores of Q to the rows of the token table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from kl.estimators.align import Aligned, BoolArray, FloatArray, IntArray, align
from kl.estimators.censored import SpreadEvidence, SpreadPrior
from kl.estimators.diagnostic import AlignmentDiagnostic, diagnose
from kl.estimators.divergence import ESTIMATORS, MIN_LISTED, ListMeasures, measure, sampled_token
from kl.estimators.entropy import entropies
from kl.estimators.token_keys import Candidates, KeyChoice, Listed, is_known, listed
from kl.records import Position, Response, Score, ScoreFailure
from kl.tables.schemas import TOKENS

# Log-probabilities rounded to two decimals reach 1.005; above, the list holds something else than one distribution.
LARGEST_MASS = 1.01

Scores = Sequence[Score | ScoreFailure | None]

# Columns in which a measured row may have null: the lists do not determine the value.
_MAY_BE_UNKNOWN = frozenset(
    (
        "kl_estimate",
        "kl_upper_plausible",
        "kl_floor",
        "kl_censored",
        "kl_exact",
        "reverse_kl_estimate",
        "js_estimate",
        "logprob_q",
        "logratio_k1",
        "k3",
        "delta_p",
        "entropy_p_upper",
        "logratio_sd",
    )
)


@dataclass(frozen=True, slots=True)
class _Missing:
    """Why a position is not measured: a short code and one line."""

    reason: str
    error: str


@dataclass(frozen=True, slots=True)
class _Pair:
    """One position that can be measured."""

    position: int
    top_p: Candidates
    top_q: Candidates
    n_dropped: int
    source: Position
    score: Score


def measure_response(
    response: Response,
    scores: Scores,
    *,
    estimator: str,
    prior: SpreadPrior | None,
    exact_kl: NDArray[np.float64] | None = None,
    selected: NDArray[np.bool_] | None = None,
    pi: NDArray[np.float64] | None = None,
    choice: KeyChoice | None = None,
    vocabulary: int | None = None,
) -> pl.DataFrame:
    """The token table of one response.

    Parameters
    ----------
    scores : sequence, one per position of the response
        ``None`` where Q was not asked or has not answered.
    estimator : str
        One of `kl.estimators.divergence.ESTIMATORS`: what the columns ``*_estimate`` hold.
    prior : SpreadPrior, optional
        `kl.estimators.censored.pooled_prior` of the whole data set; ``None`` if it has none.
    exact_kl : float64, shape (T,), optional
        From `kl.estimators.divergence.exact_kl`; NaN where unknown, ``inf`` where infinite, which leaves no estimate.
    selected : bool, shape (T,), optional
        Positions that were drawn for measurement; default all. Needs ``pi``.
    pi : float64, shape (T,), optional
        Inclusion probabilities; default 1.
    choice : KeyChoice, optional
        What to match tokens by; default `kl.estimators.align.choose_key` of this response.
    vocabulary : int, optional
        Number of tokens of P; without it ``entropy_p_upper`` is null.

    Returns
    -------
    pl.DataFrame
        Schema `kl.tables.schemas.TOKENS`, one row per position. A position that could not be measured has null values
        and a ``reason`` with ``error``; so has one whose estimate is not determined, beside its bounds.

    Raises
    ------
    ValueError
        If lengths differ, the estimator is unknown, or an inclusion probability is not in (0, 1].
    """
    if estimator not in ESTIMATORS:
        raise ValueError(f"unknown estimator {estimator!r}. Known: {', '.join(ESTIMATORS)}.")
    n = len(response.positions)
    drawn, inclusion = _sampling_design(response, selected, pi)
    exact = np.full(n, np.nan) if exact_kl is None else exact_kl
    _same_length(response, exact_kl=len(exact))
    pairs, missing, aligned = _align(response, scores, drawn, choice)
    columns = _identity(response, drawn, inclusion)
    if aligned is not None:
        values = measure(aligned, prior)
        at = np.array([pair.position for pair in pairs], dtype=np.int64)
        columns["logprob_p"][at] = aligned.logp_sampled
        measured = _list_columns(aligned, values, pairs, vocabulary) | _estimate_columns(values, estimator, exact[at])
        columns |= {name: _scatter(name, column, at, n) for name, column in measured.items()}
        estimates = np.asarray(measured["kl_estimate"], dtype=np.float64)
        missing |= _not_determined(pairs, estimates, exact[at], aligned)
    columns["logprob_p"] = pl.Series(columns["logprob_p"], nan_to_null=True)
    columns["reason"] = [missing[t].reason if t in missing else None for t in range(n)]
    columns["error"] = [missing[t].error if t in missing else None for t in range(n)]
    return pl.DataFrame([pl.Series(name, columns.get(name, [None] * n), dtype=dtype) for name, dtype in TOKENS.items()])


def response_spread(response: Response, scores: Scores, choice: KeyChoice | None = None) -> SpreadEvidence:
    """What a response says about the spread of log p/q; add up over a data set for `pooled_prior`."""
    aligned = align_response(response, scores, choice)
    return SpreadEvidence.none() if aligned is None else SpreadEvidence.of(aligned)


def response_diagnostic(response: Response, scores: Scores, choice: KeyChoice | None = None) -> AlignmentDiagnostic:
    """How well the lists of a response match; add up over a data set and ask for the `verdict`."""
    aligned = align_response(response, scores, choice)
    return AlignmentDiagnostic() if aligned is None else diagnose(aligned)


def align_response(response: Response, scores: Scores, choice: KeyChoice | None = None) -> Aligned | None:
    """The positions of a response that have usable lists on both sides; ``None`` if there are none."""
    return _align(response, scores, np.ones(len(response.positions), dtype=np.bool_), choice)[2]


def _sampling_design(
    response: Response, selected: NDArray[np.bool_] | None, pi: NDArray[np.float64] | None
) -> tuple[BoolArray, FloatArray]:
    n = len(response.positions)
    if selected is not None and pi is None:
        raise ValueError(f"{response.name}: positions were selected but pi is not given; pass their probabilities.")
    drawn = np.ones(n, dtype=np.bool_) if selected is None else selected
    inclusion = np.ones(n) if pi is None else pi
    _same_length(response, selected=len(drawn), pi=len(inclusion))
    wrong = np.flatnonzero(~((inclusion > 0) & (inclusion <= 1)))
    if wrong.size:
        raise ValueError(f"{response.name}: pi[{wrong[0]}]={inclusion[wrong[0]]}; probabilities are in (0, 1].")
    return drawn, inclusion


def _same_length(response: Response, **lengths: int) -> None:
    for name, length in lengths.items():
        if length != len(response.positions):
            raise ValueError(
                f"{response.name} has {len(response.positions)} positions, {name} has {length}; give one for each."
            )


def _align(
    response: Response, scores: Scores, drawn: BoolArray, choice: KeyChoice | None
) -> tuple[list[_Pair], dict[int, _Missing], Aligned | None]:
    """What can be measured, why the rest cannot, and the matched lists of the former."""
    _same_length(response, scores=len(scores))
    pairs: list[_Pair] = []
    missing: dict[int, _Missing] = {}
    for t, (position, score) in enumerate(zip(response.positions, scores, strict=True)):
        if drawn[t]:
            found = _pair(t, position, score)
            if isinstance(found, _Missing):
                missing[t] = found
            else:
                pairs.append(found)
    aligned = _align_pairs(pairs, choice)
    if aligned is None:
        return pairs, missing, None
    too_much = np.maximum(aligned.coverage_p, aligned.coverage_q) > LARGEST_MASS
    if not too_much.any():
        return pairs, missing, aligned
    for row in np.flatnonzero(too_much):
        missing[pairs[row].position] = _above_one(aligned.coverage_p[row], aligned.coverage_q[row])
    pairs = [pair for pair, wrong in zip(pairs, too_much, strict=True) if not wrong]
    return pairs, missing, _align_pairs(pairs, choice)


def _align_pairs(pairs: list[_Pair], choice: KeyChoice | None) -> Aligned | None:
    if not pairs:
        return None
    return align(
        [pair.top_p for pair in pairs],
        [pair.top_q for pair in pairs],
        [pair.source.sampled for pair in pairs],
        [pair.score.sampled for pair in pairs],
        choice,
    )


def _pair(t: int, position: Position, score: Score | ScoreFailure | None) -> _Pair | _Missing:
    if score is None:
        return _Missing(
            "not-scored", "Q has not been asked about this position, or its answer is not there; run again."
        )
    if isinstance(score, ScoreFailure):
        return _Missing(score.reason, score.message)
    side_p, side_q = listed(position.top), listed(score.top)
    if not side_p.candidates:
        return _Missing("empty-list-p", _empty("P", len(position.top), "Sample the responses again with logprobs."))
    if not side_q.candidates:
        return _Missing("empty-list-q", _empty("Q", len(score.top), "Score the position again."))
    return _Pair(t, side_p.candidates, side_q.candidates, _dropped(score, side_q), position, score)


def _dropped(score: Score, side: Listed) -> int:
    return score.n_dropped + side.n_dropped


def _empty(side: str, n_entries: int, advice: str) -> str:
    return f"{side}'s list has no usable log-probability ({n_entries} entries). {advice}"


def _above_one(mass_p: float, mass_q: float) -> _Missing:
    side, mass, advice = (
        ("p", mass_p, "Check the response file.")
        if mass_p > LARGEST_MASS
        else ("q", mass_q, "Check the backend's settings.")
    )
    return _Missing(
        f"mass-above-1-{side}",
        f"{side.upper()}'s listed probabilities add up to {mass:.4f}; they are not one distribution. {advice}",
    )


def _not_determined(
    pairs: list[_Pair], estimates: FloatArray, exact: FloatArray, aligned: Aligned
) -> dict[int, _Missing]:
    """Reasons for measured positions without an estimate; their bounds hold."""
    found: dict[int, _Missing] = {}
    for row in np.flatnonzero(np.isnan(estimates)):
        k_p, k_q = aligned.n_listed_p[row], aligned.n_listed_q[row]
        if math.isinf(exact[row]):
            gap = _Missing("infinite", "P allows a token that Q excludes: KL is infinite. Its lower bound is given.")
        elif min(k_p, k_q) < MIN_LISTED:
            gap = _Missing(
                "short-list",
                f"P lists {k_p} and Q {k_q} tokens; the estimate needs {MIN_LISTED} of each, only bounds are given. "
                f"Ask for top_logprobs of {MIN_LISTED} or more, or use the estimator 'lower'.",
            )
        else:
            gap = _Missing(
                "not-determined",
                f"P and Q share {aligned.overlap[row]} listed tokens, too few for an estimate; only bounds are given.",
            )
        found[pairs[row].position] = gap
    return found


def _identity(response: Response, drawn: BoolArray, inclusion: FloatArray) -> dict[str, Any]:
    n = len(response.positions)
    sampled = [position.sampled for position in response.positions]
    return {
        "source_file": [response.source_file] * n,
        "prompt_id": [response.prompt.prompt_id] * n,
        "response_idx": [response.response_idx] * n,
        "position": range(n),
        "token": [candidate.token for candidate in sampled],
        "token_id": [candidate.token_id for candidate in sampled],
        "selected": drawn,
        "pi": inclusion,
        "logprob_p": np.array(
            [math.nan if c.logprob is None or not is_known(c.logprob) else c.logprob for c in sampled], dtype=np.float64
        ),
    }


Column = FloatArray | IntArray | BoolArray | list[bool | None] | list[str] | list[int]


def _list_columns(
    aligned: Aligned, values: ListMeasures, pairs: list[_Pair], vocabulary: int | None
) -> dict[str, Column]:
    """What the lists say whatever the estimator."""
    token = sampled_token(aligned)
    entropy_p = entropies(aligned.logp, aligned.log_cap_p, aligned.coverage_p, vocabulary)
    entropy_q = entropies(aligned.logq, aligned.log_cap_q, aligned.coverage_q)
    known = ~np.isnan(token.k1)
    return {
        "k_p": aligned.n_listed_p,
        "k_q": aligned.n_listed_q,
        "logprob_q": aligned.logq_sampled,
        "coverage_p": aligned.coverage_p,
        "coverage_q": aligned.coverage_q,
        "rest_mass_p": values.cell.rest_p,
        "rest_mass_q": values.cell.rest_q,
        "p_mass_missing_in_q": values.cell.a.sum(axis=1),
        "q_mass_missing_in_p": values.cell.b.sum(axis=1),
        "overlap": aligned.overlap,
        "same_top_token": _same_top(aligned),
        "logratio_k1": token.k1,
        "k1_censored": [bool(c) if k else None for c, k in zip(token.censored, known, strict=True)],
        "k3": token.k3,
        "delta_p": token.delta_p,
        "entropy_p": entropy_p.rest_cell,
        "entropy_q": entropy_q.rest_cell,
        "entropy_p_lower": entropy_p.lower,
        "entropy_p_upper": entropy_p.upper,
        "logratio_sd": values.logratio_sd,
        "n_duplicate_keys": aligned.n_duplicate_keys,
        "ambiguous_mass_p": aligned.open_p,
        "ambiguous_mass_q": aligned.open_q,
        "n_dropped": [pair.n_dropped for pair in pairs],
        "align_key": [aligned.choice.key] * len(pairs),
    }


def _estimate_columns(values: ListMeasures, estimator: str, exact: FloatArray) -> dict[str, Column]:
    estimate = values.estimate(estimator)
    # An exact value stands beside the estimate and does not replace it, except that an infinite one leaves no estimate.
    kl = np.where(np.isinf(exact), np.nan, estimate.kl)
    # The limit holds for the model; another estimator may lie above it.
    upper = np.where(np.isnan(kl), values.upper_plausible, np.maximum(values.upper_plausible, kl))
    return {
        "kl_estimate": kl,
        "kl_lower": values.lower.kl,
        "kl_upper_plausible": upper,
        "kl_floor": values.floor.kl,
        "kl_bucket": values.bucket.kl,
        "kl_censored": values.censored.kl,
        "kl_exact": np.where(np.isfinite(exact), exact, np.nan),
        "reverse_kl_estimate": estimate.reverse_kl,
        "reverse_kl_lower": values.lower.reverse_kl,
        "js_estimate": estimate.js,
        "js_lower": values.lower.js,
        "tv_lower": values.lower.tv,
    }


def _same_top(aligned: Aligned) -> list[bool | None]:
    """Whether a most probable token of P is one of Q's; ``None`` where it has no key of its own."""
    best_p = aligned.logp == aligned.logp.max(axis=1, keepdims=True)
    best_q = aligned.shared_logq == aligned.logq.max(axis=1, keepdims=True)
    same = (best_p & best_q & (aligned.index_q >= 0)).any(axis=1)
    return [None if is_open else bool(value) for value, is_open in zip(same, aligned.top_open, strict=True)]


def _scatter(name: str, column: Column, at: IntArray, n: int) -> pl.Series:
    """A column of n rows from values at some of them; NaN becomes null only where it means "not known"."""
    if TOKENS[name] == pl.Float64:
        floats = np.full(n, np.nan)
        floats[at] = column
        _check_finite(name, floats, at)
        return pl.Series(name, floats, nan_to_null=True)
    values = pl.Series(name, column, dtype=TOKENS[name])
    if len(at) == n:
        return values
    place = np.full(n, -1, dtype=np.int64)
    place[at] = np.arange(len(at))
    return values.gather(pl.Series(place).replace(-1, None))


def _check_finite(name: str, floats: FloatArray, at: IntArray) -> None:
    faults = np.isinf(floats[at]) if name in _MAY_BE_UNKNOWN else ~np.isfinite(floats[at])
    if faults.any():
        row = int(at[faults.argmax()])
        raise ArithmeticError(f"{name}={floats[row]} at position {row}: a fault of this program, please report it.")
