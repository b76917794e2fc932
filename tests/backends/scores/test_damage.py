"""Stored scores that are damaged: named, set aside, asked again; what is sound beside them is not touched."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from backends.errors import ConfigError
from backends.scores.damage import damage
from backends.scores.parts import Part, packed
from backends.scores.rows import LISTS, SCORES, WANTED, frame_of, row_of
from backends.scores.store import ScoreStore
from backends.storage import as_location, list_remote, read_bytes, write_bytes_atomic
from kl.records import Candidate, ExactPair, Score, ScoreFailure
from tests.vertex_world.world import VertexWorld

TOP = (Candidate("a", -0.5, 1, b"a"), Candidate("b", -1.5, 2, None), Candidate("c", -2.5, None))
GOOD = "0" * 32
BAD = "b" * 32


def score(key: str, **fields: Any) -> Score:
    return Score(key, TOP, Candidate("a", -0.5), "v-1", "STOP", 12, 1, **fields)


def store_of(root: Path) -> ScoreStore:
    """As a run has it, alone in its folder."""
    return ScoreStore(root, alone=nullcontext)


def written(root: Path, frame: pl.DataFrame, name: str = "foreign.parquet") -> Path:
    path = root / "p" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    frame.write_parquet(path)
    return path


def row(key: str | None = BAD, **values: Any) -> dict[str, Any]:
    return row_of("m", score(GOOD, wanted=TOP[1:])) | {"key": key} | values


# What is wrong with a row → what the line says of it.
ROWS = {
    "fewer log-probabilities": (row(logprobs=[-0.5, -1.5]), "unequal lengths"),
    "more ids": (row(token_ids=[1, 2, 3, 4]), "unequal lengths"),
    "no bytes": (row(token_bytes=None), "unequal lengths"),
    "no tokens": (row(tokens=None), "neither a list nor a failure"),
    "a null token": (row(tokens=["a", None, "c"]), "a null among the tokens"),
    "a null log-probability": (row(logprobs=[-0.5, None, -2.5]), "logprobs with a null"),
    "a NaN": (row(logprobs=[-0.5, math.nan, -2.5]), "logprobs with a null, a NaN"),
    "logits": (row(logprobs=[7.5, -1.5, -2.5]), "a value above 0"),
    "an infinite one": (row(logprobs=[math.inf, -math.inf, -2.5]), "a value above 0"),
    "no key": (row(None), "one: no key"),
    "an empty key": (row(""), "one: no key"),
    "nothing": ({name: None for name in SCORES} | {"key": BAD}, "neither a list nor a failure"),
    "no count": (row(n_dropped=None), "no n_dropped"),
    "a failure of which nothing is said": (row(reason="blocked"), "a failure without its message"),
    "wanted lists": (row(wanted_ids=[2]), "unequal lengths"),
    "a null among the wanted": (row(wanted_tokens=["b", None]), "a null among the wanted_tokens"),
    "a wanted NaN": (row(wanted_logprobs=[math.nan, -1.0]), "wanted_logprobs with"),
    "a vocabulary with a NaN": (row(full_logprobs=[-1.0, math.nan]), "full_logprobs with"),
    "a pair without sizes": (row(exact_versus="q"), "figures of a pair"),
}
FILES: dict[str, Callable[[bytes], bytes]] = {
    "no Parquet": lambda _: b"no Parquet" * 20,
    "zero bytes": lambda _: b"",
    "cut short": lambda content: content[: len(content) // 2],
    "its end is gone": lambda content: content[:-20],
    "zeros inside": lambda content: content[:50] + bytes(200) + content[250:],
}
KEYS = [score(BAD), score(GOOD)]


@pytest.mark.parametrize("case", ROWS)
def test_a_damaged_row_is_named_set_aside_and_asked_again(
    case: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broken, why = ROWS[case]
    path = written(tmp_path, pl.DataFrame([broken, row(GOOD)], schema=SCORES, orient="row"))
    before = path.read_bytes()
    reader = ScoreStore(tmp_path)
    for _ in range(2):  # who only reads says it once, and changes nothing
        assert reader.known_keys("p") == {GOOD}
        assert list(reader.load("p", [BAD, GOOD])) == [GOOD]
    assert (reader.n_damaged, reader.n_broken, len(caplog.messages), path.read_bytes()) == (1, 0, 1, before)
    caplog.clear()

    assert store_of(tmp_path).known_keys("p") == {GOOD}
    (line,) = caplog.messages
    assert f"{path} has 1 damaged score (" in line
    assert why in line
    assert BAD not in line, "a key is shown in short"
    (kept,) = (tmp_path / "set_aside").rglob("*.parquet")
    assert str(kept) in line
    assert pl.read_parquet(kept).equals(pl.DataFrame([broken], schema=SCORES, orient="row"))
    (part,) = (tmp_path / "p").iterdir()
    assert Part(part.name, part.read_bytes()).proven
    caplog.clear()
    again = store_of(tmp_path)
    again.append("p", "m", [score(BAD)])
    again.compact_all()
    assert again.known_keys("p") == {GOOD, BAD}
    assert again.load("p", [BAD, GOOD]) == {BAD: score(BAD), GOOD: score(GOOD, wanted=TOP[1:])}
    assert (caplog.messages, kept.exists(), next(iter(tmp_path.glob("*/*.parquet"))).parent.name) == ([], True, "p")


def test_of_a_part_that_was_rewritten_under_its_name_the_sound_rows_are_kept(tmp_path: Path) -> None:
    store_of(tmp_path).append("p", "m", [score(GOOD), score(BAD), score("c" * 32)])
    (path,) = (tmp_path / "p").iterdir()
    rows = pl.read_parquet(path).with_columns(
        tokens=pl.when(pl.col("key") == BAD).then(pl.col("tokens").list.head(1)).otherwise("tokens")
    )
    rows.write_parquet(path)
    store = store_of(tmp_path)
    assert store.known_keys("p") == {GOOD, "c" * 32}
    assert store.load("p", [GOOD]) == {GOOD: score(GOOD)}
    assert (store.n_damaged, path.exists()) == (1, False)


@pytest.mark.parametrize("case", FILES)
@pytest.mark.parametrize("name", ["own", "foreign"])
def test_a_file_that_holds_no_scores_is_set_aside_whole(
    name: str, case: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store_of(tmp_path).append("p", "m", [score(BAD)])
    (path,) = (tmp_path / "p").iterdir()
    if name == "foreign":
        path = path.rename(path.with_name("foreign.parquet"))
    harmed = FILES[case](path.read_bytes())
    path.write_bytes(harmed)
    store = store_of(tmp_path)
    store.append("p", "m", [score(GOOD)])
    assert store.known_keys("p") == {GOOD}
    (line,) = caplog.messages
    assert f"{path} holds no scores that can be read (" in line
    (kept,) = (tmp_path / "set_aside" / "p").iterdir()
    assert (kept.read_bytes(), str(kept) in line, path.exists()) == (harmed, True, False)
    assert store.compared("p").failed == set()


TABLES = {
    "another table": (pl.DataFrame({"a": [1]}), "it has no key, model, model_version"),
    "a number for a text": (frame_of([row()]).with_columns(key=pl.lit(7)), "key is Int32, not String"),
    "texts for numbers": (frame_of([row()]).cast({"logprobs": pl.List(pl.String)}), "logprobs is List(String), not"),
    "no list": (frame_of([row()]).with_columns(tokens=pl.lit("a")), "tokens is String, not List(String)"),
    "an id of 65 bits": (
        frame_of([row()]).with_columns(token_ids=pl.lit([2**63], pl.List(pl.UInt64))), "conversion from `u64` to `i64`"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", TABLES)
def test_a_table_that_is_none_of_scores_is_set_aside_whole(
    case: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    frame, why = TABLES[case]
    path = written(tmp_path, frame)
    assert store_of(tmp_path).known_keys("p") == set()
    assert why in caplog.text
    assert not path.exists()


def test_a_table_with_numbers_of_other_sizes_is_one_of_scores(tmp_path: Path) -> None:
    frame = frame_of([row(GOOD)]).cast({"n_dropped": pl.Int64, "token_ids": pl.List(pl.Int32)})
    written(tmp_path, frame.cast({"logprobs": pl.List(pl.Float32)}).with_columns(error=pl.lit(None)))
    store = store_of(tmp_path)
    for key in "abcd":
        store.append("p", "m", [score(key)])
    store.compact_all()
    assert store.known_keys("p") == {GOOD, *"abcd"}
    (path,) = (tmp_path / "p").iterdir()
    assert pl.read_parquet_schema(path) == SCORES


def test_what_the_storage_does_not_give_is_not_taken_for_damaged(tmp_path: Path) -> None:
    store = store_of(tmp_path)
    store.append("p", "m", [score(GOOD)])
    (path,) = (tmp_path / "p").iterdir()
    aside = tmp_path / "disk"
    path.rename(aside)
    for bring in (
        lambda: path.symlink_to("/proc/self/mem"),  # reading it is an I/O error
        lambda: path.symlink_to(tmp_path / "another disk, not mounted"),
        lambda: path.mkdir(),
    ):
        bring()
        with pytest.raises(ConfigError, match="They are not taken for lost, and nothing is asked in their place"):
            store.known_keys("p")
        path.rmdir() if path.is_dir() else path.unlink()
    assert not (tmp_path / "set_aside").exists()
    aside.rename(path)
    assert store.known_keys("p") == {GOOD}


def test_a_part_that_was_changed_and_shows_no_damage_ends_the_run(tmp_path: Path) -> None:
    store = store_of(tmp_path)
    store.append("p", "m", [score(GOOD), score(BAD)])
    (path,) = (tmp_path / "p").iterdir()
    pl.read_parquet(path).with_columns(logprobs=pl.lit([-0.25, -1.5, -2.5])).write_parquet(path)
    with pytest.raises(ConfigError, match="If you changed it, give it another name"):
        store.known_keys("p")
    path.rename(path.with_name("changed.parquet"))
    assert store.known_keys("p") == {GOOD, BAD}
    (adopted,) = (tmp_path / "p").iterdir()
    assert Part(adopted.name, adopted.read_bytes()).proven, "so that it need not be checked each time"


def test_a_kill_while_rows_are_set_aside_loses_nothing(tmp_path: Path) -> None:
    frame = pl.DataFrame([ROWS["a NaN"][0], row(GOOD)], schema=SCORES, orient="row")
    path = written(tmp_path, frame)
    content = path.read_bytes()
    assert store_of(tmp_path).known_keys("p") == {GOOD}
    kept = sorted((tmp_path / "set_aside").rglob("*.parquet"))
    path.write_bytes(content)  # killed before it was removed
    assert store_of(tmp_path).known_keys("p") == {GOOD}
    assert sorted((tmp_path / "set_aside").rglob("*.parquet")) == kept
    assert len(list((tmp_path / "p").iterdir())) == 1


def test_a_part_that_another_run_puts_right_is_read_in_its_new_form(tmp_path: Path) -> None:
    bad = ROWS["a NaN"][0]
    written(tmp_path, pl.DataFrame([bad, row(GOOD)], schema=SCORES, orient="row"))
    written(tmp_path, frame_of([row("c" * 32)]), "later.parquet")
    reader = ScoreStore(tmp_path)
    parts = reader._each("p")
    assert {key for _, part in [next(parts)] for key in part.rows(["key"])["key"]} == {GOOD}
    assert store_of(tmp_path).known_keys("p") == {GOOD, "c" * 32}
    assert {key for _, part in parts for key in part.rows(["key"])["key"]} >= {"c" * 32}


# Journals

LINES = {
    "a NaN": {"logprobs": [-0.5, math.nan, -2.5]},
    "unequal lists": {"logprobs": [-0.5, -1.5, -2.5, -3.5]},  # a table would cut it to fit
    "a null token": {"tokens": ["a", None, "c"]},
    "a number for a text": {"tokens": ["a", 7, "c"]},
    "an id of 65 bits": {"token_ids": [1, 2**64, 3]},
    "no key": {"key": None},
    "a folder elsewhere": {"prompt_id": "../elsewhere"},
    "no such time": {"scored_at": "yesterday"},
}


@pytest.mark.parametrize("case", LINES)
def test_a_damaged_line_of_a_journal_is_set_aside_and_the_others_are_taken_in(
    case: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    journal = ScoreStore(tmp_path).journal("j")
    longer = replace(score("d" * 32), top=(*TOP, Candidate("d", -3.0), Candidate("e", -4.0)))
    for result in (score(GOOD), score(BAD), longer):
        journal.add("p", "m", result)
    (path,) = (tmp_path / "journals").iterdir()
    lines = path.read_bytes().splitlines(keepends=True)
    lines[1] = json.dumps(json.loads(lines[1]) | LINES[case]).encode() + b"\n"
    path.write_bytes(b"".join(lines))
    store = store_of(tmp_path)
    assert store.recover() == 2
    assert store.load("p", [GOOD, BAD, "d" * 32]) == {GOOD: score(GOOD), "d" * 32: longer}
    (line,) = caplog.messages
    (kept,) = (item for item in (tmp_path / "set_aside").rglob("*") if item.is_file())
    assert str(kept) in line
    assert kept.suffix == ".parquet" or kept.read_bytes() == lines[1]
    assert not path.exists()


# What the store writes it never takes for damaged: it would be bought again and again.

VALUES = st.one_of(st.floats(), st.none(), st.floats(-20, 0), st.sampled_from([-0.0, 1e-3, 9.9e-3]))
CANDIDATES = st.lists(
    st.builds(Candidate, st.text(max_size=2), VALUES, st.none() | st.integers(0, 9), st.none() | st.binary(max_size=2)),
    max_size=4,
).map(tuple)
PAIRS = st.builds(ExactPair, st.text("ab", min_size=1), *[st.floats()] * 4, st.integers(0, 9), st.integers(0, 9))
RESULTS = st.one_of(
    st.builds(
        Score, st.text("ab", min_size=1), CANDIDATES, wanted=CANDIDATES, exact=st.none() | PAIRS,
        sampled=st.none() | st.builds(Candidate, st.text(max_size=2), VALUES, st.just(7), st.none()),
        input_tokens=st.integers(0, 9),
    ),
    st.builds(ScoreFailure, st.text("ab", min_size=1), st.sampled_from(["a", ""]), st.text(max_size=3), st.just(True)),
)  # fmt: skip


@settings(max_examples=60, phases=[Phase.explicit, Phase.generate])
@given(st.lists(RESULTS, min_size=1, max_size=5))
def test_whatever_a_backend_says_is_sound_when_it_is_stored(results: list[Score | ScoreFailure]) -> None:
    frame = frame_of([row_of("m", result) for result in results])
    assert damage(frame).null_count() == frame.height
    part = Part(*packed(frame))
    assert (part.proven, part.is_harmed, part.rows(SCORES.names()).equals(frame)) == (True, False, True)
    assert not Part("foreign.parquet", packed(frame)[1]).is_harmed
    assert len(LISTS) == len(WANTED)


@pytest.mark.parametrize(
    ("top", "stored"),
    [
        ((TOP[0], Candidate("b", math.nan), Candidate("c", None)), Score(BAD, TOP[:1], n_dropped=2)),
        ((Candidate("b", 0.005), TOP[0]), Score(BAD, (Candidate("b", 0.005), TOP[0]))),
        ((Candidate("b", 3.0), TOP[0]), "mass-above-1-q"),
    ],
)
def test_values_that_are_none_are_dropped_and_counted_and_logits_are_a_final_failure(
    top: tuple[Candidate, ...], stored: Score | str, tmp_path: Path
) -> None:
    store = store_of(tmp_path)
    store.append("p", "m", [Score(BAD, top)])
    assert store.known_keys("p") == {BAD}
    found = store.load("p", [BAD])[BAD]
    assert (found.reason if isinstance(found, ScoreFailure) else found) == stored


# The same in a bucket


def test_in_a_bucket_as_on_a_disk(
    in_vertex_world: VertexWorld, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    in_vertex_world.objects.create_bucket("data")
    root = as_location("gs://data/scores")
    frame = pl.DataFrame([ROWS["a NaN"][0], row(GOOD)], schema=SCORES, orient="row")
    for name, content in (("rows.parquet", written(tmp_path, frame).read_bytes()), ("none.parquet", b"")):
        write_bytes_atomic(root / "p" / name, content)
    caplog.set_level(logging.WARNING, "backends")
    reader = ScoreStore(root)
    assert (reader.known_keys("p"), len(list_remote(root)), len(caplog.messages)) == ({GOOD}, 2, 2)
    store = store_of(root)
    assert store.known_keys("p") == {GOOD}
    names = [str(file.path).removeprefix(f"{root}/") for file in list_remote(root)]
    assert [name.split("/")[:2] for name in names] == [["p", names[0][2:]], ["set_aside", "p"], ["set_aside", "p"]]
    assert read_bytes(root / names[2]) == b""
    store.append("p", "m", [score(BAD)])
    assert store.known_keys("p") == store_of(root).known_keys("p") == {GOOD, BAD}
    write_bytes_atomic(root / "p" / "new.parquet", b"whatever it holds")
    in_vertex_world.faults.http["storage.download"] = {"403": 1.0}
    with pytest.raises(ConfigError, match="the storage refuses"):
        store_of(root).known_keys("p")
    in_vertex_world.faults.http.clear()
    assert len(list_remote(root)) == 5
