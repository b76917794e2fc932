"""A model against itself asked again, beside the KL of Q: by hand, what is missing, and where Q is P once more."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import polars as pl
import pytest

from kl.estimators.align import align
from kl.estimators.censored import SpreadEvidence, pooled_prior
from kl.estimators.divergence import measure
from kl.finished.reading import summary_from_json
from kl.output.headline import headline
from kl.records import Sampling
from kl.statistics.dataset import summarise_dataset
from kl.statistics.noise_floor import AskedTwice, NoiseFloor, noise_floor
from kl.statistics.position_sampling import systematic_ranks
from kl.statistics.summary import RunFacts, Summary
from kl.tables.responses import summarise_responses
from tests.kl.conftest import Answer, build_tokens
from tests.kl.pairs import log_softmax, top_lists

Build = Callable[..., pl.DataFrame]
FACTS = RunFacts("p", "q", "censored", 20, 0.5, (Sampling(1.0, 1.0, 0),), None, prior_var_again=0.25)

# Five prompts of four positions: KL of Q .4 each, and of P again at two of the four.
Q = [(f"f{index}", f"p{index}", 0, [0.4 + step * 0.05 * (index - 2) for step in (1, 1, -1, -1)]) for index in range(5)]
AGAIN = [(f"f{index}", f"p{index}", 0, [0.1 * index, None, 0.1 * index, None]) for index in range(5)]


def asked_twice(tokens: pl.DataFrame, pi: float = 0.5, **who: set[str]) -> AskedTwice:
    """As measured at the positions that have a value, the others left out by the sample."""
    left_out = pl.col("kl_estimate").is_null()
    table = tokens.with_columns(
        pi=pl.lit(pi),
        selected=~left_out,
        error=pl.when(~left_out).then("error"),
        reason=pl.when(~left_out).then("reason"),
    )
    twice = AskedTwice(**{"of": {"p"}, "models": {"p"}} | who)
    twice.take([table])
    return twice


def summary_of(token_table: Build, twice: AskedTwice, of_q=Q) -> Summary:
    return summarise_dataset(token_table(of_q).lazy(), (), FACTS, twice)


def test_floor_and_difference_by_hand(token_table: Build):
    floor = summary_of(token_table, asked_twice(token_table(AGAIN))).noise_floor
    # Two of four positions: Σ v/π = 0 .4 .8 1.2 1.6 over 4 each, 4/20 = .2; e = ∓.8 ∓.4 0, Σe² = 1.6
    assert floor.kl_per_token.value == pytest.approx(0.2)
    assert floor.kl_per_token.se == pytest.approx(np.sqrt(5 / 4 * 1.6) / 20)
    assert (floor.lower.value, floor.plausible_upper.value) == (pytest.approx(0.1), pytest.approx(0.4))
    assert (floor.n_drawn, floor.n_measured, floor.missing_by_reason, floor.prior_var) == (10, 10, {}, 0.25)
    # Q is .4 in each prompt, without a residual: the difference has the error of the floor
    assert floor.ratio == pytest.approx(0.5)
    assert floor.difference.value == pytest.approx(0.2)
    assert floor.difference.se == pytest.approx(floor.kl_per_token.se)
    assert floor.difference.ci_low == pytest.approx(0.2 - 2.776445 * floor.kl_per_token.se, rel=1e-5)
    assert floor.above


def test_what_makes_a_prompt_unquiet_for_both_cancels(token_table: Build):
    of_q = [(*place, [value * 1.5 + 0.3 for value in values if value is not None] * 2) for *place, values in AGAIN]
    floor = summary_of(token_table, asked_twice(token_table(AGAIN)), of_q).noise_floor
    # Q is 1.5 times the floor and .3: .6; of each residual of the floor half is left
    assert floor.difference.value == pytest.approx(0.4)
    assert floor.difference.se == pytest.approx(floor.kl_per_token.se / 2)
    assert floor.above


def test_a_second_answer_that_is_missing_is_counted_and_makes_no_position_of_the_run_missing(token_table: Build):
    tokens = token_table(AGAIN)
    twice = asked_twice(tokens)
    lost = tokens.filter(pl.col("source_file") == "f4").with_columns(pi=pl.lit(0.5), source_file=pl.lit("f5"))
    twice.take([lost.with_columns(selected=pl.col("position") > 1)])  # one of the two has an answer
    summary = summary_of(token_table, twice)
    floor = summary.noise_floor
    assert (floor.n_drawn, floor.n_measured, floor.missing_by_reason) == (12, 11, {"blocked": 1})
    assert summary.counts.missing == 0
    assert any("noise floor: 1 of 12 positions have no second answer" in warning for warning in summary.warnings)


@pytest.mark.parametrize(
    ("of", "name"), [({"p"}, "p"), ({"q"}, "q"), ({"p", "q"}, "both")], ids=["P again", "Q twice", "either"]
)
def test_who_was_asked_again_is_said(token_table: Build, of: set[str], name: str):
    twice = asked_twice(token_table(AGAIN), of=of, models={"b", "a"}, versions={"v2", "v1"})
    floor = summary_of(token_table, twice).noise_floor
    assert (floor.of, floor.models, floor.versions) == (name, ["a", "b"], ["v1", "v2"])


def test_nothing_asked_again_has_no_floor(token_table: Build):
    assert summary_of(token_table, AskedTwice()).noise_floor is None


def test_too_few_prompts_have_a_floor_without_a_verdict(token_table: Build):
    floor = summary_of(token_table, asked_twice(token_table(AGAIN[:3])), Q[:3]).noise_floor
    assert floor.kl_per_token.value == pytest.approx(0.1)
    assert (floor.difference.ci_low, floor.above) == (None, None)
    assert floor.difference.no_interval == "this run has 3 prompts, at least 5 are needed"


def test_nothing_measured_on_either_side_is_not_known(token_table: Build):
    nothing = [(*place, [None] * 4) for *place, _ in Q]
    floor = summary_of(token_table, asked_twice(token_table(AGAIN)), nothing).noise_floor
    assert (floor.ratio, floor.difference.value, floor.above) == (None, None, None)
    assert json.dumps(floor.difference.no_interval)


def test_it_stands_in_the_headline_and_is_read_back(token_table: Build):
    nearer = [(*place, [0.3] * 4) for *place, _ in Q]
    summary = summary_of(token_table, asked_twice(token_table(AGAIN)), nearer)
    assert dict(headline(summary))["Noise floor per token"] == (
        "0.200 nats (95 % CI 0.004 to 0.396, 5 prompts); KL(P‖P again) at 10 positions; KL(P‖Q) is not above it: "
        "less this it is 0.100 (95 % CI -0.096 to 0.296, 5 prompts)"
    )
    assert "the KL of Q is not above the noise floor" in " ".join(summary.warnings)
    written = json.loads(json.dumps(summary.to_json(), allow_nan=False))
    assert summary_from_json(written) == summary
    assert "Noise floor per token" not in dict(headline(summary_of(token_table, AskedTwice())))


# P against itself: three answers of one model, from servers as unquiet as each other.

PROMPTS, POSITIONS, AGAIN_OF_EACH, VOCABULARY, K = 24, 12, 2, 40, 10
NOISE_SD, SHARED = 0.02, 0.5  # nats on each log-probability; the part of the variance that a prompt's requests share


def answer(rng: np.random.Generator, logits: np.ndarray) -> list:
    """One answer at every position: a prompt's requests go to one server, which has its own rounding."""
    server, own = rng.normal(size=(PROMPTS, 1, VOCABULARY)), rng.normal(size=logits.shape)
    noise = NOISE_SD * (np.sqrt(SHARED) * server + np.sqrt(1 - SHARED) * own)
    return top_lists(log_softmax((logits + noise).reshape(-1, VOCABULARY)), K)


