"""Estimates of KL(P‖Q), its reverse and the Jensen-Shannon divergence from two top-k lists, or from whole vocabularies.

==========  ===========================================================================================================
exact       full vocabularies on both sides
censored    shape of the hidden part from a censored normal model of log p/q (default); nearly unbiased at k = 20
floor       both lists renormalised, missing tokens at the smallest listed probability; biased, mostly low
lower       tight lower bound: certified, biased low
bucket      shared tokens plus one cell: certified, biased lower still
==========  ===========================================================================================================

Positions are treated one by one: nothing here assumes that they are independent.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import rel_entr

from kl.estimators import censored as tobit
from kl.estimators.align import Aligned, BoolArray, FloatArray
from kl.estimators.bounds import (
    REST_SLACK,
    SMALLEST,
    Alone,
    Cells,
    Completion,
    Divergences,
    bucket,
    cells,
    js_terms,
    lower_bounds,
    of_listed,
    upper_subgauss,
)
from kl.estimators.rows import row_sums
from kl.records import ExactPair

ESTIMATORS = ("censored", "floor", "lower", "bucket")
# In the metadata of every table. Raised when the same lists give other values in a column than they did, by more than
# rounding: tables of two versions are compared only after the older run was measured again (which asks nothing).
ESTIMATOR_VERSION = 1
MIN_LISTED = 5  # shorter lists carry no information about the spread: bounds only
PLAUSIBLE_FACTOR = 4.0  # covers 99.8 % of positions at k = 20, 98.7 % at k = 10 (measured on quantised models)
NEGLIGIBLE_MASS = REST_SLACK  # hidden on both sides: the shared tokens are the whole distribution, up to rounding
_REST_SHARE = 0.75  # of a rest mass that imputed tokens may take; the others keep the remainder
_LARGEST_LOG = 700.0  # exp of more overflows float64
_SMALLEST_LOG = 10.0 - _LARGEST_LOG  # under the largest of a list, for a probability above 0
PADDING_MASS = 1e-5  # of rows that pad a vocabulary and are no tokens, at most; left out they move the KL by no more
_CHUNK_CELLS = 1 << 20  # float64 values of a full-vocabulary array that are held at once
_LOOSE_NORMALISATION = 1e-2
_NODES, _WEIGHTS = np.polynomial.hermite_e.hermegauss(25)  # quadrature under a standard normal
_QUADRATURE = tuple(zip(_NODES.tolist(), (_WEIGHTS / _WEIGHTS.sum()).tolist(), strict=True))


class PointEstimates(NamedTuple):
    """Point estimates in nats, shape (T,); NaN where the lists do not determine one."""

    kl: FloatArray
    reverse_kl: FloatArray
    js: FloatArray


def _completion(cell: Cells, model: tobit.LogRatioModel) -> Completion:
    """Expected values of the tokens that one side does not list; each side's others share what is left."""
    y = _imputed(cell.a, -model.ratio_p, _REST_SHARE * (cell.rest_q + cell.slack) + cell.open_q)
    x = _imputed(cell.b, model.ratio_q, _REST_SHARE * (cell.rest_p + cell.slack) + cell.open_p)
    return Completion(x, y, cell.total_p - cell.b.at.sums(x), cell.total_q - cell.a.at.sums(y))


def _imputed(known: Alone, log_ratio: FloatArray, allowed: FloatArray) -> FloatArray:
    """``known * exp(log_ratio)``, at most the cap each and what is allowed together, shape (T,)."""
    values = np.minimum(known.mass * np.exp(np.minimum(log_ratio, _LARGEST_LOG)), known.cap)
    total = known.at.sums(values)
    scale = np.where(total > allowed, allowed / np.maximum(total, SMALLEST), 1.0)
    return np.maximum(values * scale[known.at.row], SMALLEST)


