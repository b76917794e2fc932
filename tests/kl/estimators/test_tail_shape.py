"""KL inside the tokens that neither model lists."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import quad

from kl.estimators.align import align
from kl.estimators.censored import TAIL_DEPTH, TAIL_SPREAD, tail_shape
from tests.kl.pairs import gaussian_pair, top_lists


def shape(variance, mean, log_cap=0.0, log_cap_other=0.0):
    return float(tail_shape(*(np.array([value], dtype=float) for value in (variance, mean, log_cap, log_cap_other)))[0])


def integrated(variance, mean, gap):
    """E[d] + log E[exp(-d)] of a normal d, weighted by the tokens left: those at least ``gap - d`` below the cap."""
    scale = math.sqrt(TAIL_SPREAD * variance)
    low, high = mean - scale * scale - 12 * scale, mean + 12 * scale

    def total(of):
        def weighted(d):
            kept = math.exp(min(0.0, (d - gap) / TAIL_DEPTH))
            return of(d) * kept * math.exp(-0.5 * ((d - mean) / scale) ** 2)

        return quad(weighted, low, high, points=[gap] if low < gap < high else None, limit=400)[0]

    mass = total(lambda _: 1.0)
    return total(lambda d: d) / mass + math.log(total(lambda d: math.exp(-d)) / mass)


@pytest.mark.parametrize(
    ("variance", "mean", "gap"),
    [(0.005, 0.0, 0.1), (0.3, 0.1, -0.4), (0.3, -2.0, 1.0), (2.0, 0.8, 0.0), (8.0, 4.0, -1.5), (8.0, 0.0, 3.0)],
)
def test_equals_the_integral_over_the_stated_law(variance, mean, gap):
    assert shape(variance, mean, -4.0, -4.0 - gap) == pytest.approx(integrated(variance, mean, gap), rel=1e-6)


def test_where_q_could_list_none_of_them_it_is_half_the_variance():
    assert shape(2.0, 0.5, -20.0, -3.0) == pytest.approx(TAIL_SPREAD, rel=1e-3)


def test_small_differences_are_hardly_cut_off_and_large_ones_are():
    assert shape(0.005, 0.0) > 0.97 * TAIL_SPREAD * 0.005 / 2
    assert shape(8.0, 4.0) < 0.85 * TAIL_SPREAD * 8.0 / 2


@given(
    st.sampled_from([0.0, 1e-300, 1e-14, 1e-6, 0.01, 1.0, 40.0, 1e4, 1e8]),
    st.floats(-1e3, 1e3),
    st.floats(-690.0, 0.0),
    st.floats(-690.0, 0.0),
)
def test_lies_between_nothing_and_half_the_variance(variance, mean, log_cap, log_cap_other):
    assert 0.0 <= shape(variance, mean, log_cap, log_cap_other) <= TAIL_SPREAD * variance / 2


def test_large_noise_leaves_less_in_the_tail_than_half_its_variance():
    logp, logq = gaussian_pair(2, 300, 20_000, 2.5)
    aligned = align(top_lists(logp, 20), top_lists(logq, 20))
    outside = (logp < aligned.log_cap_p[:, None]) & (logq < aligned.log_cap_q[:, None])
    p, q, d = np.where(outside, np.exp(logp), 0.0), np.where(outside, np.exp(logq), 0.0), logp - logq
    x, y = p.sum(axis=1), q.sum(axis=1)
    true = (p * d).sum(axis=1) / x - np.log(x / y)
    spread = np.full(300, 2.5**2)
    found = tail_shape(spread / TAIL_SPREAD, d.mean(axis=1), aligned.log_cap_p, aligned.log_cap_q)
    assert x @ true < 0.85 * x @ spread / 2
    assert x @ found == pytest.approx(x @ true, rel=0.15)
