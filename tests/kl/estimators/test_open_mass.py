"""Entries whose token is not known: bounds hold whichever tokens they are."""

from itertools import permutations

import numpy as np
import pytest

from kl.estimators.align import align
from kl.estimators.bounds import bucket, cells, lower_bounds
from kl.estimators.entropy import entropies
from kl.records import Candidate
from tests.kl.estimators import slow_bounds
from tests.kl.pairs import gaussian_pair, true_divergences

NAMES = ("kl", "reverse_kl", "js", "tv")


def hidden_lists(rng, logs, k, most):
    """Lists of each row's k best, up to ``most`` entries of each without a text, and which tokens the list names."""
    order = np.argsort(-logs, axis=1, kind="stable")[:, :k]
    hidden = np.argsort(rng.random(order.shape), axis=1) < rng.integers(0, most + 1, (len(logs), 1))
    lists = [
        tuple(Candidate("" if is_hidden else f"t{i}", float(row[i])) for i, is_hidden in zip(ids, hide, strict=True))
        for ids, hide, row in zip(order, hidden, logs, strict=True)
    ]
    named = np.zeros(logs.shape, dtype=bool)
    np.put_along_axis(named, order, ~hidden, axis=1)
    return lists, named


def shuffled(rng, logs, named):
    """The same lists from another distribution: what is not named changes its place at random, row by row."""
    places = np.argsort(np.where(named, np.inf, rng.random(logs.shape)), axis=1, kind="stable")
    sources = np.argsort(np.where(named, np.inf, 0.0), axis=1, kind="stable")
    moved = logs.copy()
    np.put_along_axis(moved, places, np.take_along_axis(logs, sources, axis=1), axis=1)
    return moved


def drawn_pair(seed, n, vocabulary, noise, step):
    """Whole distributions; with a ``step``, logits are rounded to it and many tokens tie."""
    logp, logq = gaussian_pair(seed, n, vocabulary, noise, zipf=0.8)
    if not step:
        return logp, logq
    rounded = [np.round(logs / step) * step for logs in (logp, logq)]
    return tuple(logs - np.log(np.exp(logs).sum(axis=1, keepdims=True)) for logs in rounded)


@pytest.mark.parametrize("vocabulary", [5, 8, 14])
@pytest.mark.parametrize("step", [0.0, 0.5], ids=["distinct", "ties"])
@pytest.mark.parametrize("noise", [0.0, 0.3, 3.0], ids=["equal", "near", "far"])
def test_bounds_hold_for_the_hidden_tokens_and_for_any_others(vocabulary, step, noise):
    rng = np.random.default_rng(vocabulary)
    for k_p, k_q in ((1, 2), (3, 3), (4, 5)):
        logp, logq = drawn_pair(k_p * vocabulary, 300, vocabulary, noise, step)
        lists_p, named_p = hidden_lists(rng, logp, k_p, min(3, k_p))
        lists_q, named_q = hidden_lists(rng, logq, k_q, min(3, k_q))
        cell = cells(align(lists_p, lists_q))
        low, grouped = lower_bounds(cell), bucket(cell)
        for _ in range(12):
            for name, bound, less, true in zip(NAMES, low, grouped, true_divergences(logp, logq), strict=True):
                assert (bound <= true + 1e-9).all(), name
                assert (less <= bound + 1e-9).all(), name
            logp, logq = shuffled(rng, logp, named_p), shuffled(rng, logq, named_q)


def every_order(logs, named):
    """All distributions with the same list: what is not named, in every order."""
    free = np.flatnonzero(~named)
    orders = np.array(list(permutations(free)))
    whole = np.repeat(logs[None, :], len(orders), axis=0)
    whole[:, free] = logs[orders]
    return whole


def test_bounds_hold_for_every_assignment():
    rng = np.random.default_rng(1)
    n_open = 0
    for seed in range(60):
        logp, logq = drawn_pair(seed, 1, 6, [0.0, 0.5, 2.0][seed % 3], 0.5 * (seed % 2))
        k_p, k_q = rng.integers(2, 6, 2)
        lists_p, named_p = hidden_lists(rng, logp, k_p, min(3, k_p - 1))
        lists_q, named_q = hidden_lists(rng, logq, k_q, min(3, k_q - 1))
        n_open += bool(sum(not c.token for c in (*lists_p[0], *lists_q[0])))
        all_p, all_q = every_order(logp[0], named_p[0]), every_order(logq[0], named_q[0])
        pairs = np.repeat(all_p, len(all_q), axis=0), np.tile(all_q, (len(all_p), 1))
        low = lower_bounds(cells(align(lists_p, lists_q)))
        for name, bound, true in zip(NAMES, low, true_divergences(*pairs), strict=True):
            assert bound[0] <= true.min() + 1e-9, (name, seed)
    assert n_open > 40