def _model_estimate(cell: Cells, model: tobit.LogRatioModel) -> PointEstimates:
    completion = _completion(cell, model)
    listed, out_p, out_q = of_listed(cell, completion), completion.out_p, completion.out_q
    log_cap_p, log_cap_q = np.log(cell.cap_p), np.log(cell.cap_q)
    shape_p = tobit.tail_shape(model.variance, model.mean_p, log_cap_p, log_cap_q)
    shape_q = tobit.tail_shape(model.variance, -model.mean_q, log_cap_q, log_cap_p)
    tail_p, tail_q = np.maximum(out_p - cell.slack, 0.0) * shape_p, np.maximum(out_q - cell.slack, 0.0) * shape_q
    return PointEstimates(
        listed.kl + rel_entr(out_p, out_q) + tail_p,
        listed.reverse_kl + rel_entr(out_q, out_p) + tail_q,
        listed.js + _outside_js(out_p, out_q, 2.0 * shape_p, 2.0 * shape_q),
    )


def _outside_js(out_p: FloatArray, out_q: FloatArray, variance_p: FloatArray, variance_q: FloatArray) -> FloatArray:
    """Jensen-Shannon part of the outside, log p/q there normal around ``log X/Y``: +v/2 under P, -v/2 under Q."""
    centre = np.log(out_p) - np.log(out_q)
    part_p = np.log(2.0) - _mean_softplus(-centre - variance_p / 2, np.sqrt(variance_p))
    part_q = np.log(2.0) - _mean_softplus(centre - variance_q / 2, np.sqrt(variance_q))
    return 0.5 * (out_p * part_p + out_q * part_q)


def _mean_softplus(mean: FloatArray, scale: FloatArray) -> FloatArray:
    """E[log(1 + exp(u))] of a normal u, shape (T,)."""
    total = np.zeros(len(mean))
    for node, weight in _QUADRATURE:
        u = mean + scale * node
        total += weight * (np.maximum(u, 0.0) + np.log1p(np.exp(-np.abs(u))))
    return total


class Masses(NamedTuple):
    """Of the lists at each position, shape (T,): masses in probability, and whether one was above 1 (`Cells`)."""

    rest_p: FloatArray
    rest_q: FloatArray
    missing_in_q: FloatArray
    missing_in_p: FloatArray
    above_1_p: BoolArray
    above_1_q: BoolArray


@dataclass(frozen=True, slots=True)
class ListMeasures:
    """Everything the two lists say about T positions; nats, float64, shape (T,). NaN: not determined by the lists.

    ``floor`` is as its formula gives it and can be negative; every other divergence is at least 0.
    ``upper_plausible`` is a limit under the model, not a certificate. ``logratio_sd`` is the model's s.
    """

    lower: Divergences
    bucket: Divergences
    floor: PointEstimates
    censored: PointEstimates
    upper_plausible: FloatArray
    logratio_sd: FloatArray
    masses: Masses

    def estimate(self, estimator: str) -> PointEstimates:
        """The estimates of one of `ESTIMATORS`, at least 0.

        Raises
        ------
        ValueError
            For another name.
        """
        match estimator:
            case "censored":
                chosen = self.censored
            case "floor":
                chosen = self.floor
            case "lower":
                chosen = PointEstimates(*self.lower[:3])
            case "bucket":
                chosen = PointEstimates(*self.bucket[:3])
            case _:
                raise ValueError(f"unknown estimator {estimator!r}. Known: {', '.join(ESTIMATORS)}.")
        return PointEstimates(*(np.maximum(values, 0.0) for values in chosen))


def measure(aligned: Aligned, prior: tobit.SpreadPrior | None) -> ListMeasures:
    """All estimates and bounds of T aligned positions, each position for itself.

    Parameters
    ----------
    prior : SpreadPrior, optional
        From `kl.estimators.censored.pooled_prior` over the whole data set; ``None`` if no position of it has a
        variance.
    """
    cell = cells(aligned)
    low, grouped = lower_bounds(cell), bucket(cell)
    model = tobit.fit(aligned, prior)
    complete = (cell.hidden_p <= NEGLIGIBLE_MASS) & (cell.hidden_q <= NEGLIGIBLE_MASS)
    long_enough = np.minimum(aligned.n_listed_p, aligned.n_listed_q) >= MIN_LISTED
    spread_known = long_enough & (aligned.overlap >= tobit.MIN_SHARED)
    has_model = spread_known if prior is None else long_enough
    estimate = _at_least(low, _where_needed(cell, model, has_model & ~complete), complete, has_model)
    limit = np.maximum(upper_subgauss(cell, model.variance, PLAUSIBLE_FACTOR), estimate.kl)
    return ListMeasures(
        lower=low,
        bucket=grouped,
        floor=floor(aligned),
        censored=estimate,
        upper_plausible=np.where(complete, np.maximum(grouped.kl, low.kl), np.where(spread_known, limit, np.nan)),
        logratio_sd=np.where(has_model, np.sqrt(model.variance), np.nan),
        masses=Masses(cell.rest_p, cell.rest_q, cell.sum_a, cell.sum_b, cell.mass_above_1_p, cell.mass_above_1_q),
    )


