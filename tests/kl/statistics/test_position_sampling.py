"""Which positions a run measures, and what that does to the figures."""

import math
import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kl.estimators.censored import SpreadPrior
from kl.estimators.entropy import entropies
from kl.records import Candidate, Position, Prompt, Response, Score, Turn
from kl.statistics.intervals import Estimate, ratio_estimate
from kl.statistics.position_sampling import (
    ASSUMED,
    PositionSample,
    Variation,
    draw,
    draw_again,
    expected_half_width,
    expected_width_text,
    listed_entropy,
    systematic_ranks,
    variation_of_pilot,
)
from kl.tables.tokens import measure_response
from kl.tables.totals import response_totals
from tests.kl.pairs import gaussian_pair, top_lists


def peaked(p):
    """A list of two tokens, of which the first has probability ``p``."""
    return (Candidate("a", math.log(p)), Candidate("b", math.log((1 - p) / 2)))


def response_of(tops, *, file="a.json", text=None, prompt="hi"):
    positions = tuple(Position(top[0] if top else Candidate("x", None), top) for top in tops)
    text = "".join(position.sampled.token for position in positions) if text is None else text
    return Response(file, 0, Prompt((Turn("user", prompt),)), "p-model", text, positions)


def varied(n, seed=0):
    """A response of n positions of different entropy."""
    return response_of([peaked(p) for p in np.random.default_rng(seed).uniform(0.4, 0.99, n)])


class TestSize:
    @pytest.mark.parametrize(
        ("n", "m"), [(0, 0), (1, 1), (2, 1), (7, 1), (8, 2), (10, 2), (12, 2), (13, 3), (1000, 200)]
    )
    def test_of_a_fraction_is_the_nearest_number_and_at_least_one(self, n, m):
        assert PositionSample(fraction=0.2).size(n) == m

    @pytest.mark.parametrize(("n", "m"), [(0, 0), (1, 1), (7, 7), (8, 8), (9, 8), (500, 8)])
    def test_per_response_is_never_more_than_there_is(self, n, m):
        assert PositionSample(per_response=8).size(n) == m

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({}, "neither"),
            ({"fraction": 0.5, "per_response": 3}, "both"),
            ({"fraction": 0.0}, "fraction is 0.0"),
            ({"fraction": 1.5}, "fraction is 1.5"),
            ({"fraction": math.nan}, "fraction is nan"),
            ({"per_response": 0}, "per_response is 0"),
        ],
    )
    def test_impossible_sizes_are_refused(self, settings, message):
        with pytest.raises(ValueError, match=message):
            PositionSample(**settings)


class TestSystematicRanks:
    @given(st.integers(1, 60).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n))))
    def test_over_all_starts_every_rank_is_taken_m_times(self, sizes):
        n, m = sizes
        counts = np.zeros(n, dtype=int)
        for start in range(n):
            ranks = systematic_ranks(n, m, start)
            assert len(set(ranks.tolist())) == m
            counts[ranks] += 1
        assert set(counts.tolist()) == {m}

    def test_spreads_over_all_ranks(self):
        # n/m = 2.5: one rank of every 2.5
        assert systematic_ranks(10, 4, 0).tolist() == [0, 2, 5, 7]
        assert systematic_ranks(10, 4, 9).tolist() == [2, 4, 7, 9]


