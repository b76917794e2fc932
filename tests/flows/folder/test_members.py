"""Runs that share a store: who may ask what, and what becomes of what a killed one had."""

from __future__ import annotations

import subprocess
import sys
import time
from array import array
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import polars as pl
import pytest

from backends.errors import ConfigError
from backends.keys import short_key
from backends.scores.store import ScoreStore
from flows.folder.layout import OutputFolder
from flows.folder.members import check_store, member_of, note_store, store_of, take_in_moved
from flows.folder.refusals import Refusal, note_refusals, refused_models
from kl.records import Candidate, Score

A, B, C = (f"{digit}" * 32 for digit in "abc")


def wanted(*keys: str) -> dict[str, array[int]]:
    return {"prompt": array("Q", map(short_key, keys))}


def nothing() -> None:
    """No lease is lost on a disk."""


def test_a_run_claims_all_or_nothing_and_frees_it_when_it_leaves(tmp_path: Path) -> None:
    with member_of(tmp_path, nothing) as one, member_of(tmp_path, nothing) as two:
        assert one.claim(wanted(A, B)) == []
        assert one.holds(wanted(A))
        assert [path.parent.name for path in two.claim(wanted(B, C))] == ["members"]
        assert not two.holds(wanted(C)), "or two runs could wait for each other"
        assert one.claim(wanted(B, C)) == [], "what it claimed before is let go"
        assert two.claim(wanted(A)) == []
        one.leave()
        assert two.claim(wanted(A, B, C)) == []
    assert list((tmp_path / "members").iterdir()) == []


def test_what_is_answered_meanwhile_is_waited_for_no_longer_though_its_run_goes_on(tmp_path: Path) -> None:
    with member_of(tmp_path, nothing) as one, member_of(tmp_path, nothing) as two:
        one.claim(wanted(A))
        ScoreStore(tmp_path).append("prompt", "q", [Score(A, (Candidate("a", -0.1),))])
        two.wait(wanted(A), two.claim(wanted(A)))
        assert two.claim(wanted(B)) == []


KILLED = """
import os, sys
from array import array
from pathlib import Path
from backends.scores.store import ScoreStore
from flows.folder.refusals import Refusal, note_refusals, refused_models
from flows.folder.members import member_of
from kl.records import Candidate, Score
keys = sys.argv[2:]
with member_of(Path(sys.argv[1]), lambda: None) as run:
    run.claim({"prompt": array("Q", (int(key[:16], 16) for key in keys))})
    journal = ScoreStore(Path(sys.argv[1]), journals=run.journals).journal("j")
    journal.add("prompt", "q", Score(keys[0], (Candidate("a", -0.1),)))
    os._exit(9)
"""


def test_what_a_killed_run_had_claimed_is_free_and_its_answers_are_taken_in(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), A, B], check=False)
    with member_of(tmp_path, nothing) as run:
        holders = run.claim(wanted(A, B))
        assert len(holders) == 1
        run.wait(wanted(A, B), holders)
        assert ScoreStore(tmp_path).known_keys("prompt") == {A}
        assert run.claim(wanted(B)) == []


def test_a_context_that_another_run_holds_though_it_has_an_answer_is_not_looked_at_without_a_pause(
    tmp_path: Path,
) -> None:
    with member_of(tmp_path, nothing) as one, member_of(tmp_path, nothing) as two:
        one.claim(wanted(A))
        ScoreStore(tmp_path).append("prompt", "q", [Score(A, (Candidate("a", -0.1),))])
        began = time.monotonic()
        two.wait(wanted(A), two.claim(wanted(A)))
        assert time.monotonic() - began > 0.4, "it may want more of it than an answer, and would plan again and again"


def test_a_run_that_left_in_order_is_not_said_to_have_ended_at_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with member_of(tmp_path, nothing) as run:
        with member_of(tmp_path, nothing) as other:
            other.claim(wanted(A))
            holders = run.claim(wanted(A))
        run.wait(wanted(A), holders)
        assert "ended at once" not in caplog.text
        assert len(list((tmp_path / "members").iterdir())) == 1


def test_runs_that_share_a_store_set_aside_what_is_damaged_one_at_a_time(tmp_path: Path) -> None:
    sound = ScoreStore(tmp_path)
    sound.append("prompt", "q", [Score(key, (Candidate("a", -0.1),)) for key in (A, B)])
    (part,) = (tmp_path / "prompt").iterdir()
    damaged = pl.col("logprobs").list.eval(pl.element() + pl.Series([float("nan")]))
    whole = pl.read_parquet(part).with_columns(pl.when(pl.col("key") == B).then(damaged).otherwise("logprobs"))
    with member_of(tmp_path, nothing) as one, member_of(tmp_path, nothing) as two, ThreadPoolExecutor() as pool:
        for number in range(5):
            whole.write_parquet(tmp_path / "prompt" / f"{number}.parquet")
        part.unlink()
        stores = [ScoreStore(tmp_path, alone=member.alone) for member in (one, two)]
        assert list(pool.map(lambda store: store.known_keys("prompt"), stores)) == [{A}, {A}]
        assert two.claim(wanted(B)) == []
        assert len(one.claim(wanted(B))) == 1, "what is asked again is claimed as ever"
    (kept,) = (tmp_path / "set_aside" / "prompt").iterdir()
    assert pl.read_parquet(kept)["key"].to_list() == [B]
    assert [path.name[16] for path in (tmp_path / "prompt").iterdir()] == ["-"]


def test_journals_that_were_moved_into_a_store_are_taken_in(tmp_path: Path) -> None:
    own = OutputFolder(tmp_path / "own")
    own.stores().scores.journal("killed").add("prompt", "q", Score(A, (Candidate("a", -0.1),)))
    own.scores.rename(tmp_path / "store")
    out = OutputFolder(own.path, tmp_path / "store")
    check_store(out)
    assert [take_in_moved(out.scores), take_in_moved(out.scores)] == [1, 0]
    assert ScoreStore(out.scores).known_keys("prompt") == {A}


def test_an_output_folder_is_told_when_its_scores_are_elsewhere(tmp_path: Path) -> None:
    store = tmp_path / "store"
    out = OutputFolder(tmp_path / "out", store)
    check_store(out)
    note_store(out)
    check_store(out)
    assert store_of(out.path) == store
    for other in (OutputFolder(out.path), OutputFolder(out.path, tmp_path / "other")):
        with pytest.raises(ConfigError, match=f"give --scores-dir {store} again"):
            check_store(other)


def test_scores_that_a_shared_store_would_not_have_are_not_bought_again(tmp_path: Path) -> None:
    own = OutputFolder(tmp_path / "own")
    own.stores().scores.append("prompt", "q", [Score(A, (Candidate("a", -0.1),))])
    with pytest.raises(ConfigError, match="Move it there first"):
        check_store(OutputFolder(own.path, tmp_path / "store"))
    own.lock.touch()
    with pytest.raises(ConfigError, match=f"is the store of the output folder {own.path}"):
        check_store(OutputFolder(tmp_path / "out", own.scores))


def test_what_runs_that_share_a_store_put_on_record_at_once_is_all_there(tmp_path: Path) -> None:
    shared = OutputFolder(tmp_path / "out", tmp_path / "store")
    models = [f"model {number}" for number in range(12)]
    with ThreadPoolExecutor(len(models)) as pool:
        list(pool.map(lambda model: note_refusals(shared, {model: Refusal("no rights")}, "here"), models))
    assert sorted(refused_models(shared, "here")) == sorted(models)
