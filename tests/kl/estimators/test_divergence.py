"""The estimators: their statistics on pairs with known divergences, and what holds of every row."""

import math
import tracemalloc
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import rel_entr
from scipy.stats import spearmanr

from kl.estimators.align import align
from kl.estimators.bounds import cells, upper_subgauss
from kl.estimators.censored import SpreadEvidence, SpreadPrior, fit, pooled_prior
from kl.estimators.divergence import (
    ESTIMATORS,
    PADDING_MASS,
    exact_kl,
    exact_kl_of_padded,
    exact_of_padded,
    floor,
    measure,
    sampled_token,
)
from kl.records import Candidate
from tests.kl.pairs import candidates, gaussian_pair, top_lists, true_divergences


@dataclass(frozen=True)
class Quality:
    """Of an estimate against the true values."""

    bias: float
    rmse: float
    off_by_two: float
    spearman: float

    @classmethod
    def of(cls, estimate, true):
        large = true > 1e-3
        ratio = np.maximum(estimate[large], 1e-12) / true[large]
        return cls(
            bias=float(estimate.mean() / true.mean() - 1),
            rmse=float(np.sqrt(np.square(estimate - true).mean()) / true.mean()),
            off_by_two=float(np.mean((ratio > 2) | (ratio < 0.5))),
            spearman=float(spearmanr(estimate, true).statistic),
        )


def measured(logp, logq, k_p, k_q=None):
    aligned = align(top_lists(logp, k_p), top_lists(logq, k_p if k_q is None else k_q))
    return aligned, measure(aligned, pooled_prior(SpreadEvidence.of(aligned)))


@pytest.fixture(scope="module", params=[0.06, 0.3, 1.0], ids=["like-int8", "between", "like-int4"])
def case(request):
    logp, logq = gaussian_pair(11, 300, 5000, request.param)
    return logp, logq, true_divergences(logp, logq)


class TestStatistics:
    def test_at_k_20_censored_is_nearly_unbiased_and_ranks_positions(self, case):
        logp, logq, (true, true_reverse, true_js, _) = case
        _, values = measured(logp, logq, 20)
        found, reference = Quality.of(values.censored.kl, true), Quality.of(values.floor.kl, true)
        assert abs(found.bias) <= 0.06
        assert found.rmse <= 0.75 * reference.rmse
        assert found.off_by_two <= 0.02
        assert found.spearman >= 0.97
        assert values.censored.reverse_kl.mean() == pytest.approx(true_reverse.mean(), rel=0.06)
        assert values.censored.js.mean() == pytest.approx(true_js.mean(), rel=0.06)

    def test_at_k_10_bias_stays_below_a_tenth(self, case):
        logp, logq, (true, *_) = case
        assert abs(Quality.of(measured(logp, logq, 10)[1].censored.kl, true).bias) <= 0.10

    def test_at_k_5_bias_stays_below_a_fifth_and_error_below_floors(self, case):
        logp, logq, (true, *_) = case
        _, values = measured(logp, logq, 5)
        found = Quality.of(values.censored.kl, true)
        assert abs(found.bias) <= 0.20
        assert found.rmse <= 0.75 * Quality.of(values.floor.kl, true).rmse

    def test_plausible_upper_covers_at_k_20(self, case):
        logp, logq, (true, *_) = case
        aligned, values = measured(logp, logq, 20)
        variance = np.square(values.logratio_sd)
        assert np.mean(upper_subgauss(cells(aligned), variance, 4.0) >= true) >= 0.99
        assert np.mean(values.upper_plausible >= true) >= 0.99

    def test_logratio_sd_is_the_noise_of_the_logits(self, case):
        logp, logq, _ = case
        _, values = measured(logp, logq, 20)
        ratio = logp - logq  # its spread over all tokens of a position is the noise that was put in
        assert np.median(values.logratio_sd) == pytest.approx(ratio.std(axis=1).mean(), rel=0.1)


