"""Lists of first positions as an array: tokens matched, repeats averaged, what a list lacks counted as its last."""

from __future__ import annotations

import numpy as np
import polars as pl

from kl.tables.first_lists import FIRST_LISTS, mean_logprobs


def table(*answers: tuple[str, int, dict[str, float]]) -> pl.DataFrame:
    rows = [
        (key, asked, [*lists], [None] * len(lists), [None] * len(lists), [*lists.values()])
        for key, asked, lists in answers
    ]
    return pl.DataFrame(rows, schema=FIRST_LISTS, orient="row")


def test_runs_are_matched_by_context_and_token():
    then = table(
        ("one", 1, {"a": -1.0, "b": -2.0}), ("one", 2, {"b": -2.2, "a": -1.2}), ("two", 1, {"x": -0.5}), ("gone", 1, {})
    )
    now = table(("one", 1, {"a": -1.0, "c": -3.0}), ("two", 1, {"x": -0.6}), ("new", 1, {"x": -1.0}))
    found = mean_logprobs([then, now])
    assert found.shape == (2, 2, 3)
    # c is no likelier than b, the last of both lists then; b now no likelier than c.
    np.testing.assert_allclose(found[:, 0], [[-1.1, -2.1, -2.1], [-1.0, -3.0, -3.0]])
    np.testing.assert_allclose(found[:, 1], [[-0.5, np.nan, np.nan], [-0.6, np.nan, np.nan]])


def test_without_a_common_context_there_is_nothing():
    assert mean_logprobs([table(("one", 1, {"a": -1.0})), table(("two", 1, {"a": -1.0}))]).shape[1] == 0
