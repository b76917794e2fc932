"""From a response of P and the scores of Q to the rows of the token table."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray

from kl.columns import NO_ID, BoolArray, Entries, FloatArray, IntArray, Positions
from kl.estimators.align import Aligned
from kl.estimators.censored import SpreadEvidence, SpreadPrior
from kl.estimators.diagnostic import AlignmentDiagnostic, diagnose
from kl.estimators.divergence import ESTIMATORS, ExactDivergences, ListMeasures, measure, sampled_token
from kl.estimators.entropy import entropies
from kl.estimators.outliers import spread_evidence
from kl.records import UNKNOWN_LOGPROB, Response
from kl.tables.outliers import not_determined, without_outliers
from kl.tables.pairs import (
    Answered,
    Paired,
    Pairs,
    Results,
    check_lengths,
    names_of,
    pair_up,
)
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
        "reverse_kl_exact",
        "js_exact",
        "tv_exact",
        "logprob_q",
        "logratio_k1",
        "k3",
        "delta_p",
        "entropy_p_upper",
        "logratio_sd",
    )
)


class Asked(NamedTuple):
    """A response with what Q said, and how its positions were drawn; by position, shape (T,), None for the default.

    ``scores`` has one result per position, ``None`` where Q was not asked or has not answered. ``selected`` are the
    positions that were drawn for measurement (default all; needs ``pi``), ``pi`` their inclusion probabilities (1).
    ``exact_kl`` is NaN where unknown, ``inf`` where infinite, which leaves no estimate. ``vocabulary`` is the number of
    tokens of P, known where its full vocabulary was seen; without it ``entropy_p_upper`` is null. ``flags`` are short
    codes of what to know of a position, beside those that its lists give.
    """

    response: Response
    scores: Results
    selected: BoolArray | None = None
    pi: FloatArray | None = None
    exact_kl: FloatArray | None = None
    vocabulary: int | None = None
    flags: Mapping[int, Collection[str]] = {}

    @property
    def answered(self) -> Answered:
        """What is paired."""
        return Answered(self.response, self.scores, self.selected)


def measure_response(
    response: Response,
    scores: Results,
    *,
    estimator: str,
    prior: SpreadPrior | None,
    exact_kl: NDArray[np.float64] | None = None,
    selected: NDArray[np.bool_] | None = None,
    pi: NDArray[np.float64] | None = None,
    vocabulary: int | None = None,
    flags: Mapping[int, Collection[str]] | None = None,
) -> pl.DataFrame:
    """The token table of one response: `measure_responses` of one, with the fields of `Asked` by name."""
    asked = Asked(response, scores, selected, pi, exact_kl, vocabulary, flags or {})
    return measure_responses([asked], estimator=estimator, prior=prior)


def measure_responses(
    asked: Sequence[Asked], *, estimator: str, prior: SpreadPrior | None, paired: Paired | None = None
) -> pl.DataFrame:
    """The token table of some responses.

    Parameters
    ----------
    asked : sequence of Asked
    estimator : str
        One of `kl.estimators.divergence.ESTIMATORS`: what the columns ``*_estimate`` hold.
    prior : SpreadPrior, optional
        `kl.estimators.censored.pooled_prior` of the whole data set; ``None`` if it has none.
    paired : Paired, optional
        What `kl.tables.pairs.pair_up` gave of the same, where it is known.

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
    if paired is None:
        paired = pair_up([item.answered for item in asked])
    lengths = [len(item.response.positions) for item in asked]
    vocabulary = np.repeat([np.nan if item.vocabulary is None else float(item.vocabulary) for item in asked], lengths)
    kl = np.concatenate([np.zeros(0), *(_exact(item) for item in asked)])
    exact = ExactDivergences(kl, *[np.full(len(kl), np.nan)] * 3)
    trusted = without_outliers(paired, prior)
    table = measure_paired(
        identity(asked), trusted, estimator=estimator, prior=prior, exact=exact, vocabulary=vocabulary
    )
    return _with_flags(table, asked)