@st.composite
def lists(draw):
    """Lists of every odd kind: short, disjoint, certain, rounded, with sentinels removed, far apart."""
    vocabulary = draw(st.integers(1, 30))
    logp, logq = gaussian_pair(
        draw(st.integers(0, 2**32 - 1)),
        12,
        vocabulary,
        draw(st.sampled_from([0.0, 0.1, 1.0, 10.0])),
        zipf=draw(st.sampled_from([0.0, 1.0, 8.0])),
        spread=draw(st.sampled_from([0.1, 2.0, 40.0])),
    )
    step = draw(st.sampled_from([0.0, 1e-3]))
    rounded = [np.round(side / step) * step if step else side for side in (logp, logq)]
    rounded = [side.astype(np.float32).astype(float) for side in rounded]
    lists_p, lists_q = (top_lists(np.maximum(side, -990.0), draw(st.integers(1, vocabulary))) for side in rounded)
    if draw(st.booleans()):
        lists_q = [tuple(c._replace(token="q" + c.token, token_id=c.token_id + 100) for c in top) for top in lists_q]
    return lists_p, lists_q


priors = st.sampled_from(
    [None, *(SpreadPrior(v) for v in (0.0, 1e-4, 1.0, 30.0)), SpreadPrior(1.0, 0.9, -1.0, -4.0, 2.0)]
)


@given(lists(), priors)
@settings(max_examples=150, deadline=None)
def test_every_row_is_finite_and_in_order(pair, prior):
    aligned = align(*pair)
    values = measure(aligned, prior)
    for name in ESTIMATORS:
        for estimate in values.estimate(name):
            known = estimate[~np.isnan(estimate)]
            assert np.isfinite(known).all(), name
            assert (known >= 0).all(), name
    for name in ("floor", "lower", "bucket"):
        assert not np.isnan(values.estimate(name).kl).any(), name
    censored, low, upper = values.censored, values.lower, values.upper_plausible
    known = ~np.isnan(censored.kl)
    assert (censored.kl >= low.kl)[known].all()
    assert (censored.reverse_kl >= low.reverse_kl)[known].all()
    assert (censored.js >= low.js - 1e-12)[known].all()
    assert (censored.js <= math.log(2) + 1e-12)[known].all()
    limited = ~np.isnan(upper)
    assert (limited <= known).all()
    assert (upper >= censored.kl)[limited].all()
    assert not np.isinf(upper).any()
    assert (values.bucket.kl <= low.kl + 1e-9).all()


@given(lists(), priors)
@settings(max_examples=60, deadline=None)
def test_exchanging_p_and_q_exchanges_the_directions(pair, prior):
    there, back = measure(align(*pair), prior), measure(align(*reversed(pair)), prior)
    for name in ESTIMATORS:
        one, other = there.estimate(name), back.estimate(name)
        np.testing.assert_allclose(one.kl, other.reverse_kl, rtol=1e-9, atol=1e-9, err_msg=name)
        np.testing.assert_allclose(one.reverse_kl, other.kl, rtol=1e-9, atol=1e-9, err_msg=name)
        np.testing.assert_allclose(one.js, other.js, rtol=1e-9, atol=1e-6, err_msg=name)


@given(lists(), priors, st.randoms(use_true_random=False))
@settings(max_examples=40, deadline=None)
def test_order_of_entries_and_numbering_of_tokens_change_nothing(pair, prior, random):
    def shuffled(side):
        renumbered = [[c._replace(token_id=7 * c.token_id + 3) for c in top] for top in side]
        return [tuple(sorted(random.sample(top, len(top)), key=lambda c: -c.logprob)) for top in renumbered]

    first, second = measure(align(*pair), prior), measure(align(*(shuffled(side) for side in pair)), prior)
    for name in ESTIMATORS:
        for one, other in zip(first.estimate(name), second.estimate(name), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-9, err_msg=name)


