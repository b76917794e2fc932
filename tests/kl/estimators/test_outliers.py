"""Values that their own lists contradict are found; real differences, however large, are not."""

from dataclasses import dataclass

import numpy as np
import pytest

from kl.estimators.align import align
from kl.estimators.censored import SpreadPrior
from kl.estimators.comparison import compare
from kl.estimators.divergence import exact_kl
from kl.estimators.outliers import find_outliers
from tests.kl.estimators import slow_outliers
from tests.kl.pairs import gaussian_pair, log_softmax, top_lists
from tests.kl.wrong_values import with_wrong

ROWS, K = 60, 20


@pytest.fixture(scope="module")
def quiet():
    """Two models that differ by .06 nats, as after rounding to 8 bits."""
    return gaussian_pair(3, ROWS, 3000, 0.06, zipf=1.2, spread=1.3)


def certain(found):
    return [item.row for item in found.outliers if item.certain]


@dataclass(frozen=True)
class Wrong:
    id: str
    entry: int
    by: float
    side: str


CASES = [
    Wrong("the most probable token of P lower", 0, -3.0, "P"),
    Wrong("the most probable token of Q lower", 0, -3.0, "Q"),
    Wrong("one in the middle lower", 7, -6.0, "P"),
    Wrong("one in the middle of Q lower", 9, -3.0, "Q"),
    Wrong("the last lower", 19, -3.0, "Q"),
    Wrong("the last much lower", 19, -95.0, "P"),
    Wrong("the last higher", 19, 3.0, "Q"),
    Wrong("one in the middle higher", 8, 3.0, "P"),
]


@pytest.mark.parametrize("k", [10, K])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_a_wrong_value_is_found(quiet, case, k):
    lists = {"P": top_lists(quiet[0], k), "Q": top_lists(quiet[1], k)}
    clean = compare(lists["P"], lists["Q"])
    lists[case.side] = with_wrong(lists[case.side], 5, min(case.entry, k - 1), case.by)
    found = compare(lists["P"], lists["Q"])
    assert certain(found) == [5]
    assert np.isnan([found.kl_estimate[5], found.kl_lower[5], found.js_lower[5], found.tv_lower[5]]).all()
    np.testing.assert_allclose(np.delete(found.kl_estimate, 5), np.delete(clean.kl_estimate, 5), rtol=0.1)


def test_two_wrong_values_of_one_position_are_found(quiet):
    lists_q = with_wrong(with_wrong(top_lists(quiet[1], K), 8, 3, -20.0), 8, 3, -40.0)
    assert certain(compare(top_lists(quiet[0], K), lists_q)) == [8]


def test_the_side_is_named_where_the_list_itself_says_it(quiet):
    lists_p = top_lists(quiet[0], K)
    wrong = lists_p[5][19]
    found = compare(with_wrong(lists_p, 5, 19, -30.0), top_lists(quiet[1], K)).outliers
    assert [(item.row, item.side) for item in found] == [(5, "P")]
    assert found[0].logp == pytest.approx(wrong.logprob - 30.0)


@pytest.mark.parametrize("noise", [0.02, 0.1, 0.5, 1.5])
@pytest.mark.parametrize("k", [5, 10, 20, 50])
def test_models_that_differ_contradict_nothing(noise, k):
    logp, logq = gaussian_pair(11, 300, 3000, noise)
    assert certain(compare(top_lists(logp, k), top_lists(logq, k))) == []


@pytest.mark.parametrize("k", [5, 7, 10])
def test_lists_that_leave_nothing_over_contradict_nothing(k):
    """One token has all but 1e-10: what the others would leave over is the rounding of the sum."""
    logp, logq = gaussian_pair(2, 300, 2000, 1.5, zipf=1.3, spread=0.8)
    logq[:, 1500] += 30.0
    assert certain(compare(top_lists(logp, k), top_lists(log_softmax(logq), k))) == []


@pytest.mark.parametrize("noise", [0.1, 1.5])
@pytest.mark.parametrize("k", [10, 20, 50])
def test_entries_without_a_name_contradict_nothing(noise, k):
    logp, logq = gaussian_pair(11, 300, 3000, noise)
    shown = [tuple(c._replace(token_id=None) for c in top) for top in top_lists(logq, k)]
    hidden = [
        tuple(c._replace(token="" if at in (0, 4, 7) else c.token, token_id=None) for at, c in enumerate(top))
        for top in top_lists(logp, k)
    ]
    assert certain(compare(hidden, shown)) == certain(compare(shown, hidden)) == []


