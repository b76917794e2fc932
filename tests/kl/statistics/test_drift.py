"""The change of the KL per token between two runs: hand-worked values, resampling, coverage, what is not known."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import polars as pl
import pytest
from scipy.stats import ttest_ind, ttest_rel

from kl.statistics.clusters import per_token
from kl.statistics.drift import COLUMNS, Change, change, prompt_totals
from kl.tables.responses import RESPONSES, summarise_responses
from kl.tables.totals import response_totals

Build = Callable[..., pl.DataFrame]


def table(sums: Sequence[float | None], sizes: Sequence[int], prompts: Sequence[str] | None = None) -> pl.DataFrame:
    """A response table with one response a prompt: its KL sum and its number of positions."""
    columns = {
        "prompt_id": list(prompts or [f"p{index}" for index in range(len(sums))]),
        "n_positions": list(sizes),
        "n_selected": list(sizes),
        "n_estimated": [0 if value is None else size for value, size in zip(sums, sizes, strict=True)],
        "n_infinite": [0] * len(sums),
        "kl_sum": list(sums),
        "kl_mean_per_token": [None if v is None else v / n for v, n in zip(sums, sizes, strict=True)],
    }
    return pl.DataFrame(columns, schema={name: RESPONSES[name] for name in COLUMNS})


def test_the_paired_interval_of_five_prompts_by_hand():
    run, reference = table([2, 4, 3, 5, 6], [2] * 5), table([1, 2, 2, 3, 4], [2] * 5)
    found = change(run, reference, 0.95)
    # θ = 20/10 and 12/10; e - e' = (N - N' - .8·2)/10: -.06, .04, -.06, .04, .04; Σ = .012; 5/4 · .012 = .015
    assert (found.run, found.reference, found.value) == (2, 1.2, pytest.approx(0.8))
    assert found.se == pytest.approx(math.sqrt(0.015))
    assert found.degrees_of_freedom == pytest.approx(4)
    assert found.low == pytest.approx(0.8 - 2.776445 * math.sqrt(0.015), abs=1e-6)
    assert (found.n_shared, found.n_only_run, found.n_only_reference) == (5, 0, 0)
    assert (found.decide(0), found.decide(0.5), found.direction) == ("drift", "no drift", "up")


def test_with_equal_sizes_it_is_the_paired_and_the_welch_t_interval():
    rng = np.random.default_rng(3)
    a, b = rng.gamma(2, 1, 9), rng.gamma(2, 1, 9) + 0.3
    paired, expected = change(table(a, [1] * 9), table(b, [1] * 9), 0.99), ttest_rel(a, b).confidence_interval(0.99)
    assert (paired.low, paired.high) == pytest.approx((expected.low, expected.high))
    c = rng.gamma(2, 3, 14)
    others = [f"other{index}" for index in range(14)]
    apart = change(table(a, [1] * 9), table(c, [1] * 14, others), 0.99)
    expected = ttest_ind(a, c, equal_var=False).confidence_interval(0.99)
    assert (apart.low, apart.high) == pytest.approx((expected.low, expected.high))
    assert (apart.n_shared, apart.n_only_run, apart.n_only_reference) == (0, 9, 14)


def test_without_a_reference_it_is_the_clustered_interval_of_the_mean():
    found = change(table([2, 4, 3, 5, 6], [2] * 5), None, 0.95)
    # as in test_intervals: 2 ± 2.776445 · .353553
    assert (found.value, found.run, found.reference) == (2, 2, None)
    assert (found.low, found.high) == (pytest.approx(1.018380, abs=1e-5), pytest.approx(2.981620, abs=1e-5))
    assert (found.decide(1.0), found.decide(1.1)) == ("drift", "no drift")


def test_the_same_run_twice_differs_by_exactly_nothing():
    rng = np.random.default_rng(1)
    sums, sizes = rng.gamma(2, 1, 30), rng.integers(3, 90, 30)
    order = rng.permutation(30)
    run = table(sums, sizes)
    found = change(run[order.tolist()], run, 0.99)
    assert (found.value, found.se, found.low, found.high) == (0, 0, 0, 0)
    assert (found.decide(0), found.direction) == ("no drift", "none")


def test_rounding_is_no_rise():
    sums = np.full(8, 0.1)
    found = change(table(sums * 3, [3] * 8), table((sums * 3) * (1 + 3e-16), [3] * 8), 0.99)
    assert (found.value, found.se, found.decide(0)) == (0, 0, "no drift")


def test_a_fall_is_seen_and_is_no_drift():
    run, reference = table([1.0] * 6, [2] * 6), table([2.0, 2.1, 1.9, 2.0, 2.1, 1.9], [2] * 6)
    found = change(run, reference, 0.99)
    assert (found.decide(0), found.direction) == ("no drift", "down")


@pytest.mark.parametrize("shared", [24, 12, 0])
def test_the_standard_error_is_that_of_resampled_prompts(shared: int):
    rng = np.random.default_rng(shared)
    n = 24
    names = [f"p{index}" for index in range(2 * n - shared)]
    effect = dict(zip(names, rng.gamma(2, 0.5, len(names)), strict=True))
    in_run, in_reference = names[:n], names[n - shared :]
    runs = []
    for chosen in (in_run, in_reference):
        sizes = rng.integers(20, 120, n)
        sums = sizes * (np.array([effect[name] for name in chosen]) + rng.normal(0, 0.1, n))
        runs.append({name: (s, d) for name, s, d in zip(chosen, sums, sizes, strict=True)})
    found = change(*(table(*zip(*run.values(), strict=True), list(run)) for run in runs), 0.99)
    values = [_resampled(rng, names, *runs) for _ in range(4000)]
    assert found.value == pytest.approx(_difference(*(np.array(list(run.values())) for run in runs)))
    assert found.se == pytest.approx(np.std(values), rel=0.12)


def _difference(run: np.ndarray, reference: np.ndarray) -> float:
    return run[:, 0].sum() / run[:, 1].sum() - reference[:, 0].sum() / reference[:, 1].sum()


def _resampled(rng: np.random.Generator, names: list[str], run: dict, reference: dict) -> float:
    """The difference over prompts drawn anew: those of both runs in pairs, the others each by themselves."""
    groups = [
        [name for name in names if name in run and name in reference],
        [name for name in names if name in run and name not in reference],
        [name for name in names if name not in run],
    ]
    drawn = [group[index] for group in groups for index in rng.integers(0, len(group) or 1, len(group))]
    return _difference(*(np.array([side[name] for name in drawn if name in side]) for side in (run, reference)))


def draw(rng: np.random.Generator, names: Sequence[str], effects: dict[str, float], factor: float) -> pl.DataFrame:
    """Fresh responses: the prompt's own KL (skewed over prompts), times a factor, with noise of its tokens."""
    sizes = rng.integers(10, 80, len(names))
    means = factor * np.array([effects[name] for name in names])
    return table(rng.gamma(sizes * 0.5, means / 0.5), sizes, names)


