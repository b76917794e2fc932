"""What the scripts of the benchmarks print."""

from __future__ import annotations

import subprocess
import sys

from tests import ROOT


def printed(script: str, *options: str, timeout: float = 120) -> list[str]:
    """The lines of a script of the folder, run to its end as a program of its own."""
    command = [sys.executable, f"benchmarks/{script}.py", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=timeout)
    return done.stdout.splitlines()
