"""The benchmark of Prefect's cost for a group runs and prints its table; its figures are for people to read."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from tests import ROOT
from tests.programs import clean_environment


def test_each_quarter_of_the_groups_has_its_rate(prefect_api: str, tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/prefect_groups.py", "--groups", "8", "--repeats", "1"]
    environment = clean_environment(tmp_path, PREFECT_API_URL=prefect_api)
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True, timeout=120)
    _, _, line = done.stdout.splitlines()
    assert re.fullmatch(r"\| 8 \|( \d+ \|){5} \d+\.\d\d \|", line)
