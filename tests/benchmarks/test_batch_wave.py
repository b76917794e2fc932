"""The benchmark of a run by jobs runs and prints its table; its figures are for people to read."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from tests import ROOT
from tests.programs import clean_environment


def test_a_run_by_jobs_has_its_times(prefect_api: str, tmp_path: Path) -> None:
    command = [
        sys.executable, "benchmarks/batch_wave.py", "--responses", "2", "--tokens", "4", "--job-seconds", "0.5",
        "--repeats", "1",
    ]  # fmt: skip
    environment = clean_environment(tmp_path, PREFECT_API_URL=prefect_api)
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True, timeout=240)
    _, _, line = done.stdout.splitlines()
    found = re.fullmatch(r"\| 2 × 4 \| 0 \| (\d+\.\d) \| (\d+\.\d) \| \d+\.\d \|", line)
    assert found is not None
    assert 0.5 < float(found[2]) <= float(found[1]) + 1  # the flow's start is known to the second