def measure_paired(
    identified: pl.DataFrame,
    paired: Paired,
    *,
    estimator: str,
    prior: SpreadPrior | None,
    exact: ExactDivergences | None = None,
    vocabulary: FloatArray | None = None,
) -> pl.DataFrame:
    """What `measure_responses` returns, of N positions that are paired.

    Parameters
    ----------
    identified : pl.DataFrame
        From `identity` of the same responses.
    paired : Paired
        From `kl.tables.outliers.without_outliers` with the same prior.
    exact : ExactDivergences, optional
        Of whole vocabularies, shape (N,): NaN where unknown, ``inf`` where infinite.
    vocabulary : float64, shape (N,), optional
        As in `Asked`, NaN where unknown.
    """
    if estimator not in ESTIMATORS:
        raise ValueError(f"unknown estimator {estimator!r}. Known: {', '.join(ESTIMATORS)}.")
    pairs, aligned, missing = paired.pairs, paired.aligned, paired.missing
    n, at = identified.height, pairs.place
    given = ExactDivergences(*[np.full(n, np.nan)] * 4) if exact is None else exact
    known = ExactDivergences(*(values[at] for values in given))
    columns: dict[str, Any] = {name: identified[name] for name in identified.columns}
    if aligned is not None:
        values = measure(aligned, prior)
        logprob_p = columns["logprob_p"].fill_null(np.nan).to_numpy().copy()
        logprob_p[at] = aligned.logp_sampled
        columns["logprob_p"] = pl.Series(logprob_p, nan_to_null=True)
        size = np.full(len(at), np.nan) if vocabulary is None else vocabulary[at]
        measured = _list_columns(aligned, values, pairs, size) | _estimate_columns(values, estimator, known)
        columns |= {name: _scatter(name, column, at, n) for name, column in measured.items()}
        estimates = np.asarray(measured["kl_estimate"], dtype=np.float64)
        missing = {**missing, **not_determined(at, estimates, known.kl, aligned)}
        pairs = _with_masses(pairs, aligned, values)
    for name, field in (("reason", 0), ("error", 1), ("kl_set_aside", 2)):
        column: list[Any] = [None] * n
        for place, why in missing.items():
            column[place] = why[field]
        columns[name] = column
    columns["flags"] = _flags(pairs, n)
    return pl.DataFrame([pl.Series(name, columns.get(name, [None] * n), dtype=dtype) for name, dtype in TOKENS.items()])


def _exact(item: Asked) -> FloatArray:
    if item.exact_kl is None:
        return np.full(len(item.response.positions), np.nan)
    check_lengths(item.response, exact_kl=len(item.exact_kl))
    return item.exact_kl


def _with_masses(pairs: Pairs, aligned: Aligned, values: ListMeasures) -> Pairs:
    """Marks lists whose mass above 1 was scaled away, and sides whose values are rounded to a few decimals."""
    marks = {
        "mass-above-1-p": values.masses.above_1_p,
        "mass-above-1-q": values.masses.above_1_q,
        "rounded-p": aligned.step_p > 0,
        "rounded-q": aligned.step_q > 0,
    }
    for name, rows in marks.items():
        pairs = pairs.flagged(name, rows)
    return pairs


def _flags(pairs: Pairs, n: int) -> pl.Series:
    kinds, kind = np.unique(pairs.flags, return_inverse=True)
    names = [",".join(sorted(found)) or None for found in names_of(kinds)]
    place = np.full(n, len(names), dtype=np.int64)
    place[pairs.place] = kind
    return pl.Series([*names, None], dtype=pl.String)[pl.Series(place.astype(np.uint32))]


def _with_flags(table: pl.DataFrame, asked: Sequence[Asked]) -> pl.DataFrame:
    """The same with the flags that were given."""
    if not any(item.flags for item in asked):
        return table
    written: list[str | None] = table["flags"].to_list()
    start = 0
    for item in asked:
        for t, codes in item.flags.items():
            known = written[start + t]
            written[start + t] = ",".join(sorted({*codes, *(known.split(",") if known else ())})) or None
        start += len(item.response.positions)
    return table.with_columns(pl.Series("flags", written, dtype=pl.String))


def response_spread(response: Response, scores: Results) -> SpreadEvidence:
    """What a response says about the spread of log p/q; add up over a data set for `pooled_prior`."""
    aligned = align_response(response, scores)
    return SpreadEvidence.none() if aligned is None else spread_evidence(aligned)


def response_diagnostic(response: Response, scores: Results) -> AlignmentDiagnostic:
    """How well the lists of a response match; add up over a data set and ask for the `verdict`."""
    aligned = align_response(response, scores)
    return AlignmentDiagnostic() if aligned is None else diagnose(aligned)


def align_response(response: Response, scores: Results) -> Aligned | None:
    """The positions of a response that have usable lists on both sides; ``None`` if there are none."""
    return pair_up([Answered(response, scores)]).aligned


class _Design(NamedTuple):
    selected: BoolArray
    pi: FloatArray


def _sampling_design(asked: Asked) -> _Design:
    response, n = asked.response, len(asked.response.positions)
    if asked.selected is not None and asked.pi is None:
        raise ValueError(f"{response.name}: positions were selected but pi is not given; pass their probabilities.")
    drawn = np.ones(n, dtype=np.bool_) if asked.selected is None else asked.selected
    inclusion = np.ones(n) if asked.pi is None else asked.pi
    check_lengths(response, selected=len(drawn), pi=len(inclusion))
    wrong = np.flatnonzero(~((inclusion > 0) & (inclusion <= 1)))
    if wrong.size:
        raise ValueError(f"{response.name}: pi[{wrong[0]}]={inclusion[wrong[0]]}; probabilities are in (0, 1].")
    return _Design(drawn, inclusion)


