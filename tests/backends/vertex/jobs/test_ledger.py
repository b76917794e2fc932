"""Which jobs answer which contexts, on disk."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from google.cloud import storage

from backends.errors import ConfigError
from backends.storage import as_location
from backends.vertex.jobs.ledger import JobEntry, JobLedger
from tests import ROOT
from tests.vertex_world.world import VertexWorld

PLACE = "project/us-central1/bucket"


def record(ledger: JobLedger, *keys: str, place: str = PLACE) -> JobEntry:
    return ledger.record(ledger.job_key(place, keys), place, "in", "out", keys)


def test_equal_work_has_one_name_in_any_order_and_any_folder(tmp_path: Path) -> None:
    one, two = JobLedger(tmp_path / "1"), JobLedger(tmp_path / "2")
    assert one.job_key(PLACE, ["a", "b"]) == two.job_key(PLACE, ["b", "a"])
    others = [one.job_key(PLACE, ["a"]), one.job_key("elsewhere", ["a", "b"]), one.job_key(PLACE, ["a", "b", "c"])]
    assert len({one.job_key(PLACE, ["a", "b"]), *others}) == 4


def test_the_name_changes_when_the_job_of_that_name_has_ended_and_not_before(tmp_path: Path) -> None:
    ledger = JobLedger(tmp_path)
    entry = record(ledger, "a")
    assert ledger.job_key(PLACE, ["a"]) == entry.job_key
    assert record(ledger, "a") == entry
    ledger.update(replace(entry, ended=True))
    second = record(JobLedger(tmp_path), "a")
    assert second.job_key != entry.job_key
    assert second.sequence > entry.sequence


def test_what_is_recorded_is_there_after_a_kill(tmp_path: Path) -> None:
    ledger = JobLedger(tmp_path)
    entry = ledger.update(replace(record(ledger, "a", "b"), job_name="projects/1/x", state="RUNNING"))
    record(ledger, "c", place="elsewhere")
    (tmp_path / f".{entry.job_key}.json.77.tmp").write_text("half")
    again = JobLedger(tmp_path)
    assert again.get(entry.job_key) == entry
    assert again.in_flight(PLACE) == {"a": entry.job_key, "b": entry.job_key}
    assert again.in_flight("nowhere") == {}


def test_a_context_belongs_to_the_newest_job_that_was_to_answer_it(tmp_path: Path) -> None:
    ledger = JobLedger(tmp_path)
    first = record(ledger, "a", "b")
    ledger.update(replace(first, ended=True))
    second = record(ledger, "b")
    for book in (ledger, JobLedger(tmp_path)):
        assert book.in_flight(PLACE) == {"a": first.job_key, "b": second.job_key}
        assert [entry.job_key for entry in book.entries()] == [first.job_key, second.job_key]


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"keys": 3}'])
def test_a_record_that_cannot_be_read_stops_the_run_and_names_the_file(content: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenkl-0.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=r"tokenkl-0\.json cannot be read"):
        JobLedger(tmp_path)


# Several processes, one folder.


def claimed(ledger: JobLedger, *keys: str) -> tuple[JobEntry, bool]:
    return ledger.claim(PLACE, keys, "name")


def made(ledger: JobLedger, entry: JobEntry, name: str = "projects/1/x") -> JobEntry:
    return ledger.update(replace(entry, job_name=name, state="RUNNING", maker=None))


def test_what_another_process_recorded_is_seen_at_a_refresh(tmp_path: Path) -> None:
    mine, theirs = JobLedger(tmp_path), JobLedger(tmp_path)
    entry = made(theirs, claimed(theirs, "a")[0])
    assert mine.in_flight(PLACE) == {}
    mine.refresh()
    assert mine.in_flight(PLACE) == {"a": entry.job_key}
    theirs.update(replace(entry, ended=True))
    mine.refresh()
    assert mine.get(entry.job_key) == replace(entry, ended=True)
    assert mine.tries(PLACE, "a") == 1
    assert mine.tries("elsewhere", "a") == mine.tries(PLACE, "b") == 0


def test_of_two_that_want_a_row_one_makes_the_job_also_when_they_want_other_rows_beside_it(tmp_path: Path) -> None:
    mine, theirs = JobLedger(tmp_path), JobLedger(tmp_path)
    entry, is_mine = claimed(mine, "a", "b", "c")
    assert is_mine
    assert claimed(theirs, "b", "c") == (entry, False)
    assert claimed(theirs, "c", "d") == (entry, False)
    other, is_theirs = claimed(theirs, "d")
    assert is_theirs
    assert other.job_key != entry.job_key
    made(mine, entry)
    assert claimed(theirs, "b") == (made(mine, entry), False)


def test_a_job_that_ended_elsewhere_is_read_before_another_is_made(tmp_path: Path) -> None:
    mine, theirs = JobLedger(tmp_path), JobLedger(tmp_path)
    entry = theirs.update(replace(made(theirs, claimed(theirs, "a", "b")[0]), ended=True))
    assert claimed(mine, "b", "c") == (entry, False)
    new, is_mine = mine.claim(PLACE, ["b", "c"], "name", read={entry.job_key})
    assert is_mine
    assert new.keys == ("b", "c")


def test_what_could_not_be_made_is_left_to_the_others_and_what_was_made_is_not(tmp_path: Path) -> None:
    mine, theirs = JobLedger(tmp_path), JobLedger(tmp_path)
    entry, _ = claimed(mine, "a", "b")
    mine.release(entry)
    taken, is_theirs = claimed(theirs, "b")
    assert (taken.job_key, is_theirs) == (entry.job_key, True)
    instead = theirs.replaced(taken, ["b"], "name")
    assert instead.job_key != entry.job_key
    assert claimed(mine, "b") == (instead, False)
    assert claimed(mine, "a")[1]
    made(theirs, instead)
    theirs.release(instead)
    assert JobLedger(tmp_path).newest(PLACE, "b").job_name == "projects/1/x"


def test_a_claim_ends_with_its_process(tmp_path: Path) -> None:
    program = (
        "import os, sys; from pathlib import Path; from backends.vertex.jobs.ledger import JobLedger\n"
        "ledger = JobLedger(Path(sys.argv[1])); entry, _ = ledger.claim(sys.argv[2], ['a'], 'name')\n"
        "print(entry.job_key, flush=True)\n"
        "sys.stdin.read(); os._exit(9)"
    )
    command = [sys.executable, "-c", program, str(tmp_path), PLACE]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as other:
        job_key = other.stdout.readline().strip()
        ledger = JobLedger(tmp_path)
        assert claimed(ledger, "a")[1] is False
        other.kill()
        other.wait()
        entry, is_mine = claimed(ledger, "a")
    assert (entry.job_key, is_mine) == (job_key, True)
    ledger.close()
    assert not list((tmp_path / "locks").glob("*[0-9a-f].lock"))


def test_threads_of_one_process_claim_a_row_once(tmp_path: Path) -> None:
    ledger = JobLedger(tmp_path)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda number: claimed(ledger, "shared", f"own {number}"), range(16)))
    assert sum(is_mine for _, is_mine in found) == 1
    assert len({entry.job_key for entry, _ in found}) == 1


def test_entries_of_an_earlier_version_are_read(tmp_path: Path) -> None:
    ledger = JobLedger(tmp_path)
    entry = record(ledger, "a")
    path = tmp_path / f"{entry.job_key}.json"
    values = json.loads(path.read_text())
    del values["flow_run_id"], values["maker"]
    path.write_text(json.dumps(values))
    assert JobLedger(tmp_path).get(entry.job_key) == entry


def test_the_newest_job_of_a_place_counts_whatever_was_recorded_elsewhere(tmp_path: Path) -> None:
    ledger = JobLedger(tmp_path)
    entry = record(ledger, "a")
    record(ledger, "a", place="elsewhere")
    assert ledger.in_flight(PLACE) == {"a": entry.job_key}


def test_a_ledger_in_a_bucket_is_shared_as_one_on_disk(vertex_world: VertexWorld, monkeypatch) -> None:
    for name, value in vertex_world.environment().items():
        monkeypatch.setenv(name, value)
    gcsfs_bucket(vertex_world)
    mine, theirs = (JobLedger(as_location("gs://ledger/out/scores/jobs")) for _ in range(2))
    entry, is_mine = claimed(mine, "a", "b")
    assert is_mine
    assert claimed(theirs, "b") == (entry, False)
    mine.release(entry)
    mine.close()
    taken, is_theirs = claimed(theirs, "b")
    assert (taken.job_key, is_theirs) == (entry.job_key, True)
    made(theirs, taken)
    mine.refresh()
    assert mine.get(entry.job_key) == theirs.get(entry.job_key)
    theirs.close()


def gcsfs_bucket(world: VertexWorld) -> None:
    with storage.Client() as client:
        client.create_bucket("ledger", location=world.location)