def test_a_position_is_measured_for_itself():
    logp, logq = gaussian_pair(5, 40, 200, 0.7)
    lists_p, lists_q = top_lists(logp, 10), top_lists(logq, 10)
    together = measure(align(lists_p, lists_q), SpreadPrior(0.4, 0.5))
    for t in (0, 17, 39):
        alone = measure(align(lists_p[t : t + 1], lists_q[t : t + 1]), SpreadPrior(0.4, 0.5))
        assert alone.censored.kl[0] == pytest.approx(together.censored.kl[t], rel=1e-12)
        assert alone.upper_plausible[0] == pytest.approx(together.upper_plausible[t], rel=1e-12, nan_ok=True)


def test_equal_models_are_at_zero():
    logp, _ = gaussian_pair(5, 30, 200, 0.0)
    aligned, values = measured(logp, logp, 20)
    assert pooled_prior(SpreadEvidence.of(aligned)) == SpreadPrior(0.0)
    for name in ESTIMATORS:
        assert (values.estimate(name).kl == 0.0).all(), name
    assert (values.upper_plausible == 0.0).all()


@given(st.integers(0, 2**32 - 1), st.integers(2, 30))
@settings(max_examples=30, deadline=None)
def test_whole_vocabularies_give_the_true_value(seed, vocabulary):
    logp, logq = gaussian_pair(seed, 10, vocabulary, 1.0)
    true, true_reverse, true_js, _ = true_divergences(logp, logq)
    _, values = measured(logp, logq, vocabulary)
    for name in ("censored", "lower", "bucket"):
        found = values.estimate(name)
        np.testing.assert_allclose(found.kl, true, atol=5e-8, err_msg=name)
        np.testing.assert_allclose(found.reverse_kl, true_reverse, atol=5e-8, err_msg=name)
        np.testing.assert_allclose(found.js, true_js, atol=5e-8, err_msg=name)
    np.testing.assert_allclose(values.upper_plausible, true, atol=5e-8)


class TestShortLists:
    @pytest.mark.parametrize(("k_p", "k_q", "determined"), [(4, 20, False), (20, 4, False), (5, 5, True)])
    def test_below_five_listed_tokens_only_bounds_are_given(self, k_p, k_q, determined):
        logp, logq = gaussian_pair(2, 50, 300, 0.3)
        _, values = measured(logp, logq, k_p, k_q)
        assert np.isnan(values.censored.kl).all() == (not determined)
        assert np.isnan(values.upper_plausible).all() == (not determined)
        assert not np.isnan(values.lower.kl).any()

    def test_a_certain_token_on_both_sides_needs_no_model(self):
        values = measure(align([candidates(a=0.0)], [candidates(a=0.0)]), SpreadPrior(0.3))
        assert values.censored.kl[0] == 0.0
        assert values.upper_plausible[0] == 0.0

    def test_fewer_than_three_shared_tokens_have_no_plausible_upper(self):
        top_p = candidates(a=math.log(0.3), b=math.log(0.2), **{f"p{i}": math.log(0.1) for i in range(4)})
        top_q = candidates(a=math.log(0.3), b=math.log(0.2), **{f"q{i}": math.log(0.1) for i in range(4)})
        values = measure(align([top_p], [top_q]), SpreadPrior(0.3))
        assert np.isnan(values.upper_plausible[0])
        assert values.censored.kl[0] >= values.lower.kl[0] > 0
        assert np.isnan(measure(align([top_p], [top_q]), None).censored.kl[0])


