"""KL(Q then‖Q now) from what two runs kept: by hand where nothing is hidden, and which contexts are the same."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import polars as pl
import pytest

from kl.finished.between import QLists, kl_between
from kl.tables.schemas import CANDIDATES, TOKENS
from kl.tables.totals import TokenTableError

Row = tuple[str, str, str, float | None]  # file, prompt, P's token, Q's probability of "a"; None: no list


def lists(*rows: Row, pi: Sequence[float] = (), selected: Sequence[bool] = ()) -> QLists:
    """A run whose Q knows two tokens, so that its lists hide nothing."""
    found: list[dict[str, object]] = []
    for number, (file, prompt, token, probability) in enumerate(rows):
        known = [] if probability is None else sorted([(probability, "a"), (1 - probability, "b")], reverse=True)
        position = sum(row["source_file"] == file for row in found)
        found.append(
            {"source_file": file, "response_idx": 0, "position": position, "prompt_id": prompt, "token": token}
            | {"is_stop": False, "selected": selected[number] if selected else True, "pi": pi[number] if pi else 1.0}
            | {"n_dropped": 0, "n_wanted_q": None if probability is None else 0, "align_key": "text"}
            | {"q_tokens": None if probability is None else [name for _, name in known]}
            | {"q_logprobs": None if probability is None else [math.log(value) for value, _ in known]}
            | {name: None if probability is None else [None, None] for name in ("q_token_ids", "q_bytes")}
        )
    schema = {name: {**TOKENS, **CANDIDATES}[name] for name in found[0]}
    frame = pl.DataFrame(found, schema=schema)
    tables = (
        frame.with_columns(pl.lit(None, dtype=kind).alias(name) for name, kind in table.items() if name not in schema)
        for table in (TOKENS, CANDIDATES)
    )
    return QLists("a run", *(table.lazy() for table in tables))


def kl(p: float, q: float) -> float:
    return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))


def run_of(*probabilities: float | None) -> QLists:
    """Six prompts of two positions."""
    return lists(*((f"f{i}", f"p{i}", f"t{t}", probabilities[t]) for i in range(6) for t in range(len(probabilities))))


def test_it_is_the_mean_of_the_positions_with_its_bound() -> None:
    then, now = run_of(0.5, 0.9), run_of(0.8, 0.6)
    found = kl_between(then, now)
    expected = (kl(0.5, 0.8) + kl(0.9, 0.6)) / 2
    assert found.per_token.value == pytest.approx(expected)
    assert found.lower.value == pytest.approx(expected)
    assert found.per_response.value == pytest.approx(2 * expected)
    assert (found.n_contexts, found.n_measured, found.per_token.n_clusters, found.missing) == (12, 12, 6, {})
    assert kl_between(now, then).per_token.value == pytest.approx((kl(0.8, 0.5) + kl(0.6, 0.9)) / 2), "it has a side"
    same = kl_between(then, then)
    assert (same.per_token.value, same.lower.value) == (0, 0)


def test_a_context_is_the_prompt_and_all_tokens_before_it() -> None:
    then = lists(
        ("a", "p", "x", 0.5), ("a", "p", "y", 0.5), ("a", "p", "z", 0.5), ("b", "p2", "x", 0.5), ("c", "p3", "x", 0.5)
    )
    now = lists(
        ("a", "p", "x", 0.8),
        ("a", "p", "OTHER", 0.8),
        ("a", "p", "z", 0.8),
        ("b", "p9", "x", 0.8),
        ("d", "p3", "x", 0.8),
    )
    found = kl_between(then, now)
    # The token that differs is itself asked in the same context; what follows it is not.
    assert (found.n_contexts, found.n_measured) == (2, 2)
    assert (found.n_only_first, found.n_only_second) == (3, 3)
    assert found.example == "a#0 position 2"
    assert found.per_token.value == pytest.approx(kl(0.5, 0.8))


def test_a_context_without_a_list_is_counted_with_its_reason() -> None:
    then = lists(("a", "p", "x", None), ("a", "p", "y", 0.5), ("a", "p", "z", 0.5))
    found = kl_between(then, lists(("a", "p", "x", 0.8), ("a", "p", "y", None), ("a", "p", "z", 0.8)))
    assert (found.n_contexts, found.n_measured, found.missing) == (3, 1, {"not-in-both-runs": 2})
    assert found.per_token.value == pytest.approx(kl(0.5, 0.8))


def test_positions_of_a_sample_are_weighted_and_other_samples_set_aside() -> None:
    rows = [("a", "p", f"t{t}", 0.5) for t in range(4)]
    now = lists(*(("a", "p", f"t{t}", 0.8) for t in range(4)))
    sampled = lists(*rows, pi=[0.5] * 4, selected=[True, False, True, False])
    found = kl_between(sampled, now)
    assert (found.n_measured, found.per_token.value) == (2, pytest.approx(kl(0.5, 0.8)))
    other = lists(*rows, pi=[0.5] * 4, selected=[False, True, False, True])
    found = kl_between(sampled, other)
    assert (found.n_contexts, found.n_only_second, found.per_token.value) == (0, 4, None)


def test_lists_that_hide_tokens_give_a_bound_below_the_truth() -> None:
    rng = np.random.default_rng(5)
    logits = rng.normal(0, 2, (60, 400))
    laws = [
        np.exp(x) / np.exp(x).sum(axis=1, keepdims=True) for x in (logits, logits + rng.normal(0, 0.5, logits.shape))
    ]
    runs = [top_lists(law, 20) for law in laws]
    found = kl_between(*runs)
    exact = float((laws[0] * np.log(laws[0] / laws[1])).sum(axis=1).mean())
    assert found.lower.value is not None
    assert found.per_token.value is not None
    assert 0 < found.lower.value <= exact
    assert abs(found.per_token.value - exact) < 0.15 * exact


def top_lists(law: np.ndarray, k: int) -> QLists:
    """A run of one position a prompt, with the k best of each."""
    order = np.argsort(-law, axis=1)[:, :k]
    n = len(law)
    frame = pl.DataFrame(
        {"source_file": [f"{i:03}" for i in range(n)], "prompt_id": [f"p{i}" for i in range(n)], "token": ["x"] * n}
        | {
            "q_tokens": [[str(t) for t in row] for row in order],
            "q_logprobs": np.log(np.take_along_axis(law, order, 1)).tolist(),
        }
        | {"q_token_ids": order.tolist(), "q_bytes": [[None] * k] * n, "n_wanted_q": [0] * n, "align_key": ["id"] * n}
    ).with_columns(response_idx=0, position=0, is_stop=False, selected=True, pi=1.0, n_dropped=0)
    typed = frame.select(pl.col(name).cast({**TOKENS, **CANDIDATES}[name]) for name in frame.columns)
    return QLists(
        "a run",
        *(
            typed.with_columns(
                pl.lit(None, dtype=kind).alias(name) for name, kind in table.items() if name not in typed
            ).lazy()
            for table in (TOKENS, CANDIDATES)
        ),
    )


def test_tables_of_two_runs_are_refused() -> None:
    then, now = run_of(0.5, 0.9), run_of(0.8, 0.6)
    with pytest.raises(TokenTableError, match="a run are not of one run"):
        kl_between(then, now._replace(candidates=run_of(0.8).candidates))
