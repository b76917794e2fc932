"""The benchmark of online calls runs and prints its table; its figures are for people to read."""

from __future__ import annotations

import re
import subprocess
import sys

from tests import ROOT


def test_the_backend_has_a_share_of_the_ideal_rate() -> None:
    command = [
        sys.executable, "benchmarks/online_rate.py", "--in-flight", "4", "--positions", "20", "--latency", "0.05",
        "--repeats", "1", "--ways", "backend",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=120)
    _, rule, line = done.stdout.splitlines()
    assert rule == "|---|---|---|---|---|"
    found = re.fullmatch(r"\| backend \| 4 \| 20 \| (\d\.\d{3}) \| \d+\.\d\d \|", line)
    assert found is not None
    assert 0 < float(found[1]) <= 1.0
