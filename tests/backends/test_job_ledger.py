"""Which jobs answer which contexts, on disk."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from backends.errors import ConfigError
from backends.job_ledger import JobEntry, JobLedger

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
