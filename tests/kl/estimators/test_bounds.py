"""The certified bounds against whole distributions, a slow reference and a general optimiser."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kl.estimators.align import align
from kl.estimators.bounds import bucket, cells, lower_bounds
from kl.records import Candidate
from tests.kl.estimators import slow_bounds
from tests.kl.pairs import candidates, gaussian_pair, top_lists, true_divergences

NAMES = ("kl", "reverse_kl", "js", "tv")


@st.composite
def pairs(draw):
    """Whole distributions and lists of unequal length: peaked or flat, near or far, float32 or float64."""
    vocabulary = draw(st.integers(2, 40))
    logp, logq = gaussian_pair(
        draw(st.integers(0, 2**32 - 1)),
        20,
        vocabulary,
        draw(st.sampled_from([0.0, 0.05, 0.5, 2.0, 8.0])),
        zipf=draw(st.sampled_from([0.0, 1.0, 3.0])),
        spread=draw(st.sampled_from([0.1, 1.5, 6.0])),
    )
    if draw(st.booleans()):
        logp, logq = logp.astype(np.float32).astype(float), logq.astype(np.float32).astype(float)
    return logp, logq, draw(st.integers(1, vocabulary)), draw(st.integers(1, vocabulary))


@given(pairs())
@settings(max_examples=150, deadline=None)
def test_bucket_is_below_lower_and_lower_is_below_the_true_value(case):
    logp, logq, k_p, k_q = case
    cell = cells(align(top_lists(logp, k_p), top_lists(logq, k_q)))
    for name, low, grouped, true in zip(
        NAMES, lower_bounds(cell), bucket(cell), true_divergences(logp, logq), strict=True
    ):
        assert (low <= true + 1e-6).all(), name
        assert (grouped <= low + 1e-9).all(), name
        assert (low >= 0).all(), name


@given(pairs())
@settings(max_examples=50, deadline=None)
def test_bounds_are_the_true_values_when_nothing_is_hidden(case):
    logp, logq, _, _ = case
    vocabulary = logp.shape[1]
    cell = cells(align(top_lists(logp, vocabulary), top_lists(logq, vocabulary)), slack=1e-9)
    for low, true in zip(lower_bounds(cell), true_divergences(logp, logq), strict=True):
        # Rests differ by the rounding of the source, at most 1e-6 in float32.
        rounding = np.maximum(np.abs(1 - np.exp(logp).sum(axis=1)), np.abs(1 - np.exp(logq).sum(axis=1)))
        assert (np.abs(low - true) <= 5e-8 + 20 * rounding).all()


@given(pairs())
@settings(max_examples=40, deadline=None)
def test_lower_bounds_equal_a_bisection_over_the_one_unknown_ratio(case):
    logp, logq, k_p, k_q = case
    lists_p, lists_q = top_lists(logp, k_p), top_lists(logq, k_q)
    low = lower_bounds(cells(align(lists_p, lists_q), slack=1e-9))
    for t in range(5):
        slow = slow_bounds.lower(
            {c.token: np.exp(c.logprob) for c in lists_p[t]}, {c.token: np.exp(c.logprob) for c in lists_q[t]}, 1e-9
        )
        # Masses that are 1 up to rounding can make a sum of -1e-8; the bounds end at 0.
        assert [values[t] for values in low] == pytest.approx([max(value, 0) for value in slow], rel=1e-8, abs=1e-8)


def completions(logp, logq, k_p, k_q):
    """The smallest divergences over all whole distributions with these lists, by a general optimiser."""
    p, q = np.exp(logp), np.exp(logq)
    hidden_p, hidden_q = np.argsort(-p)[k_p:], np.argsort(-q)[k_q:]
    cap_p, cap_q = np.sort(p)[-k_p], np.sort(q)[-k_q]
    n_p, n_q = len(hidden_p), len(hidden_q)

    def filled(free):
        whole_p, whole_q = p.copy(), q.copy()
        whole_p[hidden_p], whole_q[hidden_q] = free[:n_p], free[n_p:]
        return np.maximum(whole_p, 1e-15), np.maximum(whole_q, 1e-15)

    def kl_of(free):
        whole_p, whole_q = filled(free)
        return float((whole_p * np.log(whole_p / whole_q)).sum())

    def reverse_of(free):
        whole_p, whole_q = filled(free)
        return float((whole_q * np.log(whole_q / whole_p)).sum())

    def js_of(free):
        whole_p, whole_q = filled(free)
        middle = np.log((whole_p + whole_q) / 2)
        return float((whole_p * (np.log(whole_p) - middle) + whole_q * (np.log(whole_q) - middle)).sum() / 2)

    true = np.concatenate([p[hidden_p], q[hidden_q]])
    even = np.concatenate([np.full(n_p, p[hidden_p].sum() / n_p), np.full(n_q, q[hidden_q].sum() / n_q)])
    equations = [
        ([1.0] * n_p + [0.0] * n_q, p[hidden_p].sum()),
        ([0.0] * n_p + [1.0] * n_q, q[hidden_q].sum()),
    ]
    upper = np.concatenate([np.full(n_p, cap_p), np.full(n_q, cap_q)])
    return [
        slow_bounds.optimise(terms, (true, even, (true + even) / 2), np.full(n_p + n_q, 1e-14), upper, equations)
        for terms in (kl_of, reverse_of, js_of)
    ]


@pytest.mark.parametrize("noise", [0.3, 1.5, 4.0], ids=["near", "apart", "far"])
@pytest.mark.parametrize("k", [(1, 1), (2, 3), (4, 2), (3, 3)], ids=lambda k: f"k{k[0]}-{k[1]}")
def test_no_completion_of_the_lists_is_below_the_lower_bound_and_one_reaches_it(noise, k):
    for seed in range(4):
        logp, logq = gaussian_pair(seed, 1, 7 + seed, noise, zipf=0.7)
        low = lower_bounds(cells(align(top_lists(logp, k[0]), top_lists(logq, k[1])), slack=1e-9))
        found = completions(logp[0], logq[0], *k)
        for name, bound, smallest in zip(NAMES, low, found, strict=False):
            assert -1e-6 <= smallest - bound[0] <= 1e-4, (name, seed)


CORNERS = {
    "Q's caps fill its rest": (candidates(a=np.log(0.6), b=np.log(0.2)), candidates(c=np.log(0.5), a=np.log(0.3))),
    "disjoint": (candidates(a=np.log(0.5), b=np.log(0.3)), candidates(c=np.log(0.5), d=np.log(0.3))),
    "disjoint and both rests short": (
        candidates(a=np.log(0.6), b=np.log(0.399)),
        candidates(c=np.log(0.7), d=np.log(0.299)),
    ),
    "one token each": (candidates(a=np.log(0.9)), candidates(b=np.log(0.8))),
    "certain and elsewhere": (candidates(a=0.0), candidates(b=0.0)),
    "certain and listed": (candidates(a=0.0), candidates(a=np.log(0.5), b=np.log(0.4))),
    "unequal lengths": (candidates(a=np.log(0.7)), candidates(a=np.log(0.4), b=np.log(0.3), c=np.log(0.2))),
    "below the smallest float": (candidates(a=-1e-9, b=-900.0), candidates(b=-0.01, c=-800.0)),
}


@pytest.mark.parametrize("lists", CORNERS.values(), ids=CORNERS.keys())
def test_corners_are_finite_and_swap(lists):
    top_p, top_q = lists
    there, back = (lower_bounds(cells(align([one], [other]))) for one, other in ((top_p, top_q), (top_q, top_p)))
    assert all(np.isfinite(values).all() and (values >= 0).all() for values in there)
    assert there.kl == pytest.approx(back.reverse_kl, rel=1e-9, abs=1e-9)
    assert there.reverse_kl == pytest.approx(back.kl, rel=1e-9, abs=1e-9)
    assert there.js == pytest.approx(back.js, abs=1e-9)
    assert there.tv == pytest.approx(back.tv, abs=1e-9)


@pytest.mark.parametrize("lists", [CORNERS[name] for name in list(CORNERS)[:-1]], ids=list(CORNERS)[:-1])
def test_corners_equal_the_slow_reference(lists):
    top_p, top_q = lists
    slow = slow_bounds.lower(
        {c.token: np.exp(c.logprob) for c in top_p}, {c.token: np.exp(c.logprob) for c in top_q}, 1e-6
    )
    low = lower_bounds(cells(align([top_p], [top_q])))
    assert [values[0] for values in low] == pytest.approx(slow, rel=1e-7, abs=1e-8)


def test_a_mass_above_one_by_rounding_is_a_rest_of_zero():
    top_p = candidates(a=np.log(0.7 + 1e-6), b=np.log(0.3))
    top_q = candidates(a=np.log(0.6), c=np.log(0.4 + 1e-6))
    cell = cells(align([top_p], [top_q]))
    assert cell.rest_p[0] == 0.0
    assert cell.rest_q[0] == 0.0
    # b has at most the slack left under Q: 0.3 log(0.3 / 1e-6) = 3.78, and a adds 0.7 log(0.7 / 0.6) = 0.108.
    assert lower_bounds(cell).kl[0] == pytest.approx(3.8911, abs=1e-3)


def test_a_slack_of_zero_is_refused():
    with pytest.raises(ValueError, match="slack"):
        cells(align([candidates(a=-0.1)], [candidates(a=-0.1)]), slack=0.0)


def colliding(logs, k, n_texts):
    """Lists by text without ids, in which the tokens i and i + n_texts have one text."""
    order = np.argsort(-logs, axis=1, kind="stable")[:, :k]
    return [
        tuple(Candidate(f"t{i % n_texts}", float(row[i])) for i in ids) for ids, row in zip(order, logs, strict=True)
    ]


@given(st.integers(0, 2**32 - 1), st.integers(1, 12), st.integers(1, 12), st.sampled_from([0.1, 1.0, 4.0]))
@settings(max_examples=100, deadline=None)
def test_bounds_hold_when_a_list_repeats_a_text(seed, k_p, k_q, noise):
    logp, logq = gaussian_pair(seed, 20, 14, noise, zipf=0.8)
    # Only a text that is listed twice betrays itself; one that each side lists once is taken to be one token.
    lists_p, lists_q = colliding(logp, k_p, 13), colliding(logq, k_q, 13)
    seen = [
        {c.token for c in (*top_p, *top_q) if c.token == "t0"} for top_p, top_q in zip(lists_p, lists_q, strict=True)
    ]
    twice = [
        any([c.token for c in top].count("t0") == 2 for top in pair) or not seen[t]
        for t, pair in enumerate(zip(lists_p, lists_q, strict=True))
    ]
    low = lower_bounds(cells(align(lists_p, lists_q)))
    for values, true in zip(low, true_divergences(logp, logq), strict=True):
        assert (values[twice] <= true[twice] + 1e-6).all()


@given(st.integers(0, 2**32 - 1), st.integers(1, 9), st.integers(1, 9), st.sampled_from([0.1, 1.0, 4.0]))
@settings(max_examples=100, deadline=None)
def test_bounds_hold_when_tokens_cannot_be_told_apart(seed, k_p, k_q, noise):
    logp, logq = gaussian_pair(seed, 20, 12, noise, zipf=0.8)
    unclear = [
        [
            tuple(c._replace(token="\ufffd", token_id=None) if c.token_id in (0, 1, 5) else c for c in top)
            for top in side
        ]
        for side in (top_lists(logp, k_p), top_lists(logq, k_q))
    ]
    low = lower_bounds(cells(align(*unclear)))
    for values, true in zip(low, true_divergences(logp, logq), strict=True):
        assert (values <= true + 1e-6).all()


class TestTies:
    """Of two tokens with one probability either may be listed: a cap is what an unlisted token may have, too."""

    def pair(self):
        p = candidates(a=np.log(0.4), b=np.log(0.2), c=np.log(0.1))
        return p, candidates(a=np.log(0.4), b=np.log(0.2), d=np.log(0.1))

    def test_equal_models_that_list_another_of_two_equal_tokens_differ_by_nothing(self):
        low = lower_bounds(cells(align([self.pair()[0]], [self.pair()[1]])))
        assert [values[0] for values in low] == pytest.approx([0.0] * 4, abs=1e-12)

    def test_the_order_of_equal_entries_changes_nothing(self):
        logs = np.log([0.3, 0.2, 0.2, 0.1, 0.1])
        p = tuple(Candidate(f"t{i}", value, i) for i, value in enumerate(logs))
        q = tuple(Candidate(f"t{i}", value, i) for i, value in zip((0, 2, 1, 4, 3), logs, strict=True))
        low, other = lower_bounds(cells(align([p], [q]))), lower_bounds(cells(align([q], [p])))
        assert [values[0] for values in (*low, *other)] == pytest.approx([0.0] * 8, abs=1e-12)

    def test_bounds_hold_whichever_of_equal_tokens_are_listed(self):
        for seed in range(20):
            logits = [np.round(2 * logs) / 2 for logs in gaussian_pair(seed, 60, 14, 1.0, zipf=0.5)]
            logp, logq = (logs - np.log(np.exp(logs).sum(axis=1, keepdims=True)) for logs in logits)
            rng = np.random.default_rng(seed)
            order = rng.permutation(14)  # equal tokens are listed in another order on either side
            lists_q = [
                tuple(c._replace(token=f"t{order[c.token_id]}", token_id=int(order[c.token_id])) for c in top)
                for top in top_lists(logq[:, order], 5)
            ]
            low = lower_bounds(cells(align(top_lists(logp, 4), lists_q)))
            for values, true in zip(low, true_divergences(logp, logq), strict=True):
                assert (values <= true + 1e-9).all()


class TestMassesThatAreNoMasses:
    """Values that are all too large by a constant, or rounded: what a bound may be off by is stated."""

    SHAPES = ((4, 3, 2000, 20), (8, 4, 200, 20), (2, 2, 20, 20), (1, 1, 6, 6), (1.6, 1.5, 2000, 20))

    @pytest.mark.parametrize("shift", [1e-4, 2.5e-4, 1e-3])
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_equal_models_differ_by_less_than_the_constant(self, shape, shift):
        zipf, spread, vocabulary, k = shape
        exact = top_lists(gaussian_pair(3, 200, vocabulary, 0.0, zipf=zipf, spread=spread)[0], k)
        shifted = [tuple(c._replace(logprob=c.logprob + shift) for c in top) for top in exact]
        for lists in ((shifted, exact), (exact, shifted)):
            cell = cells(align(*lists))
            low = lower_bounds(cell)
            assert max(values.max() for values in low[:3]) <= shift
            above = cell.mass_above_1_p | cell.mass_above_1_q
            coverage = np.array([np.exp([c.logprob for c in top]).sum() for top in shifted])
            np.testing.assert_array_equal(above, coverage > 1 + 1e-6)

    @pytest.mark.parametrize("decimals", [2, 3, 4])
    @pytest.mark.parametrize("noise", [0.0, 0.3, 2.0])
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_rounded_lists_move_a_bound_by_a_step_at_most(self, shape, noise, decimals):
        zipf, spread, vocabulary, k = shape
        step = 10.0**-decimals
        logp, logq = gaussian_pair(5, 150, vocabulary, noise, zipf=zipf, spread=spread)
        lists = top_lists(logp, k), top_lists(logq, k)
        rounded = [
            [tuple(c._replace(logprob=round(c.logprob, decimals)) for c in top) for top in side] for side in lists
        ]
        true = true_divergences(logp, logq)
        for pair in ((rounded[0], rounded[1]), (rounded[0], lists[1]), (lists[0], rounded[1])):
            low = lower_bounds(cells(align(*pair)))
            for name, values, exact in zip(NAMES, low, true, strict=True):
                assert (values <= exact + step * (1 + true[0] + true[1])).all(), name
            if not noise:
                assert max(values.max() for values in low[:3]) <= step / 2

    def test_a_list_of_its_own_mass_is_not_touched(self):
        logp, logq = gaussian_pair(5, 50, 300, 0.3)
        cell = cells(align(top_lists(logp, 20), top_lists(logq, 20)))
        assert (cell.slack == 1e-6).all()
        assert not (cell.mass_above_1_p | cell.mass_above_1_q).any()


def test_responses_together_are_measured_as_each_by_itself():
    whole = top_lists(gaussian_pair(3, 6, 20, 0.0)[0], 20)
    above = [
        tuple(c._replace(logprob=c.logprob + by) for c in top)
        for top, by in zip(whole, [0, 2e-4, 0, 0, 1e-4, 3e-3], strict=True)
    ]
    lists = align(above, whole)
    together = cells(replace(lists, response=np.array([0, 0, 1, 3, 3, 3]), step_q=np.array([0, 0, 0.01, 0, 0, 0])))
    assert together.slack == pytest.approx([2e-4, 2e-4, 5e-3, 1e-3, 1e-3, 3e-3], rel=1e-2)
    for rows in ([0, 1], [3, 4, 5]):
        np.testing.assert_array_equal(together.slack[rows], cells(lists.only(rows)).slack)


def test_caps_above_what_is_listed_give_the_bounds_of_longer_lists_or_less():
    logp, logq = gaussian_pair(9, 200, 12, 1.5, zipf=0.5)
    short = align(top_lists(logp, 4), top_lists(logq, 4))
    limits = {"log_cap_p": short.logp[:, 1], "log_cap_q": short.logq[:, 2]}
    raised, plain = lower_bounds(cells(replace(short, **limits))), lower_bounds(cells(short))
    for less, more in zip(raised, plain, strict=True):
        assert (less <= more + 1e-12).all()
    # The second and third are left out of lists whose caps allow them: still below the truth.
    gaps_p = [(top[0], *top[2:]) for top in top_lists(logp, 4)]
    gaps_q = [(*top[:2], top[3]) for top in top_lists(logq, 4)]
    low = lower_bounds(cells(replace(align(gaps_p, gaps_q), **limits)))
    for values, true in zip(low, true_divergences(logp, logq), strict=True):
        assert (values <= true + 1e-9).all()
