"""The benchmark of the local engine runs and prints its table; its figures are for people to read."""

from __future__ import annotations

import re
import subprocess
import sys

from tests import ROOT


def test_a_number_of_threads_has_its_figures() -> None:
    command = [
        sys.executable, "benchmarks/local_engine.py", "--responses", "1", "--tokens", "4", "--repeats", "1",
        "--threads", "1",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=240)
    *_, head, _, line = done.stdout.splitlines()
    assert head == "| threads | positions a second | of the peak of matrix products | exact pairs a second |"
    assert re.fullmatch(r"\| 1 \| [\d,]+ \| \d+% \| [\d,]+ \|", line)