def _where_needed(cell: Cells, model: tobit.LogRatioModel, rows: BoolArray) -> PointEstimates:
    """The model's estimates at some of the positions, NaN at the others; all of shape (T,)."""
    if rows.all():
        return _model_estimate(cell, model)
    part = tobit.LogRatioModel(
        model.mean_p[rows],
        model.mean_q[rows],
        model.variance[rows],
        model.ratio_p[rows[cell.a.at.row]],
        model.ratio_q[rows[cell.b.at.row]],
    )
    whole = PointEstimates(*(np.full(len(rows), np.nan) for _ in PointEstimates._fields))
    for values, found in zip(whole, _model_estimate(cell.only(rows), part), strict=True):
        values[rows] = found
    return whole


def _at_least(low: Divergences, model: PointEstimates, complete: BoolArray, has_model: BoolArray) -> PointEstimates:
    def chosen(bound: FloatArray, value: FloatArray) -> FloatArray:
        return np.where(complete, bound, np.where(has_model, np.maximum(value, bound), np.nan))

    js = np.minimum(chosen(low.js, model.js), np.log(2.0))
    return PointEstimates(chosen(low.kl, model.kl), chosen(low.reverse_kl, model.reverse_kl), js)


def floor(aligned: Aligned) -> PointEstimates:
    """Both lists renormalised to 1, a missing token taken at the smallest listed probability, summed over the union.

    The sums are not of distributions, so that KL can come out negative. Nats, shape (T,); NaN where a list has an open
    entry: it may be any of the missing tokens.
    """
    p, q = _Renormalised.of(aligned.logp), _Renormalised.of(aligned.logq, aligned.best_q)
    a, b, shared = aligned.alone_p, aligned.alone_q, aligned.shared
    at_p = aligned.shared_logq - q.top[:, None]
    at_p *= shared
    np.maximum(at_p, _SMALLEST_LOG, out=at_p)
    ratio = p.logs - at_p
    ratio -= (p.log_total - q.log_total)[:, None]
    ratio *= shared
    p_shared, q_shared = p.probs * shared, np.exp(at_p, out=at_p)
    q_shared *= shared
    q_shared /= q.total[:, None]
    p_alone, q_alone = a.of_array(p.probs), b.of_array(q.probs)
    q_least, p_least = q.smallest[a.row], p.smallest[b.row]
    ratio_a = a.of_array(p.logs) - p.log_total[a.row] - q.log_smallest[a.row]
    ratio_b = p.log_smallest[b.row] - b.of_array(q.logs) + q.log_total[b.row]
    known = (aligned.open_p == 0) & (aligned.open_q == 0)
    sums = (
        row_sums(p_shared * ratio) + a.sums(p_alone * ratio_a) + b.sums(p_least * ratio_b),
        -row_sums(q_shared * ratio) - a.sums(q_least * ratio_a) - b.sums(q_alone * ratio_b),
        row_sums(js_terms(p_shared, q_shared))
        + a.sums(js_terms(p_alone, q_least))
        + b.sums(js_terms(p_least, q_alone)),
    )
    return PointEstimates(*(np.where(known, value, np.nan) for value in sums))


