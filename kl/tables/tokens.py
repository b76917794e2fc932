"""From a response of P and the scores of Q to the rows of the token table."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from kl.estimators.align import Aligned, BoolArray, FloatArray, IntArray
from kl.estimators.censored import SpreadEvidence, SpreadPrior
from kl.estimators.diagnostic import AlignmentDiagnostic, diagnose
from kl.estimators.divergence import ESTIMATORS, ListMeasures, measure, sampled_token
from kl.estimators.entropy import entropies
from kl.estimators.outliers import spread_evidence
from kl.estimators.token_keys import is_known
from kl.records import Response
from kl.tables.pairs import Pair, Scores, check_lengths, not_determined, pair_up, without_outliers
from kl.tables.schemas import TOKENS

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


def measure_response(
    response: Response,
    scores: Scores,
    *,
    estimator: str,
    prior: SpreadPrior | None,
    exact_kl: NDArray[np.float64] | None = None,
    selected: NDArray[np.bool_] | None = None,
    pi: NDArray[np.float64] | None = None,
    vocabulary: int | None = None,
    flags: Mapping[int, Collection[str]] | None = None,
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
    vocabulary : int, optional
        Number of tokens of P, known where its full vocabulary was seen; without it ``entropy_p_upper`` is null.
    flags : mapping, optional
        Position → short codes of what to know of it, beside those that its lists give.

    Returns
    -------
    pl.DataFrame
        Schema `kl.tables.schemas.TOKENS`, one row per position. A position that could not be measured has null values
        and a ``reason`` with ``error``; so has one whose estimate is not determined, beside its bounds. One whose own
        lists contradict a value (`kl.estimators.outliers`) is set aside with the reason ``outlier``.

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
    check_lengths(response, exact_kl=len(exact))
    pairs, aligned, missing = without_outliers(pair_up(response, scores, drawn), prior)
    columns = _identity(response, drawn, inclusion)
    if aligned is not None:
        values = measure(aligned, prior)
        at = np.array([pair.position for pair in pairs], dtype=np.int64)
        columns["logprob_p"][at] = aligned.logp_sampled
        measured = _list_columns(aligned, values, pairs, vocabulary) | _estimate_columns(values, estimator, exact[at])
        columns |= {name: _scatter(name, column, at, n) for name, column in measured.items()}
        estimates = np.asarray(measured["kl_estimate"], dtype=np.float64)
        missing |= not_determined(pairs, estimates, exact[at], aligned)
        pairs = _with_masses(pairs, aligned, values)
    columns["logprob_p"] = pl.Series(columns["logprob_p"], nan_to_null=True)
    columns["reason"] = [missing[t].reason if t in missing else None for t in range(n)]
    columns["error"] = [missing[t].error if t in missing else None for t in range(n)]
    columns["kl_set_aside"] = [missing[t].kl if t in missing else None for t in range(n)]
    columns["flags"] = _flags(n, pairs, flags or {})
    return pl.DataFrame([pl.Series(name, columns.get(name, [None] * n), dtype=dtype) for name, dtype in TOKENS.items()])


def _with_masses(pairs: list[Pair], aligned: Aligned, values: ListMeasures) -> list[Pair]:
    """Marks lists whose mass above 1 was scaled away, and sides whose values are rounded to a few decimals."""
    marks = {
        "mass-above-1-p": values.masses.above_1_p,
        "mass-above-1-q": values.masses.above_1_q,
        "rounded-p": aligned.step_p > 0,
        "rounded-q": aligned.step_q > 0,
    }
    return [
        pair._replace(flags=pair.flags.union(code for code, rows in marks.items() if rows[row]))
        for row, pair in enumerate(pairs)
    ]


def _flags(n: int, pairs: list[Pair], others: Mapping[int, Collection[str]]) -> list[str | None]:
    codes = {t: set(found) for t, found in others.items()}
    for pair in pairs:
        codes.setdefault(pair.position, set()).update(pair.flags)
    return [",".join(sorted(codes.get(t, ()))) or None for t in range(n)]


def response_spread(response: Response, scores: Scores) -> SpreadEvidence:
    """What a response says about the spread of log p/q; add up over a data set for `pooled_prior`."""
    aligned = align_response(response, scores)
    return SpreadEvidence.none() if aligned is None else spread_evidence(aligned)


def response_diagnostic(response: Response, scores: Scores) -> AlignmentDiagnostic:
    """How well the lists of a response match; add up over a data set and ask for the `verdict`."""
    aligned = align_response(response, scores)
    return AlignmentDiagnostic() if aligned is None else diagnose(aligned)


def align_response(response: Response, scores: Scores) -> Aligned | None:
    """The positions of a response that have usable lists on both sides; ``None`` if there are none."""
    return pair_up(response, scores, np.ones(len(response.positions), dtype=np.bool_)).aligned


def _sampling_design(
    response: Response, selected: NDArray[np.bool_] | None, pi: NDArray[np.float64] | None
) -> tuple[BoolArray, FloatArray]:
    n = len(response.positions)
    if selected is not None and pi is None:
        raise ValueError(f"{response.name}: positions were selected but pi is not given; pass their probabilities.")
    drawn = np.ones(n, dtype=np.bool_) if selected is None else selected
    inclusion = np.ones(n) if pi is None else pi
    check_lengths(response, selected=len(drawn), pi=len(inclusion))
    wrong = np.flatnonzero(~((inclusion > 0) & (inclusion <= 1)))
    if wrong.size:
        raise ValueError(f"{response.name}: pi[{wrong[0]}]={inclusion[wrong[0]]}; probabilities are in (0, 1].")
    return drawn, inclusion


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
        "is_stop": [response.has_stop and t == n - 1 for t in range(n)],
        "selected": drawn,
        "pi": inclusion,
        "logprob_p": np.array([c.logprob if is_known(c.logprob) else math.nan for c in sampled], dtype=np.float64),
    }


Column = FloatArray | IntArray | BoolArray | pl.Series | list[str] | list[int]


def _list_columns(
    aligned: Aligned, values: ListMeasures, pairs: list[Pair], vocabulary: int | None
) -> dict[str, Column]:
    """What the lists say whatever the estimator."""
    token = sampled_token(aligned)
    entropy_p = entropies(aligned.logp, aligned.log_limit_p, aligned.coverage_p, vocabulary)
    entropy_q = entropies(aligned.logq, aligned.log_limit_q, aligned.coverage_q)
    known = ~np.isnan(token.k1)
    return {
        "k_p": aligned.n_listed_p,
        "k_q": aligned.n_listed_q,
        "logprob_q": aligned.logq_sampled,
        "coverage_p": aligned.coverage_p,
        "coverage_q": aligned.coverage_q,
        "rest_mass_p": values.masses.rest_p,
        "rest_mass_q": values.masses.rest_q,
        "p_mass_missing_in_q": values.masses.missing_in_q,
        "q_mass_missing_in_p": values.masses.missing_in_p,
        "overlap": aligned.overlap,
        "same_top_token": _same_top(aligned),
        "logratio_k1": token.k1,
        "k1_censored": _where(known, token.censored),
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


def _same_top(aligned: Aligned) -> pl.Series:
    """Whether a most probable token of P is one of Q's; null where one without a key may be."""
    best_p = aligned.logp == aligned.log_top_p[:, None]
    best_q = aligned.shared_logq == aligned.log_top_q[:, None]
    same = (best_p & best_q & aligned.shared).any(axis=1)
    return _where(same | ~aligned.top_open, same)


def _where(known: BoolArray, values: BoolArray) -> pl.Series:
    """The values, null where they are not known."""
    return pl.Series(values).set(pl.Series(~known), None)


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