def repeats(n_run: int, n_reference: int, shared: int, level: float, n: int, factor: float = 1.0) -> list[Change]:
    names = [f"p{index}" for index in range(n_run + n_reference - shared)]
    found = []
    for seed in range(n):
        rng = np.random.default_rng([seed, n_run, shared])
        effects = dict(zip(names, rng.lognormal(-1, 0.8, len(names)), strict=True))
        run, reference = draw(rng, names[:n_run], effects, factor), draw(rng, names[n_run - shared :], effects, 1.0)
        found.append(change(run, reference, level))
    return found


@pytest.mark.parametrize(("n_run", "n_reference", "shared"), [(20, 20, 20), (8, 8, 8), (20, 30, 10), (16, 24, 0)])
def test_the_interval_of_the_same_model_holds_zero_as_often_as_it_says(n_run: int, n_reference: int, shared: int):
    found = repeats(n_run, n_reference, shared, 0.9, 300)
    holds = np.mean([item.low <= 0 <= item.high for item in found])
    assert 0.84 <= holds <= 0.95  # 300 repeats of .9: a standard deviation of .017
    raised = np.mean([item.low > 0 for item in repeats(n_run, n_reference, shared, 0.99, 300)])
    assert raised <= 0.02  # .005 expected


def test_twenty_repeats_of_the_same_model_raise_no_alarm_and_a_noisier_one_always_does():
    assert [item.decide(0) for item in repeats(24, 24, 24, 0.99, 20)] == ["no drift"] * 20
    assert [item.decide(0) for item in repeats(24, 24, 24, 0.99, 20, factor=3.0)] == ["drift"] * 20


