"""The benchmark of batch rows runs and prints its table; its figures are for people to read."""

from __future__ import annotations

import re

from tests.benchmarks.scripts import printed


def test_every_stage_has_its_figures_for_both_lengths() -> None:
    head, rule, *lines = printed("batch_rows", "--short", "2", "--long", "60", "--repeats", "1")
    assert head.startswith("| | responses × tokens | bytes a row |")
    assert rule == "|---|" + "---|" * 8
    assert [line.split("|")[1].strip() for line in lines] == ["build", "read", "store"] * 2
    for line in lines:
        assert len(re.findall(r"\d", line.rsplit("|", 2)[1])) >= 1
        assert line.count("|") == head.count("|")
