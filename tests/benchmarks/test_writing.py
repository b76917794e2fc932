"""The benchmark of writing runs and prints its table; its times are for people to read."""

from __future__ import annotations

import re
import subprocess
import sys

from tests import ROOT


def test_every_stage_has_its_rates() -> None:
    command = [sys.executable, "benchmarks/writing.py", "--positions", "400", "--length", "30", "--repeats", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=120)
    head, _, *lines = done.stdout.splitlines()
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