class TestFloor:
    def test_by_hand(self):
        # P (.5, .3) and Q (.6, .2) renormalise to (.625, .375) and (.75, .25); c is missing in P, b in Q.
        top_p = candidates(a=math.log(0.5), b=math.log(0.3))
        top_q = candidates(a=math.log(0.6), c=math.log(0.2))
        expected = 0.625 * math.log(0.625 / 0.75) + 0.375 * math.log(0.375 / 0.25) + 0.375 * math.log(0.375 / 0.25)
        assert floor(align([top_p], [top_q])).kl[0] == pytest.approx(expected, rel=1e-12)

    def test_can_be_negative_and_its_estimate_is_not(self):
        # Q's floor is .2 and P's .07, each above and below what the other side has there.
        top_p = candidates(a=math.log(0.65), **{f"p{i}": math.log(0.07) for i in range(5)})
        top_q = candidates(a=math.log(0.8), c=math.log(0.2))
        aligned = align([top_p], [top_q])
        assert floor(aligned).kl[0] == pytest.approx(0.65 * math.log(0.65 / 0.8) + 6 * 0.07 * math.log(0.07 / 0.2))
        assert floor(aligned).kl[0] < 0
        assert measure(aligned, None).estimate("floor").kl[0] == 0.0

    @given(lists())
    @settings(max_examples=40, deadline=None)
    def test_equals_dictionaries_over_the_union(self, pair):
        found = floor(align(*pair)).kl
        for t, (top_p, top_q) in enumerate(zip(*pair, strict=True)):
            p, q = ({c.token: math.exp(max(c.logprob, -650.0)) for c in top} for top in (top_p, top_q))
            p, q = ({token: value / sum(side.values()) for token, value in side.items()} for side in (p, q))
            union = p.keys() | q.keys()
            terms = [(p.get(token, min(p.values())), q.get(token, min(q.values()))) for token in union]
            assert found[t] == pytest.approx(sum(a * math.log(a / b) for a, b in terms), rel=1e-8, abs=1e-8)


class TestTobit:
    def test_without_censoring_it_is_the_sample_mean_and_variance(self):
        logp, logq = gaussian_pair(1, 5, 12, 0.5)
        d = logp - logq
        model = fit(align(top_lists(logp, 12), top_lists(logq, 12)), None)
        np.testing.assert_allclose(model.mean_p, d.mean(axis=1), atol=1e-9)
        np.testing.assert_allclose(model.mean_q, d.mean(axis=1), atol=1e-9)
        # The 12 tokens count once for P and once for Q, less one degree of freedom.
        np.testing.assert_allclose(model.variance, 2 * d.var(axis=1) * 12 / 23, rtol=1e-6)

    def test_a_large_prior_and_few_tokens_pull_the_variance(self):
        logp, logq = gaussian_pair(1, 50, 300, 0.3)
        aligned = align(top_lists(logp, 8), top_lists(logq, 8))
        small, large = fit(aligned, SpreadPrior(0.01)).variance, fit(aligned, SpreadPrior(1.0)).variance
        assert (small < large).all()

    def test_recovers_a_known_variance_from_censored_lists(self):
        logp, logq = gaussian_pair(4, 400, 3000, 0.5)
        prior = pooled_prior(SpreadEvidence.of(align(top_lists(logp, 20), top_lists(logq, 20))))
        assert prior is not None
        assert prior.variance == pytest.approx(0.25, rel=0.08)


def evidence(variance, rest, shared, unshared):
    return SpreadEvidence(
        np.array(variance, dtype=float),
        np.array(rest, dtype=np.float32),
        np.array(shared, dtype=np.uint16),
        np.array(unshared, dtype=np.uint16),
    )


