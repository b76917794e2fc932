"""Scores on disk: what goes in comes out, whole or not at all."""

import json
import math

import numpy as np
import polars as pl
import pytest

from backends.scores import rows
from backends.scores.journal import recorded
from backends.scores.rows import EXACT, SCORES, results_of, row_of
from backends.scores.store import ScoreStore
from kl.records import Candidate, ExactPair, Score, ScoreFailure
from kl.scores import ScoreTable

TOP = (Candidate("", -0.1, 0), Candidate("<ctrl63>", -2.5, 9, b"\xf0\x9f"), Candidate("🙂", -3.0, None))


def score(key: str, **fields) -> Score:
    return Score(key, TOP, Candidate("a", -5.0, 3), "v-1", "MAX_TOKENS", 12, 1, 2, **fields)


def test_scores_come_back_as_they_went_in(tmp_path) -> None:
    store = ScoreStore(tmp_path / "scores")
    store.append("p", "m", [score("k1"), Score("k2", TOP)])
    assert store.load("p", ["k1", "k2", "k3"]) == {"k1": score("k1"), "k2": Score("k2", TOP)}
    assert store.known_keys("p") == {"k1", "k2"}
    assert store.known_keys("other") == set()


def test_lists_of_any_length_come_back_in_their_part(tmp_path) -> None:
    store = ScoreStore(tmp_path / "scores")
    several = [score("k1"), Score("k2", ()), Score("k3", TOP[:1]), Score("k4", (*TOP, Candidate("b", 0)))]
    store.append("p", "m", several)
    store.append("q", "m", [*several[1:2], ScoreFailure("k5", "blocked", "SAFETY", final=True), several[0]])
    assert list(store.load("p", ["k1", "k2", "k3", "k4"]).values()) == several
    assert list(store.load("q", ["k2", "k5", "k1"])) == ["k2", "k5", "k1"]
    for name in ("p", "q"):
        assert pl.read_parquet(tmp_path / "scores" / name / "*.parquet").schema == SCORES


@pytest.mark.parametrize("token", ["a", "🙂\u2028", "\ud800", '"\n'])
@pytest.mark.parametrize("logprob", [-0.5, 0, -math.inf, None])
def test_a_journal_gives_back_what_was_put_in(token: str, logprob: float | None, tmp_path) -> None:
    kept = Score("k1", (Candidate(token, logprob, 3, b"\xf0"), Candidate("b", -2.0)), model_version="v")
    blocked = ScoreFailure("k2", "blocked", token, final=True)
    journal = ScoreStore(tmp_path).journal("group")
    for result in (kept, blocked, ScoreFailure("k3", "row-error", "503")):
        journal.add("p", "m", result)
    rows = recorded([tmp_path / "journals" / "group.jsonl"], print)["p"]
    written = [row_of("m", result) for result in (kept, blocked)]
    assert [{**row, "scored_at": None} for row in rows] == [{**row, "scored_at": None} for row in written]


def test_a_final_failure_is_kept_and_one_that_may_pass_is_not(tmp_path) -> None:
    store = ScoreStore(tmp_path)
    blocked = ScoreFailure("k1", "blocked", "SAFETY", final=True)
    store.append("p", "m", [blocked, ScoreFailure("k2", "row-error", "503")])
    assert store.load("p", ["k1", "k2"]) == {"k1": blocked}


def test_the_record_of_a_run_keeps_every_failure(tmp_path) -> None:
    store = ScoreStore(tmp_path, every_failure=True)
    store.append("p", "m", [ScoreFailure("k2", "row-error", "503")])
    assert store.load("p", ["k2"])["k2"].reason == "row-error"


def test_full_vocabularies_come_back_to_the_bit(tmp_path) -> None:
    store = ScoreStore(tmp_path)
    full = np.random.default_rng(1).normal(size=50).astype(np.float32)
    store.append("p", "m", [score("k1", full_logprobs=full), score("k2")])
    store.append("p", "m", [score("k3", full_logprobs=full + 1)])
    found = store.load_full("p", ["k1", "k2", "k3"])
    assert found.keys() == {"k1", "k3"}
    assert np.array_equal(found["k1"], full)
    assert found["k1"].dtype == np.float32


def test_all_parts_are_one_plain_table(tmp_path) -> None:
    store = ScoreStore(tmp_path / "scores")
    store.append("p", "m", [score("k1")])
    store.append("q", "m", [score("k2")])
    table = pl.read_parquet(tmp_path / "scores" / "*" / "*.parquet")
    assert sorted(table["key"]) == ["k1", "k2"]