def test_the_mean_is_that_of_the_summary_also_with_sampled_and_missing_positions(token_table: Build):
    answers = [(f"f{i}", f"p{i // 2}", 0, [0.1 * i + 0.05 * t for t in range(4 + i % 3)]) for i in range(12)]
    tokens = token_table(answers)
    chosen = (pl.col("position") % 2 == 0) & ~(pl.col("source_file") == "f3")
    lost = chosen & (pl.col("source_file").is_in(["f5", "f8"]) & (pl.col("position") == 0))
    known = [name for name in tokens.columns if name.startswith(("kl_", "js_", "reverse_", "tv_"))]
    tokens = tokens.with_columns(
        *(pl.when(chosen & ~lost).then(name).alias(name) for name in known),
        selected=chosen,
        pi=pl.lit(0.5),
        error=pl.when(lost).then(pl.lit("blocked")),
        reason=pl.when(lost).then(pl.lit("blocked")),
    )
    rows = summarise_responses(tokens.lazy())
    assert change(rows, None, 0.95).run == pytest.approx(per_token(response_totals(tokens.lazy()), "kl_estimate").value)
    assert prompt_totals(rows).height == 6


def test_fewer_than_five_prompts_are_undecided_with_the_means():
    found = change(table([9.0] * 4, [2] * 4), table([1.0] * 9, [2] * 9), 0.99)
    assert (found.low, found.no_interval) == (None, "this run has 4 prompts, at least 5 are needed")
    assert (found.run, found.reference, found.value) == (4.5, 0.5, 4.0)
    assert (found.decide(0), found.direction) == ("undecided", "none")
    found = change(table([9.0] * 9, [2] * 9), table([1.0] * 3, [2] * 3), 0.99)
    assert found.no_interval == "the reference has 3 prompts, at least 5 are needed"


def test_responses_without_an_estimate_take_no_part():
    found = change(table([2, 4, 3, 5, 6, None], [2] * 6), None, 0.95)
    assert (found.value, found.n_only_run) == (2, 5)
    assert change(table([None] * 6, [2] * 6), None, 0.95).no_interval == "this run has no position with an estimate"


def test_an_infinite_kl_has_no_mean():
    run = table([2.0] * 6, [2] * 6).with_columns(n_infinite=pl.Series([0, 0, 1, 0, 0, 0]))
    found = change(run, table([1.0] * 6, [2] * 6), 0.99)
    assert (found.run, found.value, found.low) == (None, None, None)
    assert found.no_interval == "the KL of this run is infinite, at 1 positions"


@pytest.mark.parametrize("level", [0.0, 1.0, 99])
def test_a_level_is_a_probability(level: float):
    with pytest.raises(ValueError, match="between 0 and 1"):
        change(table([1.0] * 5, [1] * 5), None, level)


def test_a_sum_that_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="not finite"):
        change(table([1.0, math.nan, 1.0, 1.0, 1.0], [1] * 5), None, 0.99)