class TestPrior:
    """What a data set lets expect of the variance of a position."""

    def test_level_is_the_mean_by_rest_mass(self):
        assert pooled_prior(evidence([1.0, 5.0, 2.0], [0.5, 0.25, 0.25], [9, 9, 9], [2, 2, 2])) == SpreadPrior(2.25)

    def test_nothing_hidden_anywhere_weighs_positions_equally(self):
        assert pooled_prior(evidence([1.0, 3.0], [0.0, 0.0], [9, 9], [0, 0])) == SpreadPrior(2.0)

    def test_no_position_with_a_variance_gives_no_prior(self):
        assert pooled_prior(SpreadEvidence.total([])) is None
        far = align([candidates(a=-1.0, b=-2.0)], [candidates(a=-1.0, c=-2.0)])
        assert pooled_prior(SpreadEvidence.of(far)) is None

    def test_positions_that_overlap_less_are_expected_to_differ_more(self):
        shared = np.tile([18, 14, 10, 6, 3], 40)
        odds = (2.0 * (20 - shared) + 1.0) / (2.0 * shared + 1.0)
        found = pooled_prior(evidence(odds**1.5, np.full(200, 0.2), shared, 2 * (20 - shared)))
        assert found is not None
        # Noise of the variances, which these do not have, is taken off the slope.
        assert 1.0 < found.slope < 1.5
        assert found.variance == pytest.approx(np.mean(odds**1.5))
        rows = [candidates(**{str(i): -3.0 - i / 100 for i in range(20)}) for _ in range(6)]
        others = [
            tuple(c._replace(token=c.token if i < n else f"q{i}", token_id=None) for i, c in enumerate(top))
            for n, top in zip((18, 14, 10, 6, 3, 0), rows, strict=True)
        ]
        expected = found.at(align(rows, others))
        assert (np.diff(expected[:5]) > 0).all()
        # The line ends at the smallest overlap that had a variance.
        assert expected[5] == expected[4]
        assert expected[:5].mean() == pytest.approx(found.variance)

    def test_differences_that_sampling_explains_make_no_slope(self):
        random = np.random.default_rng(3)
        shared = random.integers(4, 16, 3000)
        variance = 2.0 * random.chisquare(shared - 1) / (shared - 1)
        found = pooled_prior(evidence(variance, np.full(3000, 0.2), shared, 2 * (20 - shared)))
        assert found is not None
        assert found.slope < 0.02
        assert found.variance == pytest.approx(2.0, rel=0.03)

    def test_few_positions_make_no_slope(self):
        shared = np.array([18, 10, 3] * 9)
        found = pooled_prior(evidence(20.0 - shared, np.full(27, 0.2), shared, 2 * (20 - shared)))
        assert found is not None
        assert found.slope == 0.0

    def test_lists_that_agree_to_rounding_do_not_make_the_slope(self):
        shared = np.tile([18, 14, 10, 6, 3], 40)
        varied = 0.1 * np.array([0.5, 1.0, 2.0] * 67)[:200] * (21.0 - shared)
        plain = pooled_prior(evidence(varied, np.full(200, 0.2), shared, 2 * (20 - shared)))
        equal = evidence(np.array([0.0, 1e-13]), [0.1, 0.1], [20, 20], [0, 0])
        rounded = pooled_prior(
            SpreadEvidence.total([evidence(varied, np.full(200, 0.2), shared, 2 * (20 - shared)), equal])
        )
        assert plain is not None
        assert rounded is not None
        assert rounded.slope < 2 * plain.slope

    def test_parts_add_up_to_the_whole(self):
        logp, logq = gaussian_pair(6, 60, 400, 0.6)
        lists_p, lists_q = top_lists(logp, 15), top_lists(logq, 15)
        parts = [SpreadEvidence.of(align(lists_p[i : i + 20], lists_q[i : i + 20])) for i in (0, 20, 40)]
        whole = pooled_prior(SpreadEvidence.of(align(lists_p, lists_q)))
        assert pooled_prior(SpreadEvidence.total([*parts, SpreadEvidence.none()])) == whole

    def test_positions_weigh_by_the_mass_that_p_leaves_out(self):
        aligned = align([candidates(a=-0.5, b=-2.0, c=-3.0)], [candidates(a=-1.0, b=-3.5, c=-5.0)])
        left_out = 1.0 - np.exp([-0.5, -2.0, -3.0]).sum()
        assert SpreadEvidence.of(aligned).rest == pytest.approx([left_out])

    def test_exchanging_p_and_q_changes_the_weights_alone(self):
        logp, logq = gaussian_pair(6, 200, 400, 0.8)
        lists_p, lists_q = top_lists(logp, 20), top_lists(logq, 12)
        forth, reverse = (SpreadEvidence.of(align(*pair)) for pair in ((lists_p, lists_q), (lists_q, lists_p)))
        there = pooled_prior(forth)
        back = pooled_prior(replace(reverse, rest=forth.rest))
        assert there is not None
        assert back is not None
        assert there.variance == pytest.approx(back.variance, rel=1e-12)
        assert there.slope == pytest.approx(back.slope, rel=1e-9, abs=1e-12)
        assert there.log_odds == pytest.approx(back.log_odds, rel=1e-9, abs=1e-9)

    def test_positions_of_very_unequal_spread_keep_their_mean(self):
        # Most positions hardly differ; shrunk towards the median of their variances, the others would come out low.
        parts = [gaussian_pair(21, 280, 3000, 0.1), gaussian_pair(22, 120, 3000, 1.2)]
        logp, logq = (np.concatenate([part[side] for part in parts]) for side in (0, 1))
        true = true_divergences(logp, logq)[0]
        _, values = measured(logp, logq, 10)
        assert abs(Quality.of(values.censored.kl, true).bias) <= 0.06