@pytest.mark.parametrize("rank", [0, 3, 12, 19, 40])
@pytest.mark.parametrize("by", [-1000.0, -8.0, -3.0, 3.0, 8.0])
@pytest.mark.parametrize("side", [0, 1], ids=["P", "Q"])
def test_one_token_that_a_model_really_changes_keeps_counting(quiet, rank, by, side):
    """A logit bias, a suppressed token: the others take what it loses."""
    pair = [quiet[0].copy(), quiet[1].copy()]
    token = np.argsort(-pair[side], axis=1)[:, rank]
    pair[side][np.arange(ROWS), token] += by
    pair[side] = log_softmax(np.maximum(pair[side], -900.0))
    found = compare(*(top_lists(logs, K) for logs in pair))
    assert certain(found) == []
    assert not np.isnan(found.kl_estimate).any()


@pytest.fixture(scope="module")
def whole():
    """Two models that differ by .1 nats; a tenth of the mass is on tokens behind the 50 best."""
    return gaussian_pair(0, ROWS, 2000, 0.1, zipf=1.3, spread=0.8)


@pytest.mark.parametrize("k", [10, K, 50])
@pytest.mark.parametrize("ranks", [*((1, rank) for rank in (2, 3, 5, 8, 11, 15, 20, 21, 30, 45, 60)), (2, 60)], ids=str)
def test_tokens_that_another_model_exchanges_keep_counting(whole, ranks, k):
    """Q prefers another word: what the one loses the other takes, and nothing else moves."""
    logp, logq = whole[0], whole[1].copy()
    first, second = (np.argsort(-logp, axis=1)[:, rank - 1 : rank] for rank in ranks)
    values = [np.take_along_axis(logq, tokens, axis=1) for tokens in (first, second)]
    np.put_along_axis(logq, first, values[1], axis=1)
    np.put_along_axis(logq, second, values[0], axis=1)
    lists = top_lists(logp, k), top_lists(logq, k)
    assert certain(compare(*lists)) == certain(compare(*lists[::-1])) == []


@pytest.mark.parametrize("unnamed", [0, 3, 12])
def test_tokens_that_are_exchanged_keep_counting_where_one_has_no_name(whole, unnamed):
    """The one that takes what the other loses may be the one that its list does not name."""
    logp, logq = whole[0], whole[1].copy()
    order = np.argsort(-logp, axis=1)
    for one, other in ((order[:, 0], order[:, 60]), (order[:, 60], order[:, 0])):
        logq[np.arange(ROWS), one] = whole[1][np.arange(ROWS), other]
    shown = [tuple(c._replace(token_id=None) for c in top) for top in top_lists(logp, K)]
    hidden = [
        tuple(c._replace(token="" if at == unnamed else c.token, token_id=None) for at, c in enumerate(top))
        for top in top_lists(logq, K)
    ]
    assert certain(compare(shown, hidden)) == certain(compare(hidden, shown)) == []


@pytest.mark.parametrize("n", [2, 5])
def test_a_token_that_gives_way_to_several_keeps_counting(whole, n):
    logp, q = whole[0], np.exp(whole[1])
    order = np.argsort(-logp, axis=1)
    moved = 0.97 * np.take_along_axis(q, order[:, :1], axis=1)
    np.put_along_axis(q, order[:, :1], moved / 0.97 - moved, axis=1)
    takers = order[:, 60 : 60 + 7 * n : 7]
    np.put_along_axis(q, takers, np.take_along_axis(q, takers, axis=1) + moved / n, axis=1)
    assert certain(compare(top_lists(logp, K), top_lists(np.log(q), K))) == []


@pytest.mark.parametrize("temperature", [0.33, 0.5, 0.7, 1.5, 2.0, 3.0])
@pytest.mark.parametrize("k", [10, K, 50])
def test_another_temperature_contradicts_nothing(temperature, k):
    logp, logq = gaussian_pair(3, 150, 3000, 0.1, zipf=1.3, spread=0.8)
    lists = top_lists(logp, k)
    assert certain(compare(lists, top_lists(log_softmax(logp / temperature), k))) == []
    assert certain(compare(top_lists(log_softmax(logq / temperature), k), lists)) == []


def test_both_lists_may_have_the_same_gap():
    """Twenty tokens that matter before many that do not: no entry of the list is below the others by mistake."""
    rng = np.random.default_rng(5)
    logits = np.concatenate([rng.normal(4, 0.2, (50, K - 1)), rng.normal(0, 0.1, (50, 2000))], axis=1)
    logp, logq = log_softmax(logits), log_softmax(logits + rng.normal(0, 0.02, logits.shape))
    assert certain(compare(top_lists(logp, K), top_lists(logq, K))) == []


