"""The benchmark of token rows runs and prints its table; its figures are for people to read."""

from __future__ import annotations

import re

from tests.benchmarks.scripts import printed


def test_every_stage_has_a_figure_for_either_kind() -> None:
    head, rule, *lines = printed("token_rows", "--positions", "100", "--repeats", "1")
    assert head == "| positions a second, of 100 | flat | peaked |"
    assert rule == "|---|---|---|"
    assert [line.split("|")[1].strip() for line in lines] == [
        "copy of the arrays",
        "floor and lower bounds",
        "spread of log p/q",
        "all numbers of a row",
        "rows of the token table",
    ]
    for line in lines:
        assert len(re.findall(r"[\d,]+ \(\d+\)", line)) == 2