class TestSampled:
    def one(self, sampled, top_q=None, sampled_q=None):
        top_p = candidates(a=math.log(0.6), b=math.log(0.3))
        q = candidates(a=math.log(0.5), c=math.log(0.25)) if top_q is None else top_q
        return sampled_token(align([top_p], [q], [sampled], [sampled_q]))

    def test_listed_by_both(self):
        token = self.one(Candidate("a", math.log(0.6)))
        assert token.k1[0] == pytest.approx(math.log(0.6 / 0.5))
        assert token.k3[0] == pytest.approx(0.5 / 0.6 - 1 + math.log(0.6 / 0.5))
        assert token.delta_p[0] == pytest.approx(-0.1)
        assert not token.censored[0]

    def test_not_listed_by_q_is_censored_at_qs_cap(self):
        token = self.one(Candidate("b", math.log(0.3)))
        assert token.censored[0]
        assert token.k1[0] == pytest.approx(math.log(0.3 / 0.25))
        assert np.isnan(token.k3[0])
        assert np.isnan(token.delta_p[0])

    @pytest.mark.parametrize("unknown", [None, -9999.0])
    def test_unknown_under_p_is_unknown_and_not_censored(self, unknown):
        token = self.one(Candidate("z", unknown))
        assert np.isnan(token.k1[0])
        assert not token.censored[0]

    def test_k1_and_k3_have_kl_as_their_mean(self):
        logp, logq = gaussian_pair(9, 1, 15, 0.8)
        p, top_p, top_q = np.exp(logp[0]), top_lists(logp, 15)[0], top_lists(logq, 15)[0]
        by_id = {c.token_id: c for c in top_p}
        token = sampled_token(align([top_p] * 15, [top_q] * 15, [by_id[i] for i in range(15)], [None] * 15))
        assert p @ token.k1 == pytest.approx(true_divergences(logp, logq)[0][0], abs=1e-12)
        assert p @ token.k3 == pytest.approx(true_divergences(logp, logq)[0][0], abs=1e-12)