def test_values_of_two_decimals_contradict_nothing(quiet):
    rounded = [
        [tuple(c._replace(logprob=round(c.logprob, 2)) for c in top) for top in top_lists(logs, K)] for logs in quiet
    ]
    assert certain(compare(*rounded)) == []


def test_a_value_that_may_be_real_is_named_and_counts():
    """A token that holds next to nothing of what is not listed: no sum tells."""
    logp, logq = gaussian_pair(3, ROWS, 3000, 0.06, zipf=0.4, spread=1.0)
    token = np.argsort(-logp[5])[2]
    lists_q = with_wrong(top_lists(logq, K), 5, [c.token_id for c in top_lists(logq, K)[5]].index(token), 3.0)
    found = compare(top_lists(logp, K), lists_q)
    assert [(item.row, item.certain) for item in found.outliers] in ([(5, False)], [(5, True)])
    quiet = compare(top_lists(logp, K), top_lists(logq, K))
    assert found.prior.variance <= 1.12 * quiet.prior.variance


def test_exchanging_the_models_finds_the_same(quiet):
    lists = top_lists(quiet[0], K), with_wrong(top_lists(quiet[1], K), 5, 7, -6.0)
    there, back = compare(*lists), compare(*lists[::-1])
    assert certain(there) == certain(back) == [5]
    assert {item.side for item in there.outliers} | {item.side for item in back.outliers} <= {"P", "Q", None}


def test_positions_without_shared_tokens_say_nothing():
    logp, logq = gaussian_pair(3, 4, 60, 0.05)
    lists_q = [
        tuple(c._replace(token_id=c.token_id + 1000, token=f"x{c.token}") for c in top) for top in top_lists(logq, 8)
    ]
    found = compare(top_lists(logp, 8), lists_q)
    assert certain(found) == []
    assert find_outliers(found.aligned.only([]), found.prior) == ()


def test_a_list_that_names_no_token_is_no_outlier_and_no_fault_of_arithmetic(quiet):
    lists = top_lists(quiet[0], K), top_lists(quiet[1], K)
    unnamed = tuple(c._replace(token="", token_id=None) for c in lists[0][5])
    hidden = [unnamed if at == 5 else tuple(c._replace(token_id=None) for c in top) for at, top in enumerate(lists[0])]
    with np.errstate(all="raise", under="ignore"):
        found = compare(hidden, lists[1])
    assert certain(found) == []
    assert found.kl_lower[5] <= exact_kl(*quiet)[5]


@pytest.mark.parametrize("prior", [None, SpreadPrior(0.3)], ids=["no prior", "prior"])
@pytest.mark.parametrize("noise", [0.05, 0.6, 2.5])
@pytest.mark.parametrize("k", [6, K, 45])
def test_rows_together_are_judged_as_row_by_row(noise, k, prior):
    """Wrong values of every size on either side, entries without a name, values of two decimals."""
    rng = np.random.default_rng(k)
    pair = gaussian_pair(7, 200, 400, noise, zipf=1.4, spread=1.2)
    lists = [top_lists(logs, k) for logs in pair]
    for row in range(200):
        for _ in range(row % 3):
            side, by = rng.integers(2), rng.choice([-95.0, -20.0, -6.0, -3.0, 1.0, 3.0])
            changed = with_wrong(lists[side], row, rng.integers(k), by)
            lists[side] = changed if np.exp([c.logprob for c in changed[row]]).sum() <= 1 else lists[side]
    for row in range(0, 200, 5):
        side, at = rng.integers(2), rng.integers(k)
        lists[side][row] = tuple(c._replace(token="") if i == at else c for i, c in enumerate(lists[side][row]))
    named = [[tuple(c._replace(token_id=None) for c in top) for top in side] for side in lists]
    rounded = [[tuple(c._replace(logprob=round(c.logprob, 2)) for c in top) for top in side] for side in named]
    n_certain = 0
    for one, other in (named, rounded):
        aligned = align(one, other)
        found, slow = find_outliers(aligned, prior), slow_outliers.find_outliers(aligned, prior)
        assert [item[:3] for item in found] == [item[:3] for item in slow]
        np.testing.assert_allclose([item[3:] for item in found], [item[3:] for item in slow], rtol=1e-12)
        n_certain += sum(item.certain for item in found)
    assert n_certain > 20