class TestDraw:
    @pytest.mark.parametrize("sample", [PositionSample(fraction=0.2), PositionSample(per_response=7)])
    def test_takes_as_many_as_it_says_with_equal_probability(self, sample):
        selected, pi = draw(varied(37), sample)
        assert selected.dtype == np.bool_
        assert selected.sum() == sample.size(37) == 7
        assert pi.tolist() == [7 / 37] * 37

    @pytest.mark.parametrize("sample", [PositionSample(fraction=1.0), PositionSample(per_response=37)])
    def test_of_everything_has_probability_exactly_one(self, sample):
        selected, pi = draw(varied(37), sample)
        assert selected.all()
        assert pi.tolist() == [1.0] * 37

    @pytest.mark.parametrize("sample", [PositionSample(fraction=0.3, seed=3), PositionSample(per_response=4, seed=3)])
    def test_the_stop_is_always_measured_and_changes_no_other_draw(self, sample):
        whole = varied(21)
        cut = replace(whole, positions=whole.positions[:-1])
        with_stop = replace(whole, has_stop=True)
        selected, pi = draw(with_stop, sample)
        without = draw(cut, sample)
        assert selected.tolist() == [*without.selected.tolist(), True]
        assert pi.tolist() == [*without.pi.tolist(), 1.0]

    def test_of_an_empty_response_is_empty(self):
        selected, pi = draw(response_of([]), PositionSample(fraction=0.2))
        assert (len(selected), len(pi)) == (0, 0)

    def test_inclusion_frequencies_over_seeds_are_the_stated_probabilities(self):
        response, n_seeds = varied(23), 4000
        draws = [draw(response, PositionSample(per_response=5, seed=seed)) for seed in range(n_seeds)]
        frequency = np.mean([drawn.selected for drawn in draws], axis=0)
        deviation = math.sqrt(5 / 23 * 18 / 23 / n_seeds)
        assert np.abs(frequency - 5 / 23).max() < 4.5 * deviation

    def test_horvitz_thompson_mean_over_2000_designs_is_the_full_mean_within_half_a_percent(self):
        response = varied(120)
        # KL that goes with the entropy, and heavy tails.
        values = listed_entropy(response) * np.random.default_rng(5).lognormal(0, 1.0, 120)
        sums = []
        for seed in range(2000):
            selected, pi = draw(response, PositionSample(fraction=0.2, seed=seed))
            sums.append((values[selected] / pi[selected]).sum())
        assert np.mean(sums) == pytest.approx(values.sum(), rel=0.005)
        assert np.std(sums) > 0.02 * values.sum()  # the designs do differ

    def test_spreads_over_the_entropies(self):
        response = varied(100)
        entropy = listed_entropy(response)
        quarter = np.searchsorted(np.sort(entropy), entropy) // 25
        for seed in range(20):
            selected, _ = draw(response, PositionSample(fraction=0.2, seed=seed))
            assert np.bincount(quarter[selected], minlength=4).tolist() == [5, 5, 5, 5]

    def test_equal_entropies_are_taken_in_order_of_position(self):
        selected, _ = draw(response_of([peaked(0.5)] * 12), PositionSample(per_response=4))
        assert np.diff(np.flatnonzero(selected)).tolist() == [3, 3, 3]

    def test_entropies_that_differ_in_the_last_bits_draw_the_same_positions(self):
        tops = [peaked(0.5)] * 40
        shaken = [(first._replace(logprob=first.logprob + (t % 3) * 1e-14), *rest)
                  for t, (first, *rest) in enumerate(tops)]  # fmt: skip
        sample = PositionSample(fraction=0.3)
        assert draw(response_of(tops), sample).selected.tolist() == draw(response_of(shaken), sample).selected.tolist()

    def test_depends_on_seed_prompt_and_text_and_on_nothing_else(self):
        response, sample = varied(200), PositionSample(fraction=0.1)
        drawn = draw(response, sample).selected.tolist()
        elsewhere = replace(response, source_file="sub/b.json", response_idx=7, model="other", finish_reason="STOP")
        assert draw(elsewhere, sample).selected.tolist() == drawn
        others = (
            draw(response, replace(sample, seed=1)),
            draw(replace(response, prompt=Prompt((Turn("user", "ho"),))), sample),
            draw(replace(response, text=response.text + "!"), sample),
        )
        assert all(other.selected.tolist() != drawn for other in others)

    def test_is_the_same_on_every_machine_and_version(self):
        # What was drawn was paid for: a change of this list makes people buy other positions.
        response = response_of([peaked(0.4 + (17 * t % 40) / 80) for t in range(40)])
        selected, _ = draw(response, PositionSample(per_response=6, seed=3))
        assert np.flatnonzero(selected).tolist() == [6, 8, 17, 26, 28, 37]

    def test_positions_asked_again_are_of_the_measured_ones_with_the_product_of_both_probabilities(self):
        response, n_seeds = varied(24), 4000
        taken = np.zeros(24)
        for seed in range(n_seeds):
            measured = draw(response, PositionSample(per_response=12, seed=seed))
            again = draw_again(response, PositionSample(per_response=3, seed=seed), measured)
            assert again.selected.sum() == 3
            assert not (again.selected & ~measured.selected).any()
            assert again.pi.tolist() == [3 / 24] * 24
            taken += again.selected
        assert np.abs(taken / n_seeds - 3 / 24).max() < 4.5 * math.sqrt(3 / 24 * 21 / 24 / n_seeds)

    def test_positions_asked_again_of_all_are_another_draw(self):
        response = varied(40)
        samples = [PositionSample(fraction=0.1, seed=seed) for seed in range(30)]
        once = [draw(response, sample).selected.tolist() for sample in samples]
        again = [draw_again(response, sample) for sample in samples]
        assert [found.selected.tolist() for found in again] != once
        assert {(int(found.selected.sum()), found.pi[0]) for found in again} == {(4, 0.1)}
        everything = draw_again(response, PositionSample(fraction=1.0))
        assert (everything.selected.all(), everything.pi.tolist()) == (True, [1.0] * 40)

    def test_positions_asked_again_are_the_same_on_every_machine_and_version(self):
        response = response_of([peaked(0.4 + (17 * t % 40) / 80) for t in range(40)])
        selected, _ = draw_again(response, PositionSample(per_response=6, seed=3))
        assert np.flatnonzero(selected).tolist() == [6, 15, 17, 26, 35, 37]

    def test_takes_a_text_with_half_a_surrogate_pair(self):
        selected, _ = draw(response_of([peaked(0.5)] * 4, text="\ud83d"), PositionSample(per_response=2))
        assert selected.sum() == 2

    def test_takes_time_in_proportion_to_the_length(self):
        def seconds(n):
            response = varied(n)
            times = []
            for _ in range(3):
                start = time.process_time()
                draw(response, PositionSample(fraction=0.2))
                times.append(time.process_time() - start)
            return min(times)

        seconds(1000)
        assert seconds(32_000) < 3 * 8 * seconds(4000)