class TestExact:
    @given(st.integers(0, 2**32 - 1), st.integers(1, 300), st.booleans())
    @settings(max_examples=30, deadline=None)
    def test_agrees_with_scipy(self, seed, vocabulary, narrow):
        logp, logq = gaussian_pair(seed, 7, vocabulary, 1.0)
        if narrow:
            logp, logq = logp.astype(np.float32), logq.astype(np.float32)
        expected = rel_entr(np.exp(logp.astype(float)), np.exp(logq.astype(float))).sum(axis=1)
        np.testing.assert_allclose(exact_kl(logp, logq), expected, atol=2e-6 if narrow else 1e-12)

    def test_equal_rows_are_exactly_zero_in_float32(self):
        logp = gaussian_pair(1, 20, 50_000, 0.0)[0].astype(np.float32)
        assert (exact_kl(logp, logp.copy()) == 0.0).all()

    def test_rows_are_worked_in_pieces(self):
        logp, logq = gaussian_pair(1, 70, 50_000, 0.1)
        np.testing.assert_array_equal(exact_kl(logp, logq)[61:], exact_kl(logp[61:], logq[61:]))

    def test_an_excluded_token_is_infinite_only_where_p_allows_it(self):
        half, certain = [math.log(0.5)] * 2, [0.0, -math.inf]
        assert exact_kl(np.array([half, certain]), np.array([certain, half])).tolist() == [
            math.inf,
            pytest.approx(math.log(2)),
        ]

    @pytest.mark.parametrize(
        ("logp", "logq", "message"),
        [
            (np.zeros((1, 3)), np.zeros((1, 4)), "shapes"),
            (np.zeros(3), np.zeros(3), "shapes"),
            (np.array([[0.0, -np.inf], [1.0, 2.0]]), np.array([[0.0, -np.inf]] * 2), "row 1 of P"),
            (np.array([[0.0, -np.inf]]), np.array([[-np.inf, -np.inf]]), "row 0 of Q"),
            (np.array([[np.nan, 0.0]]), np.array([[0.0, -np.inf]]), "row 0 of P"),
        ],
        ids=["unequal", "flat", "logits", "no token", "nan"],
    )
    def test_what_is_no_pair_of_distributions_is_refused(self, logp, logq, message):
        with pytest.raises(ValueError, match=message):
            exact_kl(logp, logq)

    def test_no_rows(self):
        assert exact_kl(np.zeros((0, 5)), np.zeros((0, 5))).shape == (0,)

    @pytest.mark.parametrize("longer", ["P", "Q"])
    def test_rows_that_pad_a_vocabulary_are_left_out_if_they_hold_nothing(self, longer):
        pair = gaussian_pair(3, 5, 50, 0.4)

        def padded(mass):
            rows = np.full((5, 64), np.log(mass / 64) if mass else -np.inf)
            long = np.concatenate([pair[longer == "Q"] + np.log1p(-mass), rows], axis=1)
            return exact_kl_of_padded(*((long, pair[1]) if longer == "P" else (pair[0], long)))

        np.testing.assert_array_equal(padded(0.0), exact_kl(*pair))
        np.testing.assert_allclose(padded(0.9 * PADDING_MASS), exact_kl(*pair), atol=PADDING_MASS)
        assert np.isnan(padded(2 * PADDING_MASS)).all()
        np.testing.assert_array_equal(exact_kl_of_padded(*pair), exact_kl(*pair))

    def test_padded_rows_are_measured_in_bounded_work_space(self):
        logs = np.full((400, 50_000), -np.log(50_000), dtype=np.float32)
        longer = np.pad(logs, ((0, 0), (0, 64)), constant_values=-np.inf)
        longer[[7, 8, 300], -1] = -5.0  # another vocabulary
        tracemalloc.start()
        values = exact_kl_of_padded(logs, longer)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert np.flatnonzero(np.isnan(values)).tolist() == [7, 8, 300]
        np.testing.assert_array_equal(np.delete(values, [7, 8, 300]), 0.0)
        assert peak < 80e6 * 1.5  # either argument has 80 MB


def test_an_unknown_estimator_names_those_that_exist():
    values = measure(align([candidates(a=-0.1)], [candidates(a=-0.1)]), None)
    with pytest.raises(ValueError, match=r"'renorm'.*censored, floor, lower, bucket"):
        values.estimate("renorm")


def test_all_exact_divergences_are_the_sums_over_the_vocabulary() -> None:
    logits = np.random.default_rng(3).normal(0, 3, (2, 30, 700))
    logp, logq = logits - np.log(np.exp(logits).sum(axis=2, keepdims=True))
    logp[3] = logq[3]
    p, q = np.exp(logp), np.exp(logq)
    found = exact_of_padded(logp, logq)
    np.testing.assert_allclose(found.kl, rel_entr(p, q).sum(axis=1), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(found.reverse_kl, rel_entr(q, p).sum(axis=1), rtol=1e-12, atol=1e-12)
    mean = (p + q) / 2
    np.testing.assert_allclose(
        found.js, (rel_entr(p, mean) + rel_entr(q, mean)).sum(axis=1) / 2, rtol=1e-12, atol=1e-12
    )
    np.testing.assert_allclose(found.tv, np.abs(p - q).sum(axis=1) / 2, rtol=1e-12)
    assert [values[3] for values in found] == [0, 0, 0, 0]
    turned = exact_of_padded(logq, logp)
    for values, other in zip(found, (turned.reverse_kl, turned.kl, turned.js, turned.tv), strict=True):
        np.testing.assert_array_equal(values, other)
