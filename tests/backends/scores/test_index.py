"""Of a prompt with many stored scores those that are asked for are read, whatever becomes of the files meanwhile."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backends.errors import ConfigError
from backends.scores import store as stores
from backends.scores.index import PromptIndex, UsedLast
from backends.scores.parts import Part
from backends.scores.rows import frame_of, row_of
from backends.scores.store import ScoreStore
from backends.storage import StoredFile
from kl.records import Candidate, Score, ScoreFailure


def score(key: str, value: float = -0.5) -> Score:
    return Score(key, (Candidate(f"of {key}", value, 3), Candidate("b", -2.0, 4)), input_tokens=7)


def filled(folder: Path, parts: list[list[str]]) -> ScoreStore:
    store = ScoreStore(folder)
    for keys in parts:
        store.append("p", "m", [score(key) for key in keys])
    return store


@pytest.fixture
def always_indexed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "_INDEXED", 0)
    monkeypatch.setattr(stores, "_INDEXED_PER_KEY", 0)


KEYS = st.lists(st.integers(0, 30).map(str), max_size=12, unique=True)


@settings(max_examples=40, deadline=None)
@given(st.lists(KEYS, min_size=1, max_size=4), KEYS, st.sampled_from([1, 3, 4096]))
def test_what_is_read_by_the_index_is_what_is_read_of_all(
    tmp_path_factory: pytest.TempPathFactory, parts: list[list[str]], asked: list[str], together: int
) -> None:
    store = filled(tmp_path_factory.mktemp("scores"), parts)
    with pytest.MonkeyPatch.context() as changed:
        changed.setattr("backends.scores.index.ROWS_TOGETHER", together)
        changed.setattr("backends.scores.parts.ROWS_TOGETHER", together)
        changed.setattr(stores, "_INDEXED", 1 << 40)
        of_all = store.load("p", asked)
        changed.setattr(stores, "_INDEXED", 0)
        changed.setattr(stores, "_INDEXED_PER_KEY", 0)
        by_index = store.load("p", asked)
    assert by_index == of_all == {key: score(key) for key in asked if any(key in part for part in parts)}


@pytest.mark.parametrize("indexed", [0, 1 << 40])
def test_of_equal_keys_the_one_that_was_scored_first_counts_whatever_becomes_of_the_files(
    indexed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stores, "_INDEXED", indexed)
    monkeypatch.setattr(stores, "_INDEXED_PER_KEY", 0)
    monkeypatch.setattr(stores, "_MERGED_ROWS", 5)
    filled(tmp_path, [["a", "b"]]).append("p", "m", [score(key, -0.7) for key in "acdefg"])
    for keys in ("h", "i", "j"):
        ScoreStore(tmp_path).append("p", "m", [score(keys)])
    assert ScoreStore(tmp_path).load("p", "ac") == {"a": score("a"), "c": score("c", -0.7)}
    ScoreStore(tmp_path).compact("p")
    assert len(list(tmp_path.glob("p/*.parquet"))) == 2, "merged, with another time"
    assert ScoreStore(tmp_path).load("p", "ac") == {"a": score("a"), "c": score("c", -0.7)}
    for path in tmp_path.glob("p/*.parquet"):  # as a copy or an archive does
        os.utime(path, ns=(0, 10**18 - path.stat().st_mtime_ns % 10**18))
    assert ScoreStore(tmp_path).load("p", "ac") == {"a": score("a"), "c": score("c", -0.7)}


@pytest.mark.usefixtures("always_indexed")
def test_failures_parts_of_other_programs_and_damaged_rows_are_as_without_an_index(tmp_path: Path) -> None:
    store = ScoreStore(tmp_path)
    blocked = ScoreFailure("f", "blocked", "SAFETY", final=True)
    store.append("p", "m", [score("a"), blocked])
    rows = [row_of("m", score(key)) for key in ("x", "y", "z")]
    rows[1]["logprobs"] = [float("nan"), -2.0]
    frame_of(rows).write_parquet(tmp_path / "p" / "theirs.parquet")
    (tmp_path / "p" / "garbage.parquet").write_bytes(b"no table")
    found = {"a": score("a"), "f": blocked, "x": score("x"), "z": score("z")}
    assert store.load("p", [*"afxyz"]) == found
    assert (store.n_damaged, store.n_broken) == (1, 1)


@pytest.mark.usefixtures("always_indexed")
def test_parts_that_another_run_merges_or_adds_are_found(tmp_path: Path) -> None:
    store = filled(tmp_path, [["a"], ["b"], ["c"], ["d"]])
    everything = {key: score(key) for key in "abcd"}
    assert store.load("p", "abcd") == everything
    ScoreStore(tmp_path).compact("p")
    assert store.load("p", "abcd") == everything
    ScoreStore(tmp_path).append("p", "m", [score("e")])
    assert store.load("p", "abcde") == everything | {"e": score("e")}


@pytest.mark.usefixtures("always_indexed")
def test_a_part_that_changes_under_its_name_is_looked_at_again(tmp_path: Path) -> None:
    store = filled(tmp_path, [["a", "b"]])
    assert store.load("p", "ab").keys() == {"a", "b"}
    (path,) = tmp_path.glob("p/*.parquet")
    pl.read_parquet(path).head(1).write_parquet(path)
    with pytest.raises(ConfigError, match="not as it was written"):
        store.load("p", "ab")


def test_rows_near_each_other_are_read_and_not_the_whole_part(tmp_path: Path) -> None:
    store = filled(tmp_path, [[f"{number:05d}" for number in range(20_000)]])
    (path,) = tmp_path.glob("p/*.parquet")
    index = PromptIndex([(StoredFile(path, 0, ""), Part(path.name, path.read_bytes()))])
    asked = [f"{number:05d}" for number in (10, 30, 15_000, 15_001)]
    assert [table.height for table in index.rows(pl.Series(asked), ["key"])] == [21, 2]
    assert store.load("p", asked).keys() == {*asked}


def test_merged_parts_stand_in_the_order_of_their_scores_and_are_not_without_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stores, "_MERGED_ROWS", 6)
    names = [f"{number:02d}" for number in np.random.default_rng(0).permutation(20)]
    store = filled(tmp_path, [names[start : start + 2] for start in range(0, 20, 2)])
    store.compact("p")
    tables = sorted(map(pl.read_parquet, tmp_path.glob("p/*.parquet")), key=lambda table: table["scored_at"][0])
    assert [table.height for table in tables] == [6, 6, 6, 2]
    assert [key for table in tables for key in table["key"]] == names
    before = {path.name for path in tmp_path.glob("p/*.parquet")}
    store.compact("p")
    assert {path.name for path in tmp_path.glob("p/*.parquet")} == before
    assert store.known_keys("p") == {*names}


def test_what_was_used_last_is_kept_up_to_a_sum_and_always_the_last() -> None:
    made: list[str] = []
    kept = UsedLast[str, str](7, len)

    def of(name: str) -> str:
        return kept.of(name, lambda: made.append(name) or name)

    for name in ("ab", "cd", "ab", "e", "long one", "long one", "e"):
        assert of(name) == name
    assert made == ["ab", "cd", "e", "long one", "e"]
    kept.forget("e")
    of("e")
    assert made[-1] == "e"
    assert len(made) == 6