def estimates(first: list, second: list) -> np.ndarray:
    """KL at each position, with the spread that these positions show."""
    aligned = align(first, second)
    return measure(aligned, pooled_prior(SpreadEvidence.of(aligned))).censored.kl


def repeat(rng: np.random.Generator, further: float = 0.0) -> NoiseFloor:
    """Q is P with ``further`` nats of noise; P is asked again at a systematic sample by entropy."""
    spread = rng.normal(size=(PROMPTS, POSITIONS, VOCABULARY))
    logits = -1.5 * np.log(np.arange(1, VOCABULARY + 1)) + spread
    lists_p, lists_again = answer(rng, logits), answer(rng, logits)
    lists_q = answer(rng, logits + further * rng.normal(size=logits.shape))
    flatness = np.array([entry[0].logprob for entry in lists_p]).reshape(PROMPTS, POSITIONS)
    ranks = [systematic_ranks(POSITIONS, AGAIN_OF_EACH, int(rng.integers(POSITIONS))) for _ in range(PROMPTS)]
    drawn = [
        place * POSITIONS + np.argsort(row)[taken]
        for place, (row, taken) in enumerate(zip(flatness, ranks, strict=True))
    ]
    at = np.sort(np.concatenate(drawn))
    kl_q = estimates(lists_p, lists_q)
    again = np.full(PROMPTS * POSITIONS, np.nan)
    again[at] = estimates([lists_p[index] for index in at], [lists_again[index] for index in at])
    table_q, table_again = (
        build_tokens([Answer(f"f{index}", f"p{index}", 0, values) for index, values in enumerate(_rows(kl))])
        for kl in (kl_q, again)
    )
    found = noise_floor(asked_twice(table_again, AGAIN_OF_EACH / POSITIONS), summarise_responses(table_q.lazy()))
    assert found is not None
    return found


def _rows(kl: np.ndarray) -> list[list[float | None]]:
    return [[None if np.isnan(value) else float(value) for value in row] for row in kl.reshape(PROMPTS, POSITIONS)]


@pytest.mark.slow
def test_where_q_is_p_the_floor_and_the_kl_agree_within_their_interval():
    """In 95 ± 2 % of 200 repeats the interval of KL(P‖Q) less the floor holds 0."""
    rng = np.random.default_rng(20261128)
    found = [repeat(rng) for _ in range(200)]
    agree = [item.difference.ci_low <= 0 <= item.difference.ci_high for item in found]
    assert 0.93 <= np.mean(agree) <= 0.97
    # Neither is biased against the other, and both are of the size of the noise: half the variance of a difference.
    floors = np.array([item.kl_per_token.value for item in found])
    differences = np.array([item.difference.value for item in found])
    assert abs(differences.mean()) < 3 * differences.std() / np.sqrt(len(found))
    assert 0.5 * NOISE_SD**2 < floors.mean() < NOISE_SD**2


def test_a_q_that_is_further_than_the_noise_is_above_the_floor():
    rng = np.random.default_rng(5)
    found = [repeat(rng, further=0.06) for _ in range(10)]
    assert all(item.above for item in found)
    assert 0.05 < np.mean([item.ratio for item in found]) < 0.35
