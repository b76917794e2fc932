"""The benchmark of reading runs and prints its table; its times are for people to read."""

from __future__ import annotations

import re

from tests.benchmarks.scripts import printed


def test_every_kind_of_file_has_its_figures() -> None:
    head, rule, *lines = printed("reading", "--responses", "2", "--tokens", "5", "--repeats", "1")
    assert head == "| file | MB/s | positions/s | × json.loads | share of a copy | peak, × file |"
    assert rule == "|---|---|---|---|---|---|"
    assert [line.split("|")[1].strip() for line in lines] == ["ids", "bytes", "masked tokens", "entry by entry"]
    for line in lines:
        assert re.fullmatch(r"\| [a-z ]+ \| \d+ \| [\d,]+ \| \d+\.\d\d \| 0\.\d{4} \| \d+\.\d \|", line)
