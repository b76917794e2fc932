"""The benchmark of starting runs and prints its table; its times are for people to read."""

from __future__ import annotations

import re
import subprocess
import sys

from tests import ROOT


def waits(*what: str) -> list[tuple[str, str]]:
    command = [sys.executable, "benchmarks/start.py", "--repeats", "1", "--what", *what]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=280)
    head, _, *lines = done.stdout.splitlines()
    assert head == "| what | until | wall, s | processor, s |"
    assert all(re.search(r"\| \d+\.\d\d \| (-|\d+\.\d\d) \|$", line) for line in lines)
    return [(line.split("|")[1].strip(), line.split("|")[2].strip()) for line in lines]


def test_the_help_has_its_time() -> None:
    assert waits("import", "help") == [("import", "end"), ("help", "end")]
