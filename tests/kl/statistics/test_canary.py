"""The test of first positions against earlier runs: silent about noise of a day, quick to see another model."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.canary import NOISES, drawn_runs, rate
from kl.statistics.canary import canary_test


@pytest.mark.parametrize("name", ["of the day, each context alone", "of the day, common to all"])
def test_of_2000_runs_of_an_unchanged_model_at_most_one_in_a_hundred_alarms(name):
    assert rate(NOISES[name], 0.0, runs=2_000, n_contexts=20, draws=199) <= 0.01


def test_a_change_of_twice_the_noise_is_found():
    assert rate(NOISES["of each answer"], 0.05, runs=100, n_contexts=20, draws=199, n_earlier=12) >= 0.95


def test_a_change_is_measured_in_nats_above_the_noise():
    rng = np.random.default_rng(1)
    noise = NOISES["of the day, each context alone"]
    found = canary_test(drawn_runs(rng, 12, 400, 4, noise, 0.3))
    assert found.change == pytest.approx(0.3**2 / 2, rel=0.1)
    assert found.changed(0.03)
    assert not found.changed(0.06)
    still = canary_test(drawn_runs(rng, 12, 400, 4, noise, 0.0))
    assert abs(still.change) < 0.1 * still.noise


def test_a_service_that_repeats_itself_is_silent_until_it_changes():
    runs = np.repeat(np.log(np.random.default_rng(2).dirichlet(np.ones(8), 10))[None], 6, axis=0)
    runs[:, 0, 5:] = np.nan  # a context with fewer tokens
    assert not canary_test(runs).changed()
    runs[-1] += 0.01
    assert canary_test(runs).changed()


@pytest.mark.parametrize("shape", [(5, 10, 3), (6, 4, 3)])
def test_too_few_runs_or_contexts_are_refused(shape):
    with pytest.raises(ValueError, match="at least 5 and 5 are needed"):
        canary_test(np.zeros(shape))
