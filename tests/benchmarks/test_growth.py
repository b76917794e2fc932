"""The benchmark of growth runs and prints its table; its times are for people to read."""

from __future__ import annotations

import re

from tests.benchmarks.scripts import printed


def test_every_stage_has_a_figure_at_every_size() -> None:
    head, rule, *lines = printed("growth", "--responses", "2", "--repeats", "1")
    assert head == "| ms a response | 2 responses | 8 responses | 32 responses |"
    assert rule == "|---|---|---|---|"
    assert [line.split("|")[1].strip() for line in lines] == ["plan", "rows", "ledger", "polling"]
    for line in lines:
        assert len(re.findall(r"\d+\.\d{3} \(\d+\.\d{2}\)", line)) == 3
        assert "(1.00)" in line