class _Renormalised(NamedTuple):
    """Lists scaled to 1, none of the listed at 0.

    ``logs``, shape (T, K), are those under the largest, ``top``, and ``probs`` what they are of all, 0 where there is
    none. ``total`` is the sum of their exponentials; ``smallest`` the smallest probability of the k best, shape (T,).
    """

    logs: FloatArray
    probs: FloatArray
    top: FloatArray
    total: FloatArray
    log_total: FloatArray
    smallest: FloatArray
    log_smallest: FloatArray

    @classmethod
    def of(cls, listed: FloatArray, best: BoolArray | None = None) -> _Renormalised:
        top = np.maximum(listed.max(axis=1), np.finfo(np.float64).min)
        logs = listed - top[:, None]
        np.maximum(logs, _SMALLEST_LOG, out=logs)
        is_listed = listed > -np.inf
        weights = np.exp(logs)
        weights *= is_listed
        total = np.maximum(row_sums(weights), SMALLEST)
        least = (logs * (is_listed if best is None else best)).min(axis=1)  # the largest is at 0
        weights /= total[:, None]
        return cls(
            logs,
            weights,
            top,
            total,
            np.log(total),
            np.exp(least) / total,
            least - np.log(total),
        )


class SampledTokenEstimates(NamedTuple):
    """Of the token that P sampled, shape (T,); NaN where unknown.

    ``k1 = log p/q`` and ``k3 = q/p - 1 + k1`` have KL(P‖Q) as their mean over P's samples at temperature 1.
    Where ``censored``, Q does not list the token and k1 is its smallest possible value: Q gives it at most its cap, or
    what an open entry has. A mean over the other rows alone would be biased. ``delta_p`` is q - p.

    References
    ----------
    .. [1] Schulman, "Approximating KL divergence", 2020.
    """

    k1: FloatArray
    censored: BoolArray
    k3: FloatArray
    delta_p: FloatArray


def sampled_token(aligned: Aligned) -> SampledTokenEstimates:
    """Compare P and Q on the sampled token."""
    logp, logq = aligned.logp_sampled, aligned.logq_sampled
    both = ~np.isnan(logp) & ~np.isnan(logq)
    censored = ~np.isnan(logp) & np.isnan(logq) & aligned.sampled_clear
    k1 = np.where(both, logp - logq, np.where(censored, logp - aligned.log_limit_q, np.nan))
    finite = both & (k1 > -_LARGEST_LOG)
    k3 = np.where(finite, np.expm1(-np.where(finite, k1, 0.0)) + k1, np.nan)
    return SampledTokenEstimates(k1, censored, k3, np.where(both, np.exp(logq) - np.exp(logp), np.nan))


