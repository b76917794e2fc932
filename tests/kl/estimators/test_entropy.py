"""Entropies from a list."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kl.estimators.entropy import entropies
from tests.kl.pairs import gaussian_pair


def listed(logs, k):
    order = -np.sort(-logs, axis=1)[:, :k]
    return order, order[:, -1], np.exp(order).sum(axis=1)


@given(st.integers(0, 2**32 - 1), st.integers(1, 40))
def test_the_true_entropy_lies_between_the_limits(seed, k):
    logs, _ = gaussian_pair(seed, 10, 40, 1.0, zipf=1.0)
    true = -(np.exp(logs) * logs).sum(axis=1)
    found = entropies(*listed(logs, k), vocabulary=40)
    assert (found.rest_cell <= true + 1e-9).all()
    assert (found.rest_cell <= found.lower + 1e-9).all() or k == 40
    assert (found.lower <= true + 1e-9).all()
    assert (found.upper >= true - 1e-9).all()


def test_by_hand():
    # .5 and .2 listed, rest .3: as one cell; as .2 and .1; spread over 3 tokens.
    found = entropies(np.log([[0.5, 0.2]]), np.log([0.2]), np.array([0.7]), vocabulary=5)
    head = -0.5 * np.log(0.5) - 0.2 * np.log(0.2)
    assert found.rest_cell[0] == pytest.approx(head - 0.3 * np.log(0.3))
    assert found.lower[0] == pytest.approx(head - 0.2 * np.log(0.2) - 0.1 * np.log(0.1))
    assert found.upper[0] == pytest.approx(head - 0.3 * np.log(0.1))


def test_without_a_vocabulary_there_is_no_upper_limit():
    assert np.isnan(entropies(np.log([[0.5, 0.2]]), np.log([0.2]), np.array([0.7])).upper[0])


def test_a_certain_token_has_none():
    found = entropies(np.array([[1e-7]]), np.array([1e-7]), np.exp([1e-7]), vocabulary=5)
    assert [values[0] for values in found] == [0.0, 0.0, 0.0]
