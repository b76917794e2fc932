"""Which jobs answer which contexts, on disk."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from google.cloud import storage

from backends.errors import ConfigError
from backends.storage import as_location
from backends.vertex.jobs.ledger import JobEntry, JobLedger
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


def recorded(ledger: JobLedger, *keys: str) -> JobEntry:
    return ledger.update(ledger.next_entry(PLACE, keys, "name"))


def test_a_job_that_is_to_be_made_is_known_at_once_and_on_disk_when_it_was_put_there(tmp_path: Path) -> None:
    ledger = JobLedger(tmp_path)
    entry = ledger.next_entry(PLACE, ["a", "b"], "name")
    assert ledger.to_read(PLACE, ["b", "c"], ()) == entry
    assert JobLedger(tmp_path).entries() == []
    ledger.update(entry)
    assert JobLedger(tmp_path).entries() == [entry]
    assert ledger.next_entry(PLACE, ["b", "c"], "name").job_key != entry.job_key


def test_a_job_that_was_never_made_is_taken_up_under_its_name_and_paths(tmp_path: Path) -> None:
    recorded(JobLedger(tmp_path), "a", "b")
    ledger = JobLedger(tmp_path)
    ledger.flow_run_id = "second"
    (left,) = ledger.entries()
    again = ledger.next_entry(PLACE, ["b", "a"], "another name")
    assert (again.job_key, again.input_path, again.output_prefix) == (left.job_key, left.input_path, left.output_prefix)
    assert (again.sequence, again.flow_run_id) == (left.sequence + 1, "second")


def test_jobs_are_to_be_read_newest_first_until_they_have_ended_and_been_read(tmp_path: Path) -> None:
    ledger = JobLedger(tmp_path)
    first = ledger.update(replace(recorded(ledger, "a", "b"), job_name="projects/1/x", ended=True))
    second = recorded(ledger, "b", "c")
    assert ledger.to_read(PLACE, ["a"], ()) == first
    assert ledger.to_read(PLACE, ["a", "b"], ()) == second
    assert ledger.to_read(PLACE, ["a"], {first.job_key}) is None
    assert ledger.to_read(PLACE, ["b"], {second.job_key}) == second  # it has not ended
    assert ledger.to_read(PLACE, ["d"], ()) is None
    assert [ledger.tries(PLACE, key) for key in "abc"] == [1, 1, 0]
    assert ledger.tries("elsewhere", "a") == 0


def test_a_job_that_has_ended_stays_so(tmp_path: Path) -> None:
    ledger = JobLedger(tmp_path)
    entry = recorded(ledger, "a")
    ledger.update(replace(entry, ended=True))
    assert ledger.update(replace(entry, state="RUNNING")).ended
    assert ledger.tries(PLACE, "a") == 1
    assert JobLedger(tmp_path).tries(PLACE, "a") == 1


def test_threads_record_jobs_at_once(tmp_path: Path) -> None:
    ledger = JobLedger(tmp_path)
    with ThreadPoolExecutor(8) as pool:
        entries = list(pool.map(lambda number: recorded(ledger, f"own {number}"), range(64)))
    assert sorted(entry.sequence for entry in entries) == list(range(1, 65))
    assert JobLedger(tmp_path).entries() == ledger.entries() == sorted(entries, key=lambda entry: entry.sequence)


@pytest.mark.parametrize("maker", [None, "3f2c"])
def test_entries_of_other_versions_are_read(maker: str | None, tmp_path: Path) -> None:
    """Versions of 2026 also wrote who was making a job; the first ones did not write which run it was."""
    ledger = JobLedger(tmp_path)
    entry = recorded(ledger, "a")
    path = tmp_path / f"{entry.job_key}.json"
    values = json.loads(path.read_text())
    del values["flow_run_id"]
    path.write_text(json.dumps(values if maker is None else values | {"maker": maker}))
    (tmp_path / "locks").mkdir()
    (tmp_path / "locks" / "claims.lock").touch()
    assert JobLedger(tmp_path).entries() == [entry]


def test_the_newest_job_of_a_place_counts_whatever_was_recorded_elsewhere(tmp_path: Path) -> None:
    ledger = JobLedger(tmp_path)
    entry = record(ledger, "a")
    record(ledger, "a", place="elsewhere")
    assert ledger.in_flight(PLACE) == {"a": entry.job_key}


def test_a_ledger_in_a_bucket_is_one_as_on_disk(vertex_world: VertexWorld, monkeypatch) -> None:
    for name, value in vertex_world.environment().items():
        monkeypatch.setenv(name, value)
    gcsfs_bucket(vertex_world)
    folder = as_location("gs://ledger/out/scores/jobs")
    ledger = JobLedger(folder)
    entry = recorded(ledger, "a", "b")
    second = ledger.update(replace(recorded(ledger, "c"), job_name="projects/1/x", state="RUNNING"))
    again = JobLedger(folder)
    assert again.entries() == ledger.entries() == [entry, second]
    assert again.in_flight(PLACE) == {"a": entry.job_key, "b": entry.job_key, "c": second.job_key}


def gcsfs_bucket(world: VertexWorld) -> None:
    with storage.Client() as client:
        client.create_bucket("ledger", location=world.location)
