"""The benchmark of lists in Parquet measures the lists that were drawn, and prints its table."""

from __future__ import annotations

import re
from pathlib import Path

from benchmarks.list_bounds import read_lists, write_lists
from benchmarks.token_rows import drawn_lists
from tests.benchmarks.scripts import printed


def test_the_lists_come_back_from_the_file(tmp_path: Path) -> None:
    lists, _ = drawn_lists(30, peaked=True)
    write_lists(lists, tmp_path / "p.parquet")
    assert list(read_lists(tmp_path / "p.parquet")) == lists


def test_every_stage_has_its_rate_and_its_ratio() -> None:
    head, _, *lines = printed("list_bounds", "--positions", "60", "--repeats", "1")
    assert head == "| positions/s (× baseline) | flat | peaked |"
    stages = ["read", "match", "floor and lower bounds", "all", "baseline"]
    assert [line.split("|")[1].strip() for line in lines] == stages
    assert all(len(re.findall(r"[\d,]+ \(\d+\.\d\)", line)) == 2 for line in lines)
    assert lines[-1].count("(1.0)") == 2
