"""The benchmark of writing runs and prints its table; its times are for people to read."""

from __future__ import annotations

import re

from tests.benchmarks.scripts import printed


def test_every_stage_has_its_rates() -> None:
    head, _, *lines = printed("writing", "--positions", "400", "--length", "30", "--repeats", "1")
    assert head == "| what | positions/s | MB/s | times json.dumps |"
    assert [line.split("|")[1].strip() for line in lines] == [
        "json.dumps of the rows",
        "*_kl.json",
        "tokens.parquet, by parts",
        "responses.parquet and summary",
        "copy of the JSON in memory",
    ]
    for line in lines:
        assert re.search(r"\| [\d,]+ \| [\d,]+ \| \d+\.\d\d \|$", line)