class TestListedEntropy:
    def test_takes_the_unlisted_tokens_as_one(self):
        # .5 log 2 + .25 log 4 + rest .25 log 4 = 1.5 log 2
        assert listed_entropy(response_of([peaked(0.5)])) == pytest.approx([1.5 * math.log(2)])

    def test_is_the_entropy_of_the_token_table(self):
        logp, _ = gaussian_pair(1, 12, 300, 0.3)
        tops = top_lists(logp, 20)
        logs = np.array([[candidate.logprob for candidate in top] for top in tops])
        expected = entropies(logs, logs.min(axis=1), np.exp(logs).sum(axis=1)).rest_cell
        assert listed_entropy(response_of(tops)) == pytest.approx(expected, abs=1e-12)

    def test_leaves_out_what_is_not_a_probability(self):
        sentinel = (*peaked(0.5), Candidate("z", -9999.0))
        assert listed_entropy(response_of([sentinel, peaked(0.5)])).tolist()[0] == pytest.approx(1.5 * math.log(2))
        assert listed_entropy(response_of([()])).tolist() == [0.0]


@pytest.fixture(scope="module")
def pair():
    logp, logq = gaussian_pair(7, 60, 400, 0.4)
    return top_lists(logp, 20), top_lists(logq, 20)


class TestMeasuredSample:
    def table(self, pair, sample=None):
        response = response_of(pair[0])
        scores = [Score(f"k{t}", top) for t, top in enumerate(pair[1])]
        design = {} if sample is None else draw(response, sample)._asdict()
        return measure_response(response, scores, estimator="censored", prior=SpreadPrior(0.16), **design)

    @pytest.mark.parametrize("sample", [PositionSample(fraction=1.0), PositionSample(per_response=60)])
    def test_of_everything_reproduces_the_unsampled_result_bit_for_bit(self, pair, sample):
        whole, sampled = self.table(pair), self.table(pair, sample)
        assert whole.equals(sampled, null_equal=True)
        assert response_totals(whole.lazy()).equals(response_totals(sampled.lazy()), null_equal=True)

    def test_estimates_the_sum_over_all_positions_without_bias(self, pair):
        full = response_totals(self.table(pair).lazy())["kl_estimate.sum"][0]
        sums = [
            response_totals(self.table(pair, PositionSample(per_response=12, seed=seed)).lazy())["kl_estimate.sum"][0]
            for seed in range(60)
        ]
        error = np.std(sums, ddof=1) / math.sqrt(60)
        assert error > 0
        assert abs(np.mean(sums) - full) < 3 * error

    def test_leaves_the_other_positions_without_values_or_errors(self, pair):
        table = self.table(pair, PositionSample(per_response=12))
        left_out = table.filter(~table["selected"])
        assert left_out.height == 48
        assert left_out["kl_estimate"].null_count() == left_out["error"].null_count() == 48


