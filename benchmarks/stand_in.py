"""The stand-in of the service as a process of its own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@contextmanager
def stand_in(*options: str) -> Iterator[dict[str, str]]:
    """`python -m tests.vertex_world` with some options; gives the environment of its clients."""
    command = [sys.executable, "-m", "tests.vertex_world", *options]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        told: dict[str, str] = {}
        try:
            for line in process.stdout:
                if line.startswith("# running"):
                    break
                name, _, value = line.removeprefix("export ").strip().partition("=")
                told[name] = value.strip("'")
            yield told
        finally:
            process.terminate()
