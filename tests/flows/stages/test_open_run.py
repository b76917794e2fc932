"""A run under way: what it must still hold before it buys, measures and writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from backends.storage import LeaseLostError
from flows.config.comparison import Comparison
from flows.config.models import RunConfig
from flows.config.reading import validate
from flows.config.templates import RunValues
from flows.folder.members import Member
from flows.stages.open_run import OpenRun


@pytest.fixture
def run(tmp_path: Path) -> OpenRun:
    """With a folder on a disk, whose lock is never lost."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.json").write_text(json.dumps({"prompt": "x", "responses": []}))
    values = {"input_dir": tmp_path / "in", "output_dir": tmp_path / "out", "model2": "q", "backend": "vertex_online"}
    config = validate(RunConfig, values | {"project_id": "p", "preflight": False})
    made = OpenRun(Comparison.of(config, RunValues.of_a_dry_run()))
    made.check_folder = lambda: None
    return made


def lost() -> None:
    raise LeaseLostError("the lock could not be kept")


def test_a_lost_place_in_a_shared_store_is_a_lost_lock(run: OpenRun, tmp_path: Path) -> None:
    run.check_lock()
    run.member = Member(tmp_path / "store", tmp_path / "store" / "members" / "me", lost)
    with pytest.raises(LeaseLostError):
        run.check_lock()
