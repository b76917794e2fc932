"""The benchmark of a whole run measures all positions and prints its table; its figures are for people to read."""

from __future__ import annotations

import re
import subprocess
import sys

from tests import ROOT


def test_every_size_has_its_figures() -> None:
    command = [
        sys.executable, "benchmarks/whole_run.py", "--positions", "60", "120", "--length", "6", "--repeats", "1",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=240)
    head, _, *lines = done.stdout.splitlines()
    assert head.startswith("| positions | positions/s | of processor time | time a position, × | peak MB | × | plan |")
    assert [line.split("|")[1].strip() for line in lines] == ["60", "120"]
    figures = r"\| \d+ \| [\d,]+ \| [\d,]+ \| \d+\.\d\d \| \d+ \| \d+\.\d\d( \| \d+\.\d µs){3} \|"
    assert all(re.fullmatch(figures, line) for line in lines)


def test_a_profile_says_where_the_time_goes() -> None:
    command = [
        sys.executable, "benchmarks/whole_run.py", "--positions", "60", "--length", "6", "--profile",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=240)
    assert "function calls" in done.stdout
    assert "Ordered by: internal time" in done.stdout