def exact_kl(logp: NDArray[np.floating], logq: NDArray[np.floating]) -> FloatArray:
    """Exact KL(P‖Q) of full vocabularies, in nats, float64, shape (T,).

    Parameters
    ----------
    logp, logq : floating, shape (T, V)
        Natural-log probabilities over the same V tokens, ``-inf`` for an impossible one. Rows are normalised again in
        float64. Work space is bounded: T * V may be large.

    Returns
    -------
    At least 0; exactly 0 for equal rows; ``inf`` where P allows a token that Q excludes.

    Raises
    ------
    ValueError
        If the shapes differ, or a row does not sum to 1 (within 1 %).
    """
    if logp.shape != logq.shape or logp.ndim != 2:
        raise ValueError(f"shapes {logp.shape} and {logq.shape}; both must be (T, V) over one vocabulary.")
    step = max(1, _CHUNK_CELLS // max(1, logp.shape[1]))
    parts = [_exact_chunk(logp, logq, start, start + step) for start in range(0, len(logp), step)]
    return np.concatenate(parts) if parts else np.zeros(0)


class ExactDivergences(NamedTuple):
    """Of whole vocabularies, in nats, float64, shape (T,); NaN where these are not the same. ``tv`` is without unit."""

    kl: FloatArray
    reverse_kl: FloatArray
    js: FloatArray
    tv: FloatArray


def exact_kl_of_padded(logp: NDArray[np.floating], logq: NDArray[np.floating]) -> FloatArray:
    """The ``kl`` of `exact_of_padded`."""
    return exact_of_padded(logp, logq).kl


def exact_of_padded(logp: NDArray[np.floating], logq: NDArray[np.floating]) -> ExactDivergences:
    """Exact divergences of vocabularies of one numbering, one of which may go on: over the tokens that both have.

    Parameters
    ----------
    logp, logq : floating, shapes (T, V_p) and (T, V_q)
        As for `exact_kl`, with its limit of the work space. Token i of one is token i of the other.

    Returns
    -------
    KL(P‖Q) as `exact_kl` gives it, KL(Q‖P), Jensen-Shannon divergence and total variation; NaN where the tokens that
    one of them has alone hold more than ``PADDING_MASS``: the vocabularies are not the same there.
    """
    if logp.ndim != 2 or logq.ndim != 2 or len(logp) != len(logq):
        raise ValueError(f"shapes {logp.shape} and {logq.shape}; both must have one row for each of T positions.")
    common = min(logp.shape[1], logq.shape[1])
    step = max(1, _CHUNK_CELLS // max(1, logp.shape[1], logq.shape[1]))
    same = np.concatenate(
        [
            np.zeros(0, dtype=np.bool_),
            *(_is_padding(logp, logq, slice(start, start + step), common) for start in range(0, len(logp), step)),
        ]
    )
    values = np.full((4, len(logp)), np.nan)
    edges = np.flatnonzero(np.diff(same, prepend=False, append=False)).tolist()
    for first, end in zip(edges[::2], edges[1::2], strict=True):  # runs of rows, which are views
        for start in range(first, end, step):
            stop = min(start + step, end)
            values[:, start:stop] = _all_exact(logp[:, :common], logq[:, :common], start, stop)
    return ExactDivergences(*values)


def exact_pair(logp: NDArray[np.floating], logq: NDArray[np.floating], key_q: str) -> ExactPair:
    """`exact_of_padded` of one position, shapes (V_p,) and (V_q,), as a score of P keeps it; ``key_q`` is Q's."""
    kl, reverse_kl, js, tv = (float(values[0]) for values in exact_of_padded(logp[None, :], logq[None, :]))
    return ExactPair(key_q, kl, reverse_kl, js, tv, len(logp), len(logq))


def _is_padding(logp: NDArray[np.floating], logq: NDArray[np.floating], rows: slice, common: int) -> BoolArray:
    """Whether the tokens that one side has alone hold next to nothing."""
    alone = [np.exp(logs[rows, common:].astype(np.float64)).sum(axis=1) for logs in (logp, logq)]
    return alone[0] + alone[1] <= PADDING_MASS


def _exact_chunk(logp: NDArray[np.floating], logq: NDArray[np.floating], start: int, stop: int) -> FloatArray:
    log_p, log_q = _normalised(logp[start:stop], "P", start), _normalised(logq[start:stop], "Q", start)
    return _relative_entropy(log_p, log_q, np.exp(log_p), np.exp(log_q))


def _all_exact(
    logp: NDArray[np.floating], logq: NDArray[np.floating], start: int, stop: int
) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray]:
    log_p, log_q = _normalised(logp[start:stop], "P", start), _normalised(logq[start:stop], "Q", start)
    p, q = np.exp(log_p), np.exp(log_q)
    mean = (p + q) / 2
    to_mean = [side * np.log(np.divide(side, mean, out=np.ones_like(side), where=side > 0)) for side in (p, q)]
    return (
        _relative_entropy(log_p, log_q, p, q),
        _relative_entropy(log_q, log_p, q, p),
        np.maximum(to_mean[0].sum(axis=1) + to_mean[1].sum(axis=1), 0.0) / 2,
        np.abs(p - q).sum(axis=1) / 2,
    )


def _relative_entropy(log_p: FloatArray, log_q: FloatArray, p: FloatArray, q: FloatArray) -> FloatArray:
    possible = np.isfinite(log_p)
    ratio = np.subtract(log_p, log_q, out=np.zeros_like(log_p), where=possible)
    # p log p/q - p + q is at least 0 token by token, and the additions cancel over a distribution.
    return np.maximum(np.sum(np.where(p > 0, p * ratio, 0.0) - p + q, axis=1), 0.0)


def _normalised(logs: NDArray[np.floating], side: str, start: int) -> FloatArray:
    wide = logs.astype(np.float64)
    top = wide.max(axis=1, keepdims=True)
    with np.errstate(invalid="ignore"):  # a row of -inf gives NaN and is refused below
        totals = np.log(np.exp(wide - top).sum(axis=1)) + top[:, 0]
    off = np.flatnonzero(~(np.abs(totals) <= _LOOSE_NORMALISATION))
    if off.size:
        row = int(off[0])
        raise ValueError(
            f"row {start + row} of {side} sums to exp({totals[row]:.6g}), not 1; give log-probabilities, not logits."
        )
    return wide - totals[:, None]
