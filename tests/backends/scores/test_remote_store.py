"""Scores, jobs and raw rows in a bucket: the same as on a disk, and little asked of the network."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest

from backends.errors import ConfigError
from backends.scores.chunk_log import ChunkLog
from backends.scores.raw_log import RawLog, read_raw
from backends.scores.store import ScoreStore
from backends.storage import as_location, files_in, list_remote, read_bytes
from backends.vertex.jobs.ledger import JobLedger
from kl.records import Candidate, Score, ScoreFailure
from tests.vertex_world.world import VertexWorld

TIMEOUT_S = 60.0


@pytest.fixture
def root(in_vertex_world: VertexWorld) -> Path:
    in_vertex_world.objects.create_bucket("data")
    return as_location("gs://data/out/scores")


def score(key: str, token: str = "a") -> Score:
    return Score(key, (Candidate(token, -0.1, 0), Candidate("🙂", -3.0, None)), Candidate("a", -5.0, 3), "v-1")


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.05)


def n_requests(world: VertexWorld, work: Callable[[], object]) -> int:
    before = len(world.requests)
    work()
    return len(world.requests) - before


def test_parts_are_those_of_a_disk_to_the_byte(root: Path, tmp_path: Path) -> None:
    rows = [score("k1"), ScoreFailure("k2", "blocked", "SAFETY", final=True), ScoreFailure("k3", "row-error", "503")]
    local, remote = ScoreStore(tmp_path), ScoreStore(root)
    for store in (local, remote):
        store.append("p", "m", rows)
        assert store.known_keys("p") == {"k1", "k2"}
        assert store.load("p", ["k1", "k2", "k3"]) == {"k1": rows[0], "k2": rows[1]}
    (there,) = files_in(root / "p", ".parquet")
    (here,) = (tmp_path / "p").glob("*.parquet")
    assert here.name[:16] == there.name[:16]
    assert pl.read_parquet(read_bytes(there)).drop("scored_at").equals(pl.read_parquet(here).drop("scored_at"))


def test_a_store_sees_what_it_and_others_of_its_process_wrote(root: Path) -> None:
    reader = ScoreStore(root)
    assert reader.known_keys("p") == set()
    ScoreStore(root).append("p", "m", [score("k1")])
    assert reader.known_keys("p") == {"k1"}
    for key in "abcd":
        ScoreStore(root).append("p", "m", [score(key)])
    ScoreStore(root).compact_all()
    assert len(files_in(root / "p", ".parquet")) == 1
    assert reader.load("p", ["k1", "d"]) == {"k1": score("k1"), "d": score("d")}


def test_reading_many_prompts_takes_one_listing_and_one_download_each(root: Path, in_vertex_world: VertexWorld) -> None:
    prompts = [f"p{index}" for index in range(20)]
    for prompt in prompts:
        ScoreStore(root).append(prompt, "m", [score(f"k-{prompt}")])
    store = ScoreStore(root)

    def read() -> None:
        store.prefetch()
        for prompt in prompts:
            assert store.known_keys(prompt) == {f"k-{prompt}"}
            assert len(store.load(prompt, [f"k-{prompt}"])) == 1

    assert n_requests(in_vertex_world, read) <= len(prompts) + 2
    assert n_requests(in_vertex_world, read) == 0
    assert n_requests(in_vertex_world, lambda: ScoreStore(root).compact_all()) <= 2


def test_answers_are_safe_within_about_a_second_in_one_object_for_all_groups(
    root: Path, in_vertex_world: VertexWorld
) -> None:
    journals = [ScoreStore(root).journal(name) for name in "ab"]

    def arrive() -> None:
        for index in range(200):
            journals[index % 2].add("p", "m", score(f"k{index}"))

    assert n_requests(in_vertex_world, arrive) <= 2
    wait_until(lambda: sum(read_bytes(path).count(b"\n") for path in journal_files(root)) == 200)
    assert len(journal_files(root)) <= 3

    # A killed run: its journals are there, and the next run takes them in.
    store = ScoreStore(root)
    assert store.recover() == 200
    assert store.known_keys("p") == {f"k{index}" for index in range(200)}
    assert journal_files(root) == []


def journal_files(root: Path) -> list[Path]:
    return files_in(root / "journals", ".jsonl")


def test_an_object_goes_when_the_last_group_in_it_is_a_part(root: Path) -> None:
    a, b = (ScoreStore(root).journal(name) for name in "ab")
    a.add("p", "m", score("k1"))
    b.add("p", "m", score("k2"))
    wait_until(lambda: len(journal_files(root)) > 0)
    a.clear()
    assert len(journal_files(root)) == 1
    b.clear()
    assert journal_files(root) == []


def test_what_becomes_a_part_at_once_is_never_uploaded_twice(root: Path, in_vertex_world: VertexWorld) -> None:
    journal = ScoreStore(root).journal("a")

    def arrive() -> None:
        journal.add("p", "m", score("k1"))
        journal.clear()
        time.sleep(1.5)  # longer than the journal is behind

    assert n_requests(in_vertex_world, arrive) == 0


def test_a_journal_that_cannot_be_stored_stops_the_buying_and_keeps_the_answers(
    root: Path, in_vertex_world: VertexWorld
) -> None:
    journal = ScoreStore(root).journal("a")
    in_vertex_world.faults.http["storage.upload"] = {"403": 1.0}
    journal.add("p", "m", score("k0"))

    def add_often() -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while time.monotonic() < deadline:
            journal.add("p", "m", score("k1"))
            time.sleep(0.1)

    with pytest.raises(ConfigError, match="cannot write"):
        add_often()
    in_vertex_world.faults.http.clear()
    wait_until(lambda: len(journal_files(root)) > 0)
    assert ScoreStore(root).recover() > 1
    assert ScoreStore(root).known_keys("p") == {"k0", "k1"}
    journal.clear()


def test_a_log_that_is_closed_is_stored_or_says_why_not(root: Path, in_vertex_world: VertexWorld) -> None:
    log = ChunkLog(root, ".log")
    log.add("a", b"1")
    in_vertex_world.faults.http["storage.upload"] = {"403": 1.0}
    with pytest.raises(ConfigError, match="cannot write"):
        log.close()
    in_vertex_world.faults.http.clear()
    log.close()
    log.close()
    assert [read_bytes(file.path) for file in list_remote(root)] == [b"1"]


def test_raw_rows_come_back(root: Path) -> None:
    log = RawLog(root / "raw")
    rows = [(f"k{index}", {"text": "é" * index}) for index in range(50)]
    for row in rows[:25]:
        log.add(*row)
    wait_until(lambda: len(files_in(root / "raw", ".jsonl.gz")) == 1)
    for row in rows[25:]:
        log.add(*row)
    log.close()
    assert sorted(read_raw(root / "raw")) == sorted(rows)


def test_jobs_on_record_are_those_of_the_run_before(root: Path) -> None:
    first = JobLedger(root / "jobs")
    for keys in (["k1", "k2"], ["k3"]):
        first.record(first.job_key("here", keys), "here", "in.jsonl", "out", keys)
    second = JobLedger(root / "jobs")
    assert second.entries() == first.entries()
    assert second.in_flight("here").keys() == {"k1", "k2", "k3"}
