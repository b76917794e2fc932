"""Perplexity, |Δ log p| and flips: hand-worked values, what is censored, coverage of the interval of a quantile."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import polars as pl
import pytest

from kl.statistics.figures import logprob_difference, perplexity, quantile_estimate, top_token
from kl.tables.totals import response_totals

Build = Callable[..., pl.DataFrame]


@pytest.fixture
def table(token_table: Build) -> Callable[..., pl.DataFrame]:
    """Five prompts of two positions each, with these log-probabilities of the sampled tokens under P and Q.

    Where log q is None the token is censored, and ``caps`` has the largest value it can have.
    """

    def build(p: Sequence[float], q: Sequence[float | None], caps: Sequence[float] = ()) -> pl.DataFrame:
        tokens = token_table([(f"f{index}", f"p{index}", 0, [0.5, 0.5]) for index in range(5)])
        limits = [*caps, *[0.0] * (10 - len(caps))]
        ratio = [a - (limit if b is None else b) for a, b, limit in zip(p, q, limits, strict=True)]
        return tokens.with_columns(
            logprob_p=pl.Series(p),
            logprob_q=pl.Series(q),
            logratio_k1=pl.Series(ratio),
            k1_censored=pl.Series([b is None for b in q]),
        )

    return build


P = [-1.0, -1.0, -2.0, -2.0, -1.0, -3.0, -2.0, -2.0, -3.0, -3.0]
Q = [-1.5, -1.5, -2.0, -2.0, -2.0, -3.0, -1.5, -2.0, -4.0, -4.0]


def test_perplexities_and_the_paired_error_of_their_ratio_by_hand(table):
    found = perplexity(response_totals(table(P, Q).lazy()))
    # −log p by prompt: 2 4 4 4 6, mean 20/10 = 2; e = −2 0 0 0 2, SE = sqrt(5/4 · 8)/10 = .316228; t is 2.776445
    assert found.p.value == pytest.approx(math.exp(2.0))
    assert found.p.se == pytest.approx(math.exp(2.0) * 0.316228, rel=1e-5)
    assert found.p.ci_low == pytest.approx(math.exp(2.0 - 2.776445 * 0.316228), rel=1e-5)
    # −log q: 3 4 5 3.5 8, mean 2.35; e = −1.7 −.7 .3 −1.2 3.3, Σe² = 15.8, SE = sqrt(19.75)/10 = .444410
    assert found.q.value == pytest.approx(math.exp(2.35))
    assert found.q.se == pytest.approx(math.exp(2.35) * 0.444410, rel=1e-5)
    # log p/q: 1 0 1 −.5 2, mean .35; e = .3 −.7 .3 −1.2 1.3, Σe² = 3.8, SE = sqrt(4.75)/10 = .217945
    assert found.log_ratio.value == pytest.approx(0.35)
    assert found.log_ratio.se == pytest.approx(0.217945, rel=1e-5)
    assert found.ratio.value == pytest.approx(math.exp(0.35)) == pytest.approx(found.q.value / found.p.value)
    # Σ e_p e_q = 3.4 + 6.6 = 10, over sqrt(8 · 15.8)
    assert found.correlation == pytest.approx(10.0 / math.sqrt(8 * 15.8))
    assert (found.n_censored, found.log_ratio.n_unknown, found.log_ratio_lower) == (0, 0, found.log_ratio)


def test_a_token_outside_the_list_of_q_leaves_the_perplexities_and_bounds_the_ratio(table):
    censored = [None, *Q[1:]]
    found = perplexity(response_totals(table(P, censored, caps=[-5.0]).lazy()))
    assert found.p.value == pytest.approx(math.exp(19 / 9))  # the 9 other positions
    assert found.q.value == pytest.approx(math.exp((23.5 - 1.5) / 9))
    assert (found.log_ratio.n, found.log_ratio.n_unknown, found.n_censored) == (9, 1, 1)
    assert found.log_ratio.value == pytest.approx(3.0 / 9)
    assert found.log_ratio_lower.value == pytest.approx((3.0 + 4.0) / 10)  # log p/q is at least −1 − (−5)


def test_a_token_of_which_nothing_is_known_leaves_the_ratio_without_a_bound(table):
    tokens = table(P, [None, *Q[1:]], caps=[-5.0]).with_columns(
        logratio_k1=pl.when(pl.int_range(pl.len()) > 0).then("logratio_k1"), k1_censored=pl.lit(False)
    )
    found = perplexity(response_totals(tokens.lazy()))
    assert found.log_ratio.n_unknown == 1
    assert found.log_ratio_lower.value is None
    assert found.log_ratio_lower.no_interval == "not known at 1 of 10 measured positions"


def test_perplexity_weighs_sampled_positions(table):
    tokens = table(P, Q).with_columns(
        pi=pl.Series([0.5] * 8 + [0.25] * 2), selected=pl.int_range(pl.len()) % 2 == 0, error=pl.lit(None, pl.String)
    )
    tokens = tokens.with_columns(kl_estimate=pl.when("selected").then("kl_estimate"))
    found = perplexity(response_totals(tokens.lazy()))
    # −log p at positions 0 2 4 6 is 1 2 1 2, over .5, and 3 at 8, over .25; 10 positions
    assert found.p.value == pytest.approx(math.exp((6 / 0.5 + 3 / 0.25) / 10))


def test_a_perplexity_beyond_all_numbers_is_said_to_be(table):
    found = perplexity(response_totals(table(P, [-950.0] * 10).lazy()))
    assert (found.q.value, found.q.no_interval) == (None, "too large for a number")
    assert found.p.value == pytest.approx(math.exp(2.0))


def test_differences_of_the_sampled_token_by_hand(table):
    tokens = table(P, Q)
    found = logprob_difference(tokens.lazy(), response_totals(tokens.lazy()))
    # |log p/q|: .5 .5 | 0 0 | 1 0 | .5 0 | 1 1
    assert found.mean.value == pytest.approx(0.45)
    assert found.largest == 1.0
    assert found.percentile_95.value == 1.0
    # q/p: .61 .61 | 1 1 | .37 1 | 1.65 1 | .37 .37: six outside
    assert found.ratio_outside.value == pytest.approx(0.6)
    assert found.n_censored == 0


@pytest.mark.parametrize(
    ("limit", "difference", "outside"),
    [
        pytest.param(-5.0, 4.0, True, id="certainly less likely under Q"),
        pytest.param(-1.05, 0.05, False, id="perhaps as likely"),
        pytest.param(-0.2, 0.0, False, id="perhaps as likely: Q's limit lies above P's value"),
    ],
)
def test_a_censored_token_counts_with_the_least_that_it_can_be(table, limit: float, difference: float, outside: bool):
    tokens = table([-1.0] * 10, [None] + [-1.0] * 9, caps=[limit])
    found = logprob_difference(tokens.lazy(), response_totals(tokens.lazy()))
    assert found.n_censored == 1
    assert found.mean.value == pytest.approx(difference / 10)
    assert found.largest == pytest.approx(difference)
    assert found.ratio_outside.value == pytest.approx(outside / 10)


def test_the_limits_of_the_ratio_are_those_of_the_probabilities(table):
    q = [math.log(factor) - 1.0 for factor in (0.89, 0.91, 1.0, 1.09, 1.11)]
    tokens = table([-1.0] * 10, [*q, *q])
    found = logprob_difference(tokens.lazy(), response_totals(tokens.lazy()))
    assert found.ratio_outside.value == pytest.approx(0.4)


def flips(token_table: Build, *responses: str) -> pl.DataFrame:
    """Responses as text: ``=`` same top token, ``x`` another, ``?`` not known, ``!`` not measured."""
    tokens = token_table(
        [(f"f{i}", f"p{i}", 0, [None if c == "!" else 0.5 for c in r]) for i, r in enumerate(responses)]
    )
    same = {"=": True, "x": False}
    return tokens.with_columns(same_top_token=pl.Series([same.get(c) for c in "".join(responses)], dtype=pl.Boolean))


def test_flip_rate_and_first_flip_by_hand(token_table: Build):
    found = top_token(response_totals(flips(token_table, "x=", "=x=x", "===x", "==", "==x", "=====x").lazy()))
    # 6 flips among 21 positions; first flips at 0, 1, 2, 3, 5 and never: between the third and the fourth
    assert found.flip_rate.value == pytest.approx(6 / 21)
    assert found.flip_rate.ci_low < 6 / 21 < found.flip_rate.ci_high
    assert (found.first_flip.value, found.first_flip.n, found.n_never) == (2.5, 6, 1)


def test_a_median_that_never_flips_says_so(token_table: Build):
    found = top_token(response_totals(flips(token_table, "==", "==", "==", "x=", "=x").lazy()))
    assert (found.first_flip.value, found.n_never) == (None, 3)
    assert found.first_flip.no_interval == "half of the responses or more never differ"


def test_a_response_with_a_gap_before_its_first_flip_takes_no_part(token_table: Build):
    found = top_token(response_totals(flips(token_table, "=!x", "=?", "x!", "==x", "=!").lazy()))
    assert (found.first_flip.n, found.first_flip.n_unknown, found.n_never) == (2, 3, 0)
    assert found.first_flip.value == 1.0  # 0 and 2
    assert found.flip_rate.n_unknown == 1


def test_sampled_positions_have_a_flip_rate_and_no_first_flip(token_table: Build):
    tokens = flips(token_table, "x=", "=x").with_columns(pi=pl.lit(0.5), selected=pl.col("position") == 0)
    tokens = tokens.with_columns(kl_estimate=pl.when("selected").then("kl_estimate"))
    found = top_token(response_totals(tokens.lazy()))
    assert found.flip_rate.value == 0.5
    assert found.first_flip.no_interval == "positions were sampled, the first one that differs is not known"


def test_a_response_that_two_batches_share_has_one_first_flip(token_table: Build, monkeypatch: pytest.MonkeyPatch):
    tokens = flips(token_table, "===x=x", "==!x", "====").lazy()
    whole = response_totals(tokens)
    monkeypatch.setattr("kl.tables.totals.BATCH_ROWS", 5)
    parts = response_totals(tokens)
    for column, values in (("first_flip", [3, 3, None]), ("first_unclear", [None, 2, None])):
        assert whole[column].to_list() == parts[column].to_list() == values


def test_nothing_measured_is_not_known(token_table: Build):
    for answers in ([], [("a", "p", 0, [None, None])]):
        tokens = token_table(answers).lazy()
        totals = response_totals(tokens)
        assert perplexity(totals).ratio.value is None
        assert logprob_difference(tokens, totals).percentile_95.no_interval == "nothing was measured"
        assert top_token(totals).first_flip.value is None


# The interval of a quantile.


def test_quantile_by_hand():
    # Shares .25 .5 .75 1: the median lies between the second and the third
    assert quantile_estimate([1, 2, 5, 9], [1, 1, 1, 1], [0, 1, 2, 3], 0.5).value == 3.5
    # Weights 1 1 2: shares .25 .5 1; three quarters are reached by the last alone
    assert quantile_estimate([1, 2, 5], [1, 1, 2], [0, 1, 2], 0.75).value == 5
    assert quantile_estimate([1, 2, math.inf], [1, 1, 1], [0, 1, 2], 0.5).value == 2
    assert quantile_estimate([1, math.inf, math.inf], [1, 1, 1], [0, 1, 2], 0.5).value is None


def test_interval_of_a_median_by_hand():
    found = quantile_estimate(range(11), np.ones(11), range(11), 0.5)
    # 6 of 11 are at most 5: e = 5/11 (6 times), −6/11 (5 times); Σe² = 30/11; SE = sqrt(11/10 · 30/11)/11 = .157459
    # t(.975, 10) = 2.228139; on the logit scale ± 2.228139 · .157459/.25 = 1.403364: shares .19728 to .80272
    assert found.value == 5
    assert (found.ci_low, found.ci_high) == (2, 8)
    assert found.se == pytest.approx(6 / (2 * 2.228139), rel=1e-6)


def test_equal_values_have_an_interval_of_width_zero():
    found = quantile_estimate([2.0] * 12, [1.0] * 12, [index // 2 for index in range(12)], 0.95)
    assert (found.value, found.ci_low, found.ci_high) == (2, 2, 2)


def test_an_interval_beyond_all_values_is_none():
    values = [1.0, 1, 1, 1, math.inf, math.inf, math.inf]
    found = quantile_estimate(values, [1.0] * 7, range(7), 0.5)
    assert (found.value, found.ci_high, found.no_interval) == (1, None, "the interval ends above all finite values")
    assert quantile_estimate([1.0, 2.0], [1.0, 1.0], ["a", "b"], 0.5).no_interval == "2 prompts, at least 5 are needed"


@pytest.mark.parametrize("probability", [0.5, 0.95])
def test_intervals_of_quantiles_cover_with_a_shared_effect_per_prompt(probability: float):
    """log v = u + e, u of the prompt, N(0, .3²), and e of the position, N(0, 1)."""
    rng = np.random.default_rng(7)
    n_sims, n_prompts, n_positions = 600, 20, 50
    shared = rng.normal(0, 0.3, (n_sims, n_prompts, 1))
    values = np.exp(shared + rng.normal(0, 1, (n_sims, n_prompts, n_positions))).reshape(n_sims, -1)
    z = {0.5: 0.0, 0.95: 1.6448536}[probability]
    truth = math.exp(z * math.sqrt(1 + 0.09))
    clusters, weights = np.repeat(np.arange(n_prompts), n_positions), np.ones(n_prompts * n_positions)
    found = [quantile_estimate(row, weights, clusters, probability) for row in values]
    assert 0.93 <= np.mean([item.ci_low <= truth <= item.ci_high for item in found]) <= 0.98