def test_compacting_keeps_every_score_once(tmp_path) -> None:
    store = ScoreStore(tmp_path)
    for key in ("b", "a", "c", "e"):
        store.append("p", "m", [score(key)])
    store.append("p", "m", [score("a"), score("d")])
    store.compact("p")
    assert len(list(tmp_path.glob("p/*.parquet"))) == 1
    assert store.load("p", "abcde") == {key: score(key) for key in "abcde"}
    store.compact("p")
    assert store.known_keys("p") == set("abcde")


def test_temporary_files_of_a_killed_run_are_no_scores(tmp_path) -> None:
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / ".0123.parquet.17-1.tmp").write_bytes(b"half")
    assert ScoreStore(tmp_path).known_keys("p") == set()


def test_what_a_killed_run_left_in_a_journal_is_taken_in(tmp_path) -> None:
    journal = ScoreStore(tmp_path).journal("a")
    journal.add("p", "m", score("k1"))
    journal.add("q", "m", ScoreFailure("k2", "blocked", "SAFETY", final=True))
    journal.add("q", "m", ScoreFailure("k3", "row-error", "503"))
    (path,) = tmp_path.glob("journals/*.jsonl")
    with path.open("ab") as file:
        file.write(b'{"prompt_id": "p", "key": "cut')

    store = ScoreStore(tmp_path)
    assert store.known_keys("p") == set()
    assert store.recover() == 2
    assert store.load("p", ["k1"]) == {"k1": score("k1")}
    assert store.known_keys("q") == {"k2"}
    assert list(tmp_path.glob("journals/*.jsonl")) == []
    assert store.recover() == 0


def test_a_journal_that_became_a_part_is_gone(tmp_path) -> None:
    store = ScoreStore(tmp_path)
    journal = store.journal("a")
    journal.add("p", "m", score("k1"))
    store.append("p", "m", [score("k1")])
    journal.clear()
    assert store.recover() == 0
    journal.add("p", "m", score("k2"))
    assert store.recover() == 1
    assert store.known_keys("p") == {"k1", "k2"}


def test_a_journal_that_a_kill_or_a_failing_disk_left_behind_is_taken_in(tmp_path) -> None:
    store = ScoreStore(tmp_path)
    journal = store.journal("a")
    for key in ("k1", "k2"):
        journal.add("p", "m", score(key))
    journal.add("q", "m", ScoreFailure("k3", "blocked", "SAFETY", final=True))
    journal.add("q", "m", ScoreFailure("k4", "row-error", "503"))
    path = tmp_path / "journals" / "a.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b"\x00" * 40 + b"\n[1]\n{}\n" + b"".join(lines[1:]) + lines[0][:50])
    again = ScoreStore(tmp_path)
    assert again.recover() == 3
    assert again.load("p", ["k1", "k2"]) == {"k1": score("k1"), "k2": score("k2")}
    assert again.known_keys("q") == {"k3"}
    assert again.recover() == 0


def test_a_kill_while_parts_are_merged_loses_nothing_and_doubles_nothing(tmp_path) -> None:
    store = ScoreStore(tmp_path)
    for key in ("b", "a", "c", "e"):
        store.append("p", "m", [score(key)])
    pieces = {path: path.read_bytes() for path in (tmp_path / "p").glob("*.parquet")}
    store.compact("p")
    for path, content in list(pieces.items())[1:]:  # killed when one piece was removed
        path.write_bytes(content)
    (tmp_path / "p" / ".half.parquet.1-2.tmp").write_bytes(b"half")
    again = ScoreStore(tmp_path)
    assert again.known_keys("p") == {"a", "b", "c", "e"}
    again.compact("p")
    assert pl.read_parquet(tmp_path / "p" / "*.parquet")["key"].to_list() == ["b", "a", "c", "e"]


# Figures of whole vocabularies


def pair(versus: str, kl: float = 0.5) -> ExactPair:
    return ExactPair(versus, kl, 0.25, 0.1, 0.3, 100, 120)


def test_figures_of_a_pair_come_back_under_their_pair_alone(tmp_path) -> None:
    store = ScoreStore(tmp_path)
    store.append("p", "m", [score("p1", exact=pair("q1")), score("p2", exact=pair("q2", float("nan")))])
    store.append("p", "m", [score("p1", exact=pair("other", 0.75))])  # the same keys, compared with another model
    store.append("p", "m", [score("q1")])
    for _ in range(2):
        found = store.load_exact("p", ["p1", "p2", "q1"])
        assert found.keys() == {("p1", "q1"), ("p1", "other"), ("p2", "q2")}
        assert found["p1", "q1"] == pair("q1")
        assert found["p1", "other"].kl == 0.75
        assert np.isnan(found["p2", "q2"].kl)
        assert store.load("p", ["p1"]) == {"p1": score("p1")}
        store.append("p", "m", [score("q5")])
        store.compact("p")


