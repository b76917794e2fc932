"""Sums per response: Horvitz-Thompson, batches, and tables that contradict themselves."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import polars as pl
import pytest

import kl.tables.totals
from kl.statistics.clusters import per_response, per_token
from kl.tables.totals import TokenTableError, denominator, response_totals

Build = Callable[..., pl.DataFrame]


def random_table(token_table: Build, n_responses: int = 12, seed: int = 3) -> pl.DataFrame:
    rng = np.random.default_rng(seed)
    answers = [
        (f"f{i // 3:02}.json", f"p{i // 3}", i % 3, rng.gamma(0.5, 1.0, size=rng.integers(5, 40)).tolist())
        for i in range(n_responses)
    ]
    return token_table(answers)


def test_full_sample_reproduces_the_plain_sums_bit_for_bit(token_table: Build):
    tokens = random_table(token_table)
    totals = response_totals(tokens.lazy())
    plain = tokens.group_by("source_file", "response_idx", maintain_order=True).agg(
        pl.col("kl_estimate").sum(), pl.col("kl_lower").sum().alias("lower"), pl.len().alias("n")
    )
    assert totals["kl_estimate.sum"].to_list() == plain["kl_estimate"].to_list()
    assert totals["kl_lower.sum"].to_list() == plain["lower"].to_list()
    assert totals.select(denominator("kl_estimate")).to_series().to_list() == plain["n"].to_list()
    by_prompt = totals.group_by("prompt_id", maintain_order=True).agg(pl.col("kl_estimate.sum").sum())
    assert per_token(totals, "kl_estimate").value == by_prompt["kl_estimate.sum"].sum() / tokens.height


def test_horvitz_thompson_by_hand(token_table: Build):
    tokens = token_table([("a.json", "p", 0, [1.0, 2.0, 3.0, None])]).with_columns(
        selected=pl.Series([True, False, True, False]),
        pi=pl.Series([0.5, 0.5, 0.25, 0.25]),
        kl_estimate=pl.Series([1.0, None, 3.0, None]),
        error=pl.lit(None, dtype=pl.String),
    )
    row = response_totals(tokens.lazy()).with_columns(denominator=denominator("kl_estimate")).row(0, named=True)
    # 1/.5 + 3/.25 = 14, over the 4 positions that the response is known to have
    assert row["kl_estimate.sum"] == 14
    assert row["denominator"] == 4
    assert (row["n_positions"], row["n_selected"], row["n_measured"], row["n_missing"]) == (4, 2, 2, 0)


def test_missing_positions_leave_a_mean_over_the_measured_ones(token_table: Build):
    totals = response_totals(token_table([("a.json", "p", 0, [1.0, None, 3.0])]).lazy())
    row = totals.with_columns(denominator=denominator("kl_estimate")).row(0, named=True)
    assert (row["kl_estimate.sum"], row["denominator"], row["n_missing"]) == (4, 2, 1)
    assert row["first_reason"] == "blocked"


def sampled_many_times(one: pl.DataFrame, picked: np.ndarray, pi: np.ndarray) -> pl.DataFrame:
    """One response under each design (a row of ``picked``) as a file of its own."""
    n_designs, n_positions = picked.shape
    names = pl.Series(np.repeat([f"f{i:04}" for i in range(n_designs)], n_positions))
    kl = one["kl_estimate"].to_numpy()
    return pl.concat([one] * n_designs).with_columns(
        source_file=names,
        prompt_id=names,
        selected=pl.Series(picked.ravel()),
        pi=pl.Series(np.tile(pi, n_designs)),
        kl_estimate=pl.Series(np.where(picked, kl, np.nan).ravel()).fill_nan(None),
    )


@pytest.mark.parametrize("design", ["fixed size", "unequal probabilities"])
def test_mean_of_2000_sampling_designs_is_the_full_value(token_table: Build, design: str):
    # The Monte Carlo error of the mean is .12 % for the fixed size: .5 · sqrt(.5/40) / sqrt(2000)
    rng = np.random.default_rng(11)
    kl = rng.gamma(4.0, 0.1, size=80)
    if design == "fixed size":
        pi = np.full(80, 0.5)
        picked = rng.random((2000, 80)).argsort(axis=1) < 40
    else:
        pi = np.clip(kl / kl.max(), 0.3, 0.95)
        picked = rng.random((2000, 80)) < pi
    totals = response_totals(sampled_many_times(token_table([("f", "p", 0, kl.tolist())]), picked, pi).lazy())
    assert per_token(totals, "kl_estimate").value == pytest.approx(kl.mean(), rel=0.005)
    assert per_response(totals, "kl_estimate").value == pytest.approx(kl.sum(), rel=0.005)


def test_all_systematic_samples_together_give_the_full_value(token_table: Build):
    kl = np.random.default_rng(5).gamma(0.5, 1.0, size=42)
    starts = np.arange(8)  # 42 = 5 · 8 + 2: the samples have 5 or 6 positions
    picked = np.arange(42)[None, :] % 8 == starts[:, None]
    tokens = sampled_many_times(token_table([("f", "p", 0, kl.tolist())]), picked, np.full(42, 1 / 8))
    totals = response_totals(tokens.lazy())
    assert per_token(totals, "kl_estimate").value == pytest.approx(kl.mean(), rel=1e-12)
    assert per_response(totals, "kl_estimate").value == pytest.approx(kl.sum(), rel=1e-12)


def test_responses_that_cross_batches_are_whole(token_table: Build, monkeypatch: pytest.MonkeyPatch):
    tokens = random_table(token_table)
    whole = response_totals(tokens.lazy())
    monkeypatch.setattr(kl.tables.totals, "BATCH_ROWS", 7)
    split = response_totals(tokens.lazy())
    exact = [name for name, kind in whole.schema.items() if kind != pl.Float64]
    assert split.select(exact).equals(whole.select(exact))
    sums = [name for name, kind in whole.schema.items() if kind == pl.Float64]
    np.testing.assert_allclose(split.select(sums).to_numpy(), whole.select(sums).to_numpy(), rtol=1e-12)


def test_largest_kl_and_its_position_across_batches(token_table: Build, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kl.tables.totals, "BATCH_ROWS", 2)
    row = response_totals(token_table([("a", "p", 0, [0.1, 0.2, 0.3, 4.0, 4.0, 1.0])]).lazy()).row(0, named=True)
    assert (row["max_kl"], row["max_kl_position"]) == (4.0, 3)


def test_empty_table_has_no_responses(token_table: Build):
    assert response_totals(token_table([]).lazy()).height == 0


def test_unmeasured_positions_do_not_enter_the_means_of_what_is_known_of_p(token_table: Build):
    tokens = token_table([("a", "p", 0, [1.0, None])]).with_columns(rest_mass_p=pl.Series([0.5, 0.1]))
    row = response_totals(tokens.lazy()).row(0, named=True)
    assert (row["rest_mass_p.sum"], row["rest_mass_p.n"]) == (0.5, 1)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        pytest.param({"kl_lower": math.nan}, r"a\.json#0 position 0: kl_lower = nan is not a finite", id="NaN"),
        pytest.param({"kl_upper_plausible": math.inf}, "kl_upper_plausible = inf", id="infinity"),
        pytest.param({"pi": 0.0}, "pi = 0.0 is no inclusion probability", id="probability 0"),
        pytest.param({"pi": 1.5}, "pi = 1.5 is no inclusion probability", id="probability above 1"),
        pytest.param({"pi": None}, "pi = None is null", id="unknown probability"),
        pytest.param({"prompt_id": None}, "prompt_id = None is null", id="unknown cluster"),
        pytest.param({"error": "x"}, "kl_estimate = 1.0 stands at an unmeasured", id="value beside an error"),
        pytest.param({"selected": False}, "pi = 1.0 belongs to a position that was left out", id="left out at π = 1"),
        pytest.param(
            {"kl_estimate": None, "kl_lower": None}, "kl_estimate = None is unknown and no error", id="silent gap"
        ),
    ],
)
def test_rows_that_contradict_themselves_are_refused(token_table: Build, columns: dict, message: str):
    tokens = token_table([("a.json", "p", 0, [1.0])])
    broken = tokens.with_columns(
        pl.lit(value, dtype=tokens.schema[name]).alias(name) for name, value in columns.items()
    )
    with pytest.raises(TokenTableError, match=message):
        response_totals(broken.lazy())


@pytest.mark.parametrize(
    "positions",
    [
        pytest.param([0, 1, 1], id="a position twice"),
        pytest.param([0, 2, 3], id="a gap"),
        pytest.param([0, 0, 2], id="a gap and a repetition"),
    ],
)
def test_positions_must_stand_once_each(token_table: Build, positions: list[int]):
    tokens = token_table([("a.json", "p", 0, [1.0, 1.0, 1.0])])
    broken = tokens.with_columns(position=pl.Series(positions, dtype=pl.Int32))
    with pytest.raises(TokenTableError, match=r"a\.json#0 has 3 rows"):
        response_totals(broken.lazy())


def test_absent_columns_are_named(token_table: Build):
    with pytest.raises(TokenTableError, match="lacks the columns kl_floor, pi"):
        response_totals(token_table([("a", "p", 0, [1.0])]).drop("kl_floor", "pi").lazy())
