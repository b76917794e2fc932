"""The history: rows of many runs, written at once, replaced, extended, and never overwritten by mistake."""

from __future__ import annotations

import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import polars as pl
import pytest

from backends.errors import ConfigError
from flows.watch.history import HISTORY, Row, check_history, previous_run, previous_versions, read_history, record_row
from tests import ROOT


def row(run_id: str, **changes: object) -> Row:
    start: Row = {
        "history_version": 1,
        "run_id": run_id,
        "started_at": datetime(2026, 11, 1, tzinfo=UTC),
        "output_dir": f"out/{run_id}",
        "model1": "p",
        "model2": "q",
        "model2_versions": ["q-001"],
        "estimator": "censored",
        "top_logprobs": 20,
        "wanted_tokens": False,
        "measured": 100,
        "missing": 0,
        "kl_per_token": 0.5,
    }
    return start | changes


_APPEND = """
import sys
from pathlib import Path
from flows.watch.history import record_row
for number in range(3):
    record_row(Path(sys.argv[1]), {"run_id": f"{sys.argv[2]}-{number}", "kl_per_token": float(sys.argv[2])})
"""


def test_eight_processes_at_once_lose_no_row(tmp_path: Path):
    path = tmp_path / "history.parquet"
    command = [sys.executable, "-c", _APPEND, str(path)]
    writers = [subprocess.Popen([*command, str(number)], cwd=ROOT) for number in range(8)]
    assert [writer.wait(120) for writer in writers] == [0] * 8
    found = read_history(path)
    assert sorted(found["run_id"]) == sorted(f"{number}-{again}" for number in range(8) for again in range(3))
    assert found.schema == HISTORY


def test_a_run_that_is_retried_replaces_its_row(tmp_path: Path):
    path = tmp_path / "history.parquet"
    assert record_row(path, row("a")).height == 0
    record_row(path, row("b"))
    before = record_row(path, row("a", kl_per_token=0.75, drift="drift"))
    assert before["run_id"].to_list() == ["a", "b"]
    assert read_history(path).select("run_id", "kl_per_token").rows() == [("b", 0.5), ("a", 0.75)]


def test_rows_of_earlier_and_later_versions_live_together(tmp_path: Path):
    path = tmp_path / "history.parquet"
    early = pl.DataFrame([{"history_version": 0, "run_id": "early", "kl_per_token": 1}])  # an integer, few columns
    late = pl.DataFrame([{"history_version": 9, "run_id": "late", "kl_per_token": 2.0, "new_figure": "kept"}])
    pl.concat([early.cast({"kl_per_token": pl.Float64}), late], how="diagonal").write_parquet(path)
    record_row(path, row("now"))
    found = read_history(path)
    assert found["run_id"].to_list() == ["early", "late", "now"]
    assert found["new_figure"].to_list() == [None, "kept", None]
    assert found["model2"].to_list() == [None, None, "q"]


@pytest.mark.parametrize("content", [b"", b"not parquet", b"PAR1 cut"])
def test_what_is_no_history_is_named_and_left_alone(content: bytes, tmp_path: Path):
    path = tmp_path / "history.parquet"
    path.write_bytes(content)
    for use in (read_history, check_history, lambda where: record_row(where, row("a"))):
        with pytest.raises(ConfigError, match=r"history.parquet is no history of runs"):
            use(path)
    assert path.read_bytes() == content


def test_another_table_is_no_history(tmp_path: Path):
    path = tmp_path / "history.parquet"
    pl.DataFrame({"token": ["a"]}).write_parquet(path)
    with pytest.raises(ConfigError, match="it has no column run_id"):
        read_history(path)
    pl.DataFrame({"run_id": ["a"], "kl_per_token": ["high"]}).write_parquet(path)
    with pytest.raises(ConfigError, match="is no history of runs"):
        read_history(path)


def test_a_folder_that_cannot_be_written_to_is_said_at_once(tmp_path: Path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConfigError, match="cannot be"):
        check_history(tmp_path / "file" / "history.parquet")


def test_the_previous_run_is_the_last_of_the_same_comparison(tmp_path: Path):
    path = tmp_path / "history.parquet"
    others = [
        row("first", wanted_tokens=None),  # as earlier versions have it
        row("other q", model2="q2"),
        row("other p", model1=None),
        row("other estimator", estimator="floor"),
        row("other lists", top_logprobs=5),
        row("asked for P's tokens", wanted_tokens=True),
        row("nothing measured", kl_per_token=None),
        row("half of it", measured=50, missing=50),
        row("today, earlier", output_dir="out/today"),
    ]
    for other in others:
        record_row(path, other)
    now = row("now", output_dir="out/today")
    before = record_row(path, now)

    def name(found: Row | None) -> str | None:
        return None if found is None else found["run_id"]

    assert name(previous_run(before, now, other_folders_only=True)) == "first"
    assert name(previous_run(before, now, other_folders_only=False)) == "today, earlier"
    partial = row("now", measured=52, missing=48)
    assert name(previous_run(before, partial, other_folders_only=True)) == "today, earlier"
    assert name(previous_run(before, now | {"model1": None}, other_folders_only=True)) == "other p"
    assert previous_run(before, now | {"model2": "q3"}, other_folders_only=True) is None
    # Versions are of models, not of methods; a retry is no run before itself.
    assert name(previous_versions(before, now | {"estimator": "bucket"})) == "today, earlier"
    assert name(previous_versions(read_history(path), now)) == "today, earlier"