def test_a_pair_is_done_with_figures_with_both_vocabularies_or_when_one_failed(tmp_path) -> None:
    store = ScoreStore(tmp_path)
    full = np.zeros(3, np.float32)
    store.append("p", "m", [score("p1", exact=pair("q1")), score("q1"), score("p4")])
    store.append("p", "m", [score("p2", full_logprobs=full), score("q2", full_logprobs=full)])
    store.append("p", "m", [ScoreFailure("q4", "context-too-long", "", final=True)])
    compared = store.compared("p")
    pairs = [("p1", "q1"), ("q1", "p1"), ("p2", "q2"), ("p4", "q4"), ("p1", "q2"), ("p2", "q1"), ("p1", "q9")]
    assert [compared.has(*keys) for keys in pairs] == [True, True, True, True, False, False, False]


def test_parts_of_earlier_versions_have_no_figures_and_are_read_all_the_same(tmp_path) -> None:
    store = ScoreStore(tmp_path)
    store.append("p", "m", [score("k1", full_logprobs=np.zeros(3, np.float32)), score("k2")])
    (path,) = (tmp_path / "p").glob("*.parquet")
    pl.read_parquet(path).drop(EXACT).write_parquet(path)
    path.rename(path.with_name("earlier.parquet"))
    store.append("p", "m", [score("k3", exact=pair("k4"))])
    assert store.load("p", ["k1", "k2", "k3"]).keys() == {"k1", "k2", "k3"}
    assert store.load_exact("p", ["k1", "k2", "k3"]).keys() == {("k3", "k4")}
    assert store.compared("p").whole == {"k1"}


def test_figures_survive_a_kill_in_the_journal(tmp_path) -> None:
    journal = ScoreStore(tmp_path).journal("j")
    journal.add("p", "m", score("p1", exact=pair("q1")))
    journal.add("p", "m", score("p2", exact=pair("q2", float("inf"))))  # computed anew
    store = ScoreStore(tmp_path)
    assert store.recover() == 1
    assert store.load_exact("p", ["p1", "p2"]) == {("p1", "q1"): pair("q1")}
    store.append("p", "m", [score("p2", exact=pair("q2", float("inf")))])
    assert store.load_exact("p", ["p2"]) == {("p2", "q2"): pair("q2", float("inf"))}


WANTED = (Candidate("z", -6.0, 4, b"z"), Candidate("\ufffd", -9.5, 5, b"\xf0"))


def test_wanted_tokens_come_back_beside_the_list(tmp_path) -> None:
    store = ScoreStore(tmp_path)
    several = [score("k1", wanted=WANTED), score("k2"), score("k3", wanted=WANTED[:1])]
    store.append("p", "m", several)
    store.append("p", "m", [score("k4", wanted=(Candidate("y", -3.5),))])
    assert list(store.load("p", ["k1", "k2", "k3"]).values()) == several
    table = results_of(store.rows("p", ["k1", "k4"], wanted=True)).table
    assert table.wanted is not None
    assert [len(top) for top in table.wanted] == [2, 1]
    # Where nobody asked for any, they are not even read.
    assert not {*rows.WANTED} & {*store.rows("p", ["k1"]).columns}
    assert results_of(store.rows("p", ["k1"])).table.wanted is None
    joined = ScoreTable.joined([results_of(store.rows("p", ["k1"])).table, table])
    assert joined.wanted is not None
    assert [len(top) for top in joined.wanted] == [0, 2, 1]


def test_parts_of_earlier_versions_have_no_wanted_tokens(tmp_path) -> None:
    store = ScoreStore(tmp_path)
    store.append("p", "m", [score("k1")])
    (part,) = (tmp_path / "p").glob("*.parquet")
    pl.read_parquet(part).drop(rows.WANTED).write_parquet(part)
    part.rename(part.with_name("earlier.parquet"))
    store.append("p", "m", [score("k2", wanted=WANTED)])
    assert store.load("p", ["k1", "k2"]) == {"k1": score("k1"), "k2": score("k2", wanted=WANTED)}


def test_wanted_tokens_survive_a_kill_in_the_journal(tmp_path) -> None:
    several = [score("k1", wanted=WANTED), score("k2", wanted=WANTED[:1]), score("k3", wanted=(Candidate("y", -3.5),))]
    journal = ScoreStore(tmp_path).journal("group")
    for result in several:
        journal.add("p", "m", result)
    store = ScoreStore(tmp_path)
    assert store.recover() == 3
    assert list(store.load("p", ["k1", "k2", "k3"]).values()) == several


def test_a_journal_of_an_earlier_version_is_taken_in(tmp_path) -> None:
    ScoreStore(tmp_path).journal("group").add("p", "m", score("k1"))
    (path,) = (tmp_path / "journals").glob("*.jsonl")
    row = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in row.items() if name not in rows.WANTED}) + "\n")
    store = ScoreStore(tmp_path)
    assert store.recover() == 1
    assert store.load("p", ["k1"]) == {"k1": score("k1")}
