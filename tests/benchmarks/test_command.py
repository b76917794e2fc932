"""The command runs the scripts that it is told to, after a line about the machine, and says when one fails."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.__main__ import SMOKE, machine, main
from tests import ROOT


def benchmarks(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)


def test_scripts_run_one_after_the_other() -> None:
    done = benchmarks("--smoke", "--only", "baseline", "reading")
    assert done.returncode == 0
    assert done.stdout.splitlines()[0] == machine()
    assert re.findall(r"^## (\w+): ", done.stdout, re.MULTILINE) == ["baseline", "reading"]
    assert len(re.findall(r"^\d+ s of processor time, at most [\d,]+ MiB a process$", done.stdout, re.MULTILINE)) == 2


def test_every_script_exists_and_is_tested() -> None:
    tests = {path.stem.removeprefix("test_") for path in Path(__file__).parent.glob("test_*.py")}
    assert SMOKE.keys() <= tests
    assert all((ROOT / "benchmarks" / f"{name}.py").is_file() for name in SMOKE)


def test_the_machine_is_named_with_its_libraries() -> None:
    assert re.fullmatch(r".+, \d+ cores, Python 3\.\S+, numpy \S+, polars \S+, prefect \S+", machine())


def test_an_unknown_script_is_refused() -> None:
    done = benchmarks("--only", "nothing")
    assert done.returncode == 2
    assert "invalid choice: 'nothing'" in done.stderr


def test_a_script_that_fails_is_said_to(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(SMOKE, "baseline", "--no-such-option")
    assert main(["--smoke", "--only", "baseline"]) == 1
    shown = capfd.readouterr()
    assert "failed: exit code 2" in shown.out
    assert "--no-such-option" in shown.err