def identity(asked: Sequence[Asked]) -> pl.DataFrame:
    """What the token table says of positions without their lists: which they are, and how they were drawn.

    Raises
    ------
    ValueError
        If lengths differ or an inclusion probability is not in (0, 1].
    """
    designs = [_sampling_design(item) for item in asked]
    responses = [item.response for item in asked]
    lengths = np.array([len(response.positions) for response in responses], dtype=np.int64)
    of = pl.Series(np.repeat(np.arange(len(responses)), lengths), dtype=pl.UInt32)
    ends = np.cumsum(lengths)
    sampled = Entries.joined([Positions.of(response.positions).sampled for response in responses])
    is_stop = np.zeros(len(of), dtype=np.bool_)
    is_stop[[end - 1 for end, response in zip(ends, responses, strict=True) if response.has_stop]] = True
    ids = pl.Series(sampled.ids)
    columns: dict[str, Any] = {
        "source_file": pl.Series([item.source_file for item in responses], dtype=pl.String)[of],
        "prompt_id": pl.Series([item.prompt.prompt_id for item in responses], dtype=pl.String)[of],
        "response_idx": pl.Series([item.response_idx for item in responses], dtype=pl.Int64)[of],
        "position": np.arange(len(of)) - np.repeat(ends - lengths, lengths),
        "token": sampled.tokens.cast(pl.String),
        "token_id": ids.set(ids == NO_ID, None),
        "is_stop": is_stop,
        "selected": np.concatenate([np.zeros(0, dtype=np.bool_), *(design.selected for design in designs)]),
        "pi": np.concatenate([np.zeros(0), *(design.pi for design in designs)]),
        "logprob_p": pl.Series(
            np.where(sampled.logprobs > UNKNOWN_LOGPROB, sampled.logprobs, np.nan), nan_to_null=True
        ),
    }
    return pl.DataFrame([pl.Series(name, values, dtype=TOKENS[name]) for name, values in columns.items()])


Column = FloatArray | IntArray | BoolArray | pl.Series | list[str] | list[int]


def _list_columns(aligned: Aligned, values: ListMeasures, pairs: Pairs, vocabulary: FloatArray) -> dict[str, Column]:
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
        "n_dropped": pairs.n_dropped,
        "align_key": pl.Series([choice.key for choice in aligned.choices])[pl.Series(aligned.response)],
    }


def _estimate_columns(values: ListMeasures, estimator: str, exact: ExactDivergences) -> dict[str, Column]:
    estimate = values.estimate(estimator)
    finite = ExactDivergences(*(np.where(np.isfinite(value), value, np.nan) for value in exact))
    # An exact value stands beside the estimate and does not replace it, except that an infinite one leaves no estimate.
    kl = np.where(np.isinf(exact.kl), np.nan, estimate.kl)
    # The limit holds for the model; another estimator may lie above it.
    upper = np.where(np.isnan(kl), values.upper_plausible, np.maximum(values.upper_plausible, kl))
    return {
        "kl_estimate": kl,
        "kl_lower": values.lower.kl,
        "kl_upper_plausible": upper,
        "kl_floor": values.floor.kl,
        "kl_bucket": values.bucket.kl,
        "kl_censored": values.censored.kl,
        "kl_exact": finite.kl,
        "reverse_kl_estimate": estimate.reverse_kl,
        "reverse_kl_lower": values.lower.reverse_kl,
        "js_estimate": estimate.js,
        "js_lower": values.lower.js,
        "tv_lower": values.lower.tv,
        "reverse_kl_exact": finite.reverse_kl,
        "js_exact": finite.js,
        "tv_exact": finite.tv,
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
    """A column of n rows from values at some of them, rising; NaN becomes null only where it means "not known"."""
    if TOKENS[name] == pl.Float64:
        floats = np.asarray(column, dtype=np.float64)
        _check_finite(name, floats, at)
        if len(at) < n:
            known, floats = floats, np.full(n, np.nan)
            floats[at] = known
        return pl.Series(name, floats, nan_to_null=True)
    values = pl.Series(name, column, dtype=TOKENS[name])
    if len(at) == n:
        return values
    place = np.zeros(n, dtype=np.uint32)
    place[at] = np.arange(len(at))
    is_nowhere = np.ones(n, dtype=np.bool_)
    is_nowhere[at] = False
    return values[pl.Series(place).set(pl.Series(is_nowhere), None)]


def _check_finite(name: str, floats: FloatArray, at: IntArray) -> None:
    faults = np.isinf(floats) if name in _MAY_BE_UNKNOWN else ~np.isfinite(floats)
    if faults.any():
        row = int(faults.argmax())
        raise ArithmeticError(f"{name}={floats[row]} at position {at[row]}: a fault of this program, please report it.")
