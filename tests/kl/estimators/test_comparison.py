"""Many positions in one call: the same numbers as step by step, and certified ones whatever a server adds."""

import numpy as np
import pytest

from kl.estimators.align import align
from kl.estimators.censored import SpreadEvidence, SpreadPrior, pooled_prior
from kl.estimators.comparison import PositionDivergences, compare
from kl.estimators.divergence import exact_kl, measure, sampled_token
from kl.estimators.list_checks import CandidateListError
from kl.records import Candidate, Position, Prompt, Response, Score, Turn
from kl.tables.tokens import measure_response
from tests.kl.estimators.test_list_checks import with_sampled
from tests.kl.pairs import candidates, gaussian_pair, top_lists

COLUMNS = (
    *("kl_estimate", "kl_lower", "kl_upper_plausible", "kl_floor", "kl_bucket", "reverse_kl_estimate"),
    *("reverse_kl_lower", "js_estimate", "js_lower", "tv_lower", "coverage_p", "coverage_q", "overlap"),
)


@pytest.fixture(scope="module")
def pair():
    return gaussian_pair(7, 40, 300, 0.5)


def sampled_of(logp, seed=1):
    drawn = [np.random.default_rng(seed + t).choice(logp.shape[1], p=np.exp(row)) for t, row in enumerate(logp)]
    return [Candidate(f"t{i}", float(row[i]), int(i)) for i, row in zip(drawn, logp, strict=True)]


@pytest.mark.parametrize("prior", ["pooled", SpreadPrior(0.3), None])
def test_one_call_gives_the_numbers_of_the_token_table(pair, prior):
    (logp, logq), sampled = pair, sampled_of(pair[0])
    lists_p, lists_q = top_lists(logp, 12), top_lists(logq, 12)
    found = compare(lists_p, lists_q, sampled, prior)
    expected = pooled_prior(SpreadEvidence.of(align(lists_p, lists_q))) if prior == "pooled" else prior
    assert found.prior == expected
    positions = tuple(Position(token, top) for token, top in zip(sampled, lists_p, strict=True))
    text = "".join(token.token for token in sampled)
    response = Response("a.json", 0, Prompt((Turn("user", "hi"),)), "m", text, positions)
    table = measure_response(response, [Score("k", top) for top in lists_q], estimator="censored", prior=expected)
    for name in COLUMNS:
        np.testing.assert_array_equal(getattr(found, name), table[name].to_numpy(), err_msg=name)
    np.testing.assert_array_equal(sampled_token(found.aligned).k1, table["logratio_k1"].to_numpy())


def test_the_bounds_hold_the_exact_value(pair):
    logp, logq = pair
    found, exact = compare(top_lists(logp, 20), top_lists(logq, 20)), exact_kl(logp, logq)
    assert (found.kl_lower <= exact + 1e-9).all()
    assert np.mean(found.kl_upper_plausible >= exact) > 0.95


def test_an_appended_token_is_no_limit_for_the_others_and_gives_k1(pair):
    (logp, logq), sampled = pair, sampled_of(pair[0])
    k = 4
    lists_p, lists_q = (with_sampled(top_lists(logs, k), sampled, logs) for logs in pair)
    found, clean = compare(lists_p, lists_q, sampled), compare(top_lists(logp, k), top_lists(logq, k), sampled)
    for name in COLUMNS:
        np.testing.assert_array_equal(getattr(found, name), getattr(clean, name), err_msg=name)
    assert found.appended_p.tolist() == [len(top) > k for top in lists_p]
    assert found.appended_q.tolist() == [len(top) > k for top in lists_q]
    assert 0 < np.count_nonzero(found.appended_q) < len(lists_q)
    ratios = [float(p[c.token_id] - q[c.token_id]) for p, q, c in zip(logp, logq, sampled, strict=True)]
    np.testing.assert_allclose(sampled_token(found.aligned).k1, ratios)


def test_an_appended_token_that_is_not_named_makes_bounds_wrong():
    """Why `sampled` matters: at this position the bound of the raw lists is nine times the true KL."""
    logp, logq = gaussian_pair(144, 20, 30, 0.7, zipf=0.5)
    rarest = [Candidate(f"t{i}", float(row[i]), int(i)) for i, row in zip(logp.argmin(axis=1), logp, strict=True)]
    lists = [with_sampled(top_lists(logs, 3), rarest, logs) for logs in (logp, logq)]
    exact = exact_kl(logp, logq)
    assert compare(*lists).kl_lower[3] > 8 * exact[3]
    assert (compare(*lists, rarest).kl_lower <= exact + 1e-9).all()


def test_the_value_of_an_appended_token_stands_in_for_an_unknown_one():
    list_p, list_q = candidates(a=-0.7, b=-1.5, z=-6.0), candidates(a=-0.6, b=-1.7)
    found = compare([list_p], [list_q], [Candidate("z", None)])
    assert found.aligned.logp_sampled.tolist() == [-6.0]
    assert np.isnan(found.aligned.logq_sampled[0])


def test_no_position_at_all():
    found = compare([], [])
    assert found.prior is None
    assert {np.asarray(getattr(found, name)).shape for name in COLUMNS} == {(0,)}


def test_a_wrong_list_is_named():
    with pytest.raises(CandidateListError, match="position 1: the list of Q does not fall"):
        compare([candidates(a=-0.5)] * 2, [candidates(a=-0.5), candidates(b=-3.0, a=-0.5)], prior=None)
    with pytest.raises(ValueError, match="2 lists of P but 1 of Q"):
        compare([candidates(a=-0.5)] * 2, [candidates(a=-0.5)])
    with pytest.raises(ValueError, match="1 sampled tokens for 2 lists"):
        compare([candidates(a=-0.5)] * 2, [candidates(a=-0.5)] * 2, [None])


def test_every_array_has_a_row_per_position(pair):
    found = compare(top_lists(pair[0], 8), top_lists(pair[1], 5))
    arrays = [name for name in PositionDivergences.__dataclass_fields__ if name not in ("outliers", "prior", "aligned")]
    assert {getattr(found, name).shape for name in arrays} == {(40,)}
    assert measure(found.aligned, found.prior).lower.kl.tolist() == found.kl_lower.tolist()


def test_a_last_value_that_the_mass_contradicts_is_no_limit():
    """A token that neither side lists may have all that is left over, whatever the last value claims."""
    whole = np.log([0.4, 0.2, 0.1, 0.05, 0.04, 0.03, 0.02])
    top = tuple(Candidate(f"t{rank}", float(logprob)) for rank, logprob in enumerate([*whole, -40.0]))
    other = (*top[:3], Candidate("new", -3.2), *top[4:])  # has .041 where P has .05, and lists another token
    found = compare([top], [other], prior=None)
    assert found.kl_lower[0] < 0.06
    one = compare([(Candidate("a", -40.0),)], [(Candidate("b", -0.1),)], prior=None)
    assert one.kl_lower[0] == 0