class TestExpectedWidth:
    @pytest.mark.parametrize(("fraction", "wider"), [(0.3, (1.3, 1.4)), (0.2, (1.5, 1.6)), (0.1, (1.95, 2.05))])
    def test_widening_by_sampling_is_what_was_measured(self, fraction, wider):
        variation = Variation(1.6, 0.04)
        all_positions = expected_half_width(40, 48, variation)
        sampled = expected_half_width(40, round(48 * fraction), variation)
        assert all_positions is not None
        assert sampled is not None
        assert wider[0] <= sampled / all_positions <= wider[1]

    def test_by_hand(self):
        # t(.975, 9) = 2.2622; variance 4 (1 + 4 * .25)/(5 * 10) = .16
        assert expected_half_width(10, 5, Variation(2.0, 0.25)) == pytest.approx(2.2622 * 0.4, rel=1e-4)

    def test_is_the_width_that_simulated_runs_have(self):
        # Token KL 1 + prompt effect + noise: CV 1, correlation .2; 8 of 40 positions in each of 25 prompts.
        rng = np.random.default_rng(11)
        widths = []
        for _ in range(300):
            effects = rng.normal(0, math.sqrt(0.2), (25, 1))
            tokens = 1 + effects + rng.normal(0, math.sqrt(0.8), (25, 40))
            sampled = tokens[:, :8].sum(axis=1) * 40 / 8
            estimate = ratio_estimate(sampled, np.full(25, 40.0), n=200)
            widths.append((estimate.ci_high - estimate.ci_low) / 2)
        assert expected_half_width(25, 8, Variation(1.0, 0.2)) == pytest.approx(np.mean(widths), rel=0.03)

    def test_fewer_prompts_than_an_interval_needs_have_none(self):
        assert expected_half_width(4, 100) is None
        assert expected_width_text(4, 400).startswith("none: an interval needs at least 5 prompts, these are 4")

    def test_less_than_a_position_per_prompt_is_refused(self):
        with pytest.raises(ValueError, match=r"0\.5"):
            expected_half_width(10, 0.5)

    def test_text_says_when_the_variation_is_assumed(self):
        text = expected_width_text(40, 400)
        half = expected_half_width(40, 10, ASSUMED)
        assert f"±{100 * half:.0f} %" in text
        assert "40 prompts with 10 positions each" in text
        assert "assumed, as there is no pilot" in text
        assert "from the pilot" in expected_width_text(40, 400, Variation(1.0, 0.1))


class TestPilot:
    def test_gives_back_the_variation_that_made_it(self):
        rng = np.random.default_rng(2)
        tokens = 1 + rng.normal(0, math.sqrt(0.1), (4000, 1)) + rng.normal(0, math.sqrt(0.9), (4000, 20))
        estimate = ratio_estimate(
            tokens.sum(axis=1), np.full(4000, 20.0), n=80_000, iid_variance=tokens.var() / tokens.size
        )
        pilot = variation_of_pilot(estimate)
        assert pilot is not None
        assert pilot.cv_token == pytest.approx(1.0, rel=0.02)
        assert pilot.icc == pytest.approx(0.1, rel=0.1)
        assert not pilot.assumed

    def test_predicts_its_own_interval(self):
        estimate = Estimate(0.5, 0.05, 0.4, 0.6, n=400, n_unknown=0, n_clusters=20, design_effect=2.0, no_interval=None)
        pilot = variation_of_pilot(estimate)
        # t(.975, 19) = 2.093
        assert expected_half_width(20, 20, pilot) == pytest.approx(2.093 * 0.05 / 0.5, rel=1e-3)

    @pytest.mark.parametrize(
        "estimate",
        [
            Estimate(None, None, None, None, 0, 0, 0, None, "nothing was measured"),
            Estimate(0.5, 0.1, None, None, 40, 0, 3, 1.5, "3 prompts, at least 5 are needed"),
            Estimate(0.0, 0.0, 0.0, 0.0, 400, 0, 20, None, None),
            Estimate(0.5, 0.1, 0.3, 0.7, 10, 0, 10, 1.0, None),
        ],
        ids=["nothing measured", "too few prompts", "P against itself", "a position per prompt"],
    )
    def test_that_says_nothing_of_the_variation_is_none(self, estimate):
        assert variation_of_pilot(estimate) is None
