"""Clustered t intervals: hand-worked values, coverage by simulation, what is not known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from kl.statistics.intervals import clusters_needed, ratio_estimate


def test_ratio_interval_of_five_clusters_by_hand():
    estimate = ratio_estimate([2, 4, 3, 5, 6], [2, 2, 2, 2, 2], n=10)
    # θ = 20/10 = 2; e = -2, 0, -1, 1, 2; Σe² = 10; SE = sqrt(5/4 · 10)/10 = .35355; t(.975, 4) = 2.77645
    assert estimate.value == 2
    assert estimate.se == pytest.approx(0.353553, abs=1e-6)
    assert estimate.ci_low == pytest.approx(2 - 2.776445 * 0.353553, abs=1e-5)
    assert estimate.ci_high == pytest.approx(2 + 2.776445 * 0.353553, abs=1e-5)
    assert (estimate.n, estimate.n_clusters, estimate.no_interval) == (10, 5, None)


def test_ratio_with_unequal_denominators_by_hand():
    estimate = ratio_estimate([1, 5], [1, 2], n=3)
    # θ = 6/3 = 2; e = 1 - 2, 5 - 4 = -1, 1; SE = sqrt(2/1 · 2)/3 = 2/3
    assert estimate.value == 2
    assert estimate.se == pytest.approx(2 / 3, rel=1e-12)


def test_fewer_than_five_prompts_have_no_interval_and_say_so():
    estimate = ratio_estimate([1, 2, 3], [1, 1, 1], n=3)
    assert estimate.se is not None
    assert (estimate.ci_low, estimate.ci_high) == (None, None)
    assert estimate.no_interval == "3 prompts, at least 5 are needed"


def test_one_prompt_has_no_standard_error():
    estimate = ratio_estimate([4.0], [2.0], n=2)
    assert (estimate.value, estimate.se, estimate.no_interval) == (2.0, None, "1 prompt, at least 5 are needed")


def test_no_data_has_no_value():
    estimate = ratio_estimate([0.0, 0.0], [0.0, 0.0], n=0)
    assert (estimate.value, estimate.n_clusters, estimate.no_interval) == (None, 0, "nothing was measured")


def test_clusters_without_data_do_not_count():
    assert ratio_estimate([1, 2, 0], [1, 1, 0], n=2).n_clusters == 2


def test_equal_clusters_have_an_interval_of_width_zero():
    estimate = ratio_estimate([0.0] * 6, [3.0] * 6, n=18)
    assert (estimate.value, estimate.se, estimate.ci_low, estimate.ci_high) == (0, 0, 0, 0)


@pytest.mark.parametrize(
    ("above", "below"),
    [
        pytest.param([1.0, math.nan], [1.0, 1.0], id="NaN numerator"),
        pytest.param([1.0, 1.0], [1.0, math.inf], id="infinite denominator"),
        pytest.param([1.0, 1.0], [1.0, -1.0], id="negative denominator"),
        pytest.param([1.0, 1.0], [1.0], id="unequal lengths"),
    ],
)
def test_bad_totals_are_refused(above: list[float], below: list[float]):
    with pytest.raises(ValueError, match="cluster totals"):
        ratio_estimate(above, below, n=2)


def test_t_interval_covers_95_percent_with_ten_clusters_and_the_iid_one_does_not():
    """Skewed totals with a shared effect per prompt and clusters of different size, as responses have."""
    rng = np.random.default_rng(20240611)
    n_sims, n_clusters, mean = 1500, 10, 0.5
    sizes = rng.integers(30, 60, size=(n_sims, n_clusters))
    effects = rng.gamma(8.0, mean / 8.0, size=(n_sims, n_clusters))
    tokens = rng.gamma(0.5, 2.0, size=(n_sims, n_clusters, 60)) * effects[..., None]
    kept = np.arange(60) < sizes[..., None]
    above = np.where(kept, tokens, 0).sum(axis=2)
    covered = [_covers(ratio_estimate(a, d, n=int(d.sum())), mean) for a, d in zip(above, sizes, strict=True)]
    assert 0.92 <= np.mean(covered) <= 0.98
    flat_mean = above.sum(axis=1) / sizes.sum(axis=1)
    variance = (np.where(kept, (tokens - flat_mean[:, None, None]) ** 2, 0)).sum(axis=(1, 2)) / sizes.sum(axis=1) ** 2
    assert np.mean(np.abs(flat_mean - mean) < 1.96 * np.sqrt(variance)) < 0.90


def _covers(estimate, truth: float) -> bool:
    return estimate.ci_low <= truth <= estimate.ci_high


def test_prompts_needed_by_hand():
    # e = -2, 0, -1, 1, 2; sd = sqrt(10/4) = 1.5811; mean N = 4; CV = .39528; (1.96 · .39528/.1)² = 60.03 → 61
    assert clusters_needed([2, 4, 3, 5, 6], [2, 2, 2, 2, 2], 0.10) == 61
    # (1.96 · .39528/.05)² = 240.1 → 241
    assert clusters_needed([2, 4, 3, 5, 6], [2, 2, 2, 2, 2], 0.05) == 241


def test_prompts_needed_are_at_least_those_of_an_interval():
    assert clusters_needed([1, 1, 1], [1, 1, 1], 0.10) == 5


@pytest.mark.parametrize(
    "above", [pytest.param([1.0], id="one prompt"), pytest.param([0.0, 0.0], id="no divergence at all")]
)
def test_prompts_needed_are_unknown_without_a_pilot(above: list[float]):
    assert clusters_needed(above, [1.0] * len(above), 0.1) is None