@pytest.mark.parametrize("seed", range(12))
def test_the_completion_is_the_smallest_in_which_open_entries_are_shared_out(seed):
    rng = np.random.default_rng(seed)
    logp, logq = gaussian_pair(seed, 1, 9, 2.0, zipf=0.5)
    lists_p, _ = hidden_lists(rng, logp, 4, 2)
    lists_q, _ = hidden_lists(rng, logq, 4 + seed % 2, 2)
    cell = cells(align(lists_p, lists_q), slack=1e-9)
    a, b = cell.a.mass, cell.b.mass
    sides = [(b, lists_p[0], cell.total_p[0]), (a, lists_q[0], cell.total_q[0])]
    n_x, n_y = len(b), len(a)

    # x and y in two parts each: what an unlisted token may have, and what only an open entry has.
    def value(free):
        parts = np.split(np.maximum(free, 1e-15), np.cumsum([n_x, n_x, 1, 1, n_y, n_y, 1]))
        low_x, high_x, out_p, _, low_y, high_y, out_q, _ = parts
        x, y = low_x + high_x, low_y + high_y
        hidden = (a * np.log(a / y)).sum() + (x * np.log(x / b)).sum() + (out_p * np.log(out_p / out_q)).sum()
        return float(cell.shared.kl[0] + hidden)

    uppers, rows, totals, start = [], [], [], []
    for weights, top, total in sides:
        n, cap = len(weights), np.exp(top[-1].logprob)
        opened = np.array([np.exp(c.logprob) - cap for c in top if not c.token] or [0.0])
        uppers += [[cap] * n, [opened.max()] * n, [total], [opened.sum() + 1e-12]]
        shares, above = [1.0] * (2 * n + 1) + [0.0], [0.0] * n + [1.0] * n + [0.0, 1.0]
        rows += [shares, above]
        totals += [total, opened.sum()]
        low = min(cap, total / (2 * n + 1)) / 2
        start += [[low] * n, [1e-13] * n, [total - n * low], [opened.sum()]]
    width = 2 * n_x + 2
    padded = [row + [0.0] * (2 * n_y + 2) if at < 2 else [0.0] * width + row for at, row in enumerate(rows)]
    upper = np.maximum(np.concatenate(uppers), 1e-12)
    equations = list(zip(padded, totals, strict=True))
    found = slow_bounds.optimise(value, [np.concatenate(start)], np.full(len(upper), 0.0), upper, equations)
    assert -1e-6 <= found - lower_bounds(cell).kl[0] <= 1e-4


def test_a_side_that_hides_entries_of_equal_lists_differs_by_nothing():
    rng = np.random.default_rng(3)
    logs, _ = gaussian_pair(3, 500, 40, 0.0)
    hidden, _ = hidden_lists(rng, logs, 12, 3)
    open_lists, _ = hidden_lists(rng, logs, 12, 0)
    for lists in ((hidden, open_lists), (open_lists, hidden), (hidden, hidden)):
        low = lower_bounds(cells(align(*lists)))
        assert max(values.max() for values in low[:3]) <= 1e-12
        assert low.tv.max() <= 1e-9


def test_exchanging_the_sides_exchanges_the_divergences():
    rng = np.random.default_rng(4)
    logp, logq = gaussian_pair(4, 200, 14, 1.0, zipf=0.6)
    lists_p, _ = hidden_lists(rng, logp, 6, 3)
    lists_q, _ = hidden_lists(rng, logq, 7, 3)
    there, back = lower_bounds(cells(align(lists_p, lists_q))), lower_bounds(cells(align(lists_q, lists_p)))
    np.testing.assert_allclose(there.kl, back.reverse_kl, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(there.reverse_kl, back.kl, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(there.js, back.js, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(there.tv, back.tv, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("step", [0.0, 0.5], ids=["distinct", "ties"])
def test_entropies_hold_where_tokens_are_hidden(step):
    logp, _ = drawn_pair(2, 400, 9, 0.0, step)
    lists, _ = hidden_lists(np.random.default_rng(2), logp, 5, 3)
    aligned = align(lists, lists)
    found = entropies(aligned.logp, aligned.log_limit_p, aligned.coverage_p, vocabulary=9)
    true = -(np.exp(logp) * logp).sum(axis=1)
    assert (found.rest_cell <= true + 1e-9).all()
    assert (found.lower <= true + 1e-9).all()
    assert (found.upper >= true - 1e-9).all()
