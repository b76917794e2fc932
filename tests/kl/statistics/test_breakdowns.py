"""Percentiles, concentration, and the tables of tokens, positions and prompts."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

import kl.tables.totals
from kl.statistics.breakdowns import (
    QUANTILES,
    by_prompt,
    by_token_and_position,
    kl_distribution,
    missing_by_reason,
    outlying,
    top_share,
    weighted_quantiles,
)
from kl.tables.totals import response_totals

Build = Callable[..., pl.DataFrame]


@given(
    st.lists(st.floats(0, 50), min_size=1, max_size=60),
    st.floats(0.1, 10),
)
def test_equal_weights_give_the_quantiles_of_numpy_bit_for_bit(values: list[float], weight: float):
    wanted = list(QUANTILES.values())
    weights = [weight] * len(values)
    assert weighted_quantiles(values, wanted, weights).tolist() == np.quantile(values, wanted).tolist()


def test_weighted_quantiles_by_hand():
    # sorted 1, 2, 4 with weights 1, 3, 2: places 0, 2, 4.5; the median stands at 2.25 = .1 of the way from 2 to 4
    assert weighted_quantiles([4.0, 1.0, 2.0], [0.0, 0.5, 1.0], [2.0, 1.0, 3.0]).tolist() == pytest.approx([1, 2.2, 4])


def test_weighted_quantiles_of_a_sample_find_those_of_the_whole():
    rng = np.random.default_rng(1)
    values = rng.gamma(0.5, 1.0, size=200_000)
    pi = np.clip(values, 0.1, 0.9)
    taken = rng.random(len(values)) < pi
    estimate = weighted_quantiles(values[taken], [0.1, 0.5, 0.99], 1 / pi[taken])
    # The standard error of the estimated distribution function is at most sqrt(.5 · 9 / 200,000) = .005.
    shares = [np.mean(values <= bound) for bound in estimate]
    np.testing.assert_allclose(shares, [0.1, 0.5, 0.99], atol=0.015)
    assert np.quantile(values[taken], 0.5) > 2 * estimate[1]


def test_share_of_the_largest_positions_by_hand():
    # the top 25 % of 6 positions are one and a half: (6 + 5/2) / 21
    assert top_share(np.array([1.0, 2, 3, 4, 5, 6]), None, 0.25) == pytest.approx(8.5 / 21)
    # weights 1 and 3: the top half of the weight 4 is 2 of the 3 units of the value 5: 10 / 16
    assert top_share(np.array([1.0, 5.0]), np.array([1.0, 3.0]), 0.5) == pytest.approx(10 / 16)


def test_share_of_nothing_is_unknown():
    assert top_share(np.zeros(4), None, 0.01) is None


def test_distribution_has_the_names_of_llama_cpp(token_table: Build):
    values = [0.0, 1.0, 2.0, 3.0, 4.0]
    quantiles, share = kl_distribution(token_table([("a", "p", 0, [*values, None])]).lazy())
    assert list(quantiles) == [
        *("Maximum KLD", "99.9% KLD", "99.0% KLD", "95.0% KLD", "90.0% KLD", "Median KLD"),
        *("10.0% KLD", "5.0% KLD", "1.0% KLD", "0.1% KLD", "Minimum KLD"),
    ]
    # 5 values: the 90 % point is at .9 · 4 = 3.6
    assert (quantiles["Maximum KLD"], quantiles["90.0% KLD"], quantiles["Median KLD"]) == (4, pytest.approx(3.6), 2)
    assert share == pytest.approx(0.05 * 4 / 10)  # 1 % of 5 positions is a twentieth of the largest


def test_distribution_of_nothing_is_unknown(token_table: Build):
    quantiles, share = kl_distribution(token_table([("a", "p", 0, [None])]).lazy())
    assert set(quantiles.values()) == {None}
    assert share is None


def test_missing_positions_are_counted_by_reason(token_table: Build):
    tokens = token_table([("a", "p", 0, [None, None, None, 1.0])]).with_columns(
        reason=pl.Series(["blocked", "missing-row", "missing-row", None])
    )
    assert list(missing_by_reason(tokens.lazy()).items()) == [("missing-row", 2), ("blocked", 1)]


def test_tokens_are_ranked_by_their_total(token_table: Build, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kl.tables.totals, "BATCH_ROWS", 2)
    tokens = token_table([("a", "p", 0, [1.0, 2.0, 0.0]), ("b", "p", 0, [3.0, 4.0, None])])
    by_token, _ = by_token_and_position(tokens.lazy())
    shares = [row.pop("kl_share") for row in by_token]
    assert shares == pytest.approx([0.6, 0.4, 0.0])
    assert by_token == [
        {"token": "t1", "n_measured": 2, "kl_sum": 6.0, "kl_mean": 3.0},
        {"token": "t0", "n_measured": 2, "kl_sum": 4.0, "kl_mean": 2.0},
        {"token": "t2", "n_measured": 1, "kl_sum": 0.0, "kl_mean": 0.0},
    ]


def test_tables_are_bounded(token_table: Build):
    tokens = token_table([(f"f{i}", f"p{i}", 0, [1.0] * 120) for i in range(60)])
    by_token, by_position = by_token_and_position(tokens.lazy())
    assert (len(by_token), len(by_prompt(response_totals(tokens.lazy())))) == (50, 50)
    # 32 single positions, then 32-63 and 64-127
    assert [(row["first"], row["last"]) for row in by_position[31:]] == [(31, 31), (32, 63), (64, 127)]
    assert by_position[-1]["n_measured"] == 60 * 56


def test_positions_are_weighted_by_their_sampling(token_table: Build):
    tokens = token_table([("a", "p", 0, [1.0]), ("b", "q", 0, [4.0])]).with_columns(pi=pl.Series([0.25, 0.5]))
    by_token, by_position = by_token_and_position(tokens.lazy())
    # (1/.25 + 4/.5) / (4 + 2) = 2
    assert (by_position[0]["kl_mean"], by_position[0]["kl_lower_mean"]) == (2.0, 1.0)
    assert (by_token[0]["kl_sum"], by_token[0]["kl_mean"]) == (12.0, 2.0)


def test_prompts_are_ranked_by_their_mean(token_table: Build):
    tokens = token_table([("a", "p", 0, [1.0, 1.0]), ("b", "q", 0, [3.0]), ("a", "p", 1, [1.0, 3.0])])
    assert by_prompt(response_totals(tokens.lazy())) == [
        {"prompt_id": "q", "source_file": "b", "n_responses": 1, "n_measured": 1, "kl_per_token": 3.0}
        | {"kl_per_response": 3.0},
        {"prompt_id": "p", "source_file": "a", "n_responses": 2, "n_measured": 4, "kl_per_token": 1.5}
        | {"kl_per_response": 3.0},  # (2 + 4) / 2
    ]


def test_positions_that_stand_out_are_named_with_what_they_hold(token_table: Build):
    tokens = token_table([("a", "p0", 0, [0.1] * 60), ("b", "p1", 0, [0.1] * 38 + [6.2, None])]).with_columns(
        kl_set_aside=pl.when(pl.col("kl_estimate").is_null()).then(10.0),
        flags=pl.when((pl.col("source_file") == "a") & (pl.col("position") == 3)).then(pl.lit("clipped-q,lone-value")),
    )
    found = outlying(tokens.lazy(), response_totals(tokens.lazy()))
    assert [(row["source_file"], row["position"], row["kind"], row["kl"]) for row in found.rows] == [
        ("b", 39, "set-aside", 10.0),
        ("b", 38, "large", 6.2),
        ("a", 3, "lone-value", 0.1),
    ]
    assert [row["share"] for row in found.rows] == pytest.approx([10 / 26, 6.2 / 16, 0.1 / 16])
    assert found.largest is not None
    assert (found.largest["source_file"], found.largest["position"]) == ("b", 38)


def test_what_is_set_aside_is_named_beside_any_number_of_larger_ones(token_table: Build):
    tokens = token_table([("a", "p0", 0, [0.1] * 60 + [0.02] * 900 + [None] * 5)]).with_columns(
        kl_set_aside=pl.when(pl.col("kl_estimate").is_null()).then(0.05),
        flags=pl.when(pl.col("position") < 60).then(pl.lit("lone-value")),
    )
    rows = outlying(tokens.lazy(), response_totals(tokens.lazy())).rows
    assert [row["position"] for row in rows[:5]] == [960, 961, 962, 963, 964]
    assert [row["kind"] for row in rows] == ["set-aside"] * 5 + ["lone-value"] * 50


def test_no_position_stands_out_among_few_or_equal_ones(token_table: Build):
    tokens = token_table([("a", "p0", 0, [0.1, 2.0, 0.1])])
    assert outlying(tokens.lazy(), response_totals(tokens.lazy())).rows == []


def test_positions_stand_out_by_their_weight(token_table: Build):
    tokens = token_table([("a", "p0", 0, [0.1] * 100)]).with_columns(
        pi=pl.when(pl.col("position") == 7).then(0.01).otherwise(1.0)
    )
    found = outlying(tokens.lazy(), response_totals(tokens.lazy()))
    assert found.largest["position"] == 7
    assert found.largest["share"] == pytest.approx(100 / 199)
    assert found.rows == []  # it speaks for a hundred others
