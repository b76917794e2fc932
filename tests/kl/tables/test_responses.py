"""The response table: sums, means, what is missing and who could not be scored."""

from __future__ import annotations

from collections.abc import Callable

import polars as pl
import pytest

from kl.tables.responses import RESPONSES, ResponseInfo, summarise_responses
from kl.tables.totals import TokenTableError

Build = Callable[..., pl.DataFrame]


def test_row_of_a_response_by_hand(token_table: Build):
    tokens = token_table([("a.json", "p", 0, [0.5, 2.0, 1.5])])
    info = [ResponseInfo("a.json", 0, "p", "model-p", "STOP")]
    row = summarise_responses(tokens.lazy(), info).row(0, named=True)
    assert row == {
        "source_file": "a.json",
        "prompt_id": "p",
        "response_idx": 0,
        "model": "model-p",
        "finish_reason": "STOP",
        "n_positions": 3,
        "n_selected": 3,
        "n_measured": 3,
        "n_missing": 0,
        "n_estimated": 3,
        "n_infinite": 0,
        "kl_sum": 4.0,  # .5 + 2 + 1.5
        "kl_mean_per_token": 4 / 3,
        "kl_lower_sum": 2.0,  # half of each
        "kl_upper_plausible_sum": 8.0,  # twice each
        "n_unidentified": 0,
        "kl_floor_sum": 1.0,
        "kl_bucket_sum": 2.0,
        "kl_exact_sum": None,
        "reverse_kl_sum": 12.0,
        "js_sum": 0.5,
        "k1_sum": 4.0,
        "k3_sum": 4.0,
        "n_k1_censored": 0,
        "same_top_rate": 1 / 3,  # KL below 1 at the first only
        "max_kl": 2.0,
        "max_kl_position": 1,
        "mean_rest_mass_p": 0.25,
        "mean_rest_mass_q": 0.125,
        "reason": None,
        "error": None,
    }


def test_missing_positions_stay_out_of_sum_and_mean(token_table: Build):
    row = summarise_responses(token_table([("a", "p", 0, [1.0, None, 2.0])]).lazy()).row(0, named=True)
    assert (row["kl_sum"], row["kl_mean_per_token"], row["n_measured"], row["n_missing"]) == (3.0, 1.5, 2, 1)
    assert row["error"] is None


def test_one_position_without_upper_limit_leaves_the_sum_unknown(token_table: Build):
    tokens = token_table([("a", "p", 0, [1.0, 2.0])]).with_columns(kl_upper_plausible=pl.Series([2.0, None]))
    row = summarise_responses(tokens.lazy()).row(0, named=True)
    assert (row["kl_upper_plausible_sum"], row["n_unidentified"]) == (None, 1)
    assert row["kl_sum"] == 3.0


def test_positions_with_bounds_only_stay_out_of_the_estimate_and_in_the_lower_bound(token_table: Build):
    tokens = token_table([("a", "p", 0, [1.0, 2.0])]).with_columns(
        kl_estimate=pl.Series([None, 2.0]), reason=pl.Series(["short-list", None]), error=pl.Series(["3 tokens", None])
    )
    row = summarise_responses(tokens.lazy()).row(0, named=True)
    assert (row["n_measured"], row["n_estimated"], row["kl_sum"], row["kl_mean_per_token"]) == (2, 1, 2.0, 2.0)
    assert (row["kl_lower_sum"], row["error"]) == (1.5, None)


def test_response_with_bounds_only_says_why_it_has_no_estimate(token_table: Build):
    tokens = token_table([("a", "p", 0, [1.0])]).with_columns(
        kl_estimate=pl.lit(None, pl.Float64), reason=pl.lit("short-list"), error=pl.lit("P lists 3 tokens")
    )
    row = summarise_responses(tokens.lazy()).row(0, named=True)
    assert (row["kl_sum"], row["kl_lower_sum"]) == (None, 0.5)
    assert (row["reason"], row["error"]) == ("short-list", "P lists 3 tokens")


def test_infinite_position_leaves_no_finite_sum(token_table: Build):
    tokens = token_table([("a", "p", 0, [1.0, 2.0])]).with_columns(
        kl_estimate=pl.Series([None, 2.0]), reason=pl.Series(["infinite", None]), error=pl.Series(["KL is ∞", None])
    )
    row = summarise_responses(tokens.lazy()).row(0, named=True)
    assert (row["n_infinite"], row["kl_sum"], row["kl_mean_per_token"], row["max_kl"]) == (1, None, None, None)
    assert (row["kl_lower_sum"], row["reverse_kl_sum"]) == (1.5, 9.0)


def test_censored_k1_is_counted(token_table: Build):
    tokens = token_table([("a", "p", 0, [1.0, 2.0])]).with_columns(
        k1_censored=pl.Series([True, False]), k3=pl.Series([None, 2.0], dtype=pl.Float64)
    )
    row = summarise_responses(tokens.lazy()).row(0, named=True)
    assert (row["k1_sum"], row["k3_sum"], row["n_k1_censored"]) == (3.0, None, 1)


def test_response_without_any_measured_position_has_its_reason(token_table: Build):
    row = summarise_responses(token_table([("a", "p", 0, [None, None])]).lazy()).row(0, named=True)
    assert (row["kl_sum"], row["kl_mean_per_token"], row["max_kl"]) == (None, None, None)
    assert (row["n_positions"], row["n_missing"]) == (2, 2)
    assert (row["reason"], row["error"]) == ("blocked", "the service blocked this prefix")


def test_responses_and_files_that_could_not_be_read_have_rows(token_table: Build):
    info = [
        ResponseInfo("b.json", None, reason="not-json", error="line 1"),
        ResponseInfo("a.json", 0, "p", "m", "STOP"),
        ResponseInfo("a.json", 1, "p", "m", None, "no-logprobs", "has no logprobs"),
    ]
    rows = summarise_responses(token_table([("a.json", "p", 0, [1.0])]).lazy(), info)
    assert rows.schema == RESPONSES
    assert rows.select("source_file", "response_idx", "n_positions", "kl_sum", "reason").rows() == [
        ("a.json", 0, 1, 1.0, None),
        ("a.json", 1, None, None, "no-logprobs"),
        ("b.json", None, None, None, "not-json"),
    ]


def test_rows_are_by_file_and_index_whatever_the_order_of_the_tokens(token_table: Build):
    tokens = token_table([("b", "q", 0, [1.0]), ("a", "p", 1, [1.0]), ("a", "p", 0, [1.0])])
    rows = summarise_responses(tokens.lazy())
    assert rows.select("source_file", "response_idx").rows() == [("a", 0), ("a", 1), ("b", 0)]


def test_a_response_named_twice_is_refused(token_table: Build):
    info = [ResponseInfo("a.json", 0), ResponseInfo("a.json", 0)]
    with pytest.raises(TokenTableError, match=r"a\.json#0 is named twice"):
        summarise_responses(token_table([]).lazy(), info)


def test_no_responses_at_all_give_an_empty_table(token_table: Build):
    rows = summarise_responses(token_table([]).lazy())
    assert (rows.height, rows.schema) == (0, RESPONSES)
