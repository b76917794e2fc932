"""How long a run by batch jobs takes beyond its jobs.

    python benchmarks/batch_wave.py                                   # 200 responses of 50 tokens, jobs of 20 s
    python benchmarks/batch_wave.py --responses 4 --tokens 5 --job-seconds 1 --repeats 1

A whole ``python -m flows.run --backend vertex_batch`` with its defaults, against the stand-in of the service, which is
a process of its own. ``whole`` is the program; ``from the flow's start`` leaves out the start of Prefect's server, to
the second. Medians over the repeats of seconds of wall time, and of the processor time of the program and its server.
The table is Markdown.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":  # started as a file, the project itself is not on the path
    sys.path.insert(0, str(ROOT))

from benchmarks.stand_in import stand_in  # noqa: E402
from flows.watch.report import EXIT_COMPLETE, EXIT_INCOMPLETE  # noqa: E402
from tests.vertex_world.language_model import SyntheticModel  # noqa: E402
from tests.vertex_world.sampling import write_response_files  # noqa: E402


class Waited(NamedTuple):
    """Seconds."""

    whole: float
    of_flow: float
    processor: float


def wave(responses: int, tokens: int, job_seconds: float, folder: Path) -> Waited:
    """One run in fresh folders."""
    prompts = [f"Question number {number}?" for number in range(responses)]
    write_response_files(
        folder / "in", SyntheticModel(eos_probability=0.0), "gemini-2.5-flash-lite", prompts, 1, tokens
    )
    with stand_in("--job-seconds", str(job_seconds)) as told:
        command = [
            sys.executable, "-m", "flows.run", "--backend", "vertex_batch", "--model2", "gemini-2.5-flash",
            "--input-dir", str(folder / "in"), "--output-dir", str(folder / "out"),
        ]  # fmt: skip
        began, before = time.perf_counter(), os.times()
        done = subprocess.run(command, cwd=ROOT, env=os.environ | told, capture_output=True, text=True)
        whole, after, ended = time.perf_counter() - began, os.times(), datetime.now(UTC)
    # Some positions follow tokens that the stand-in sees as one; they are asked and not measured, as the code says.
    assert done.returncode in (EXIT_COMPLETE, EXIT_INCOMPLETE), done.stderr
    started = datetime.fromisoformat(json.loads((folder / "out" / "run.json").read_text())["started_at"])
    spent = after.children_user + after.children_system - before.children_user - before.children_system
    return Waited(whole, (ended - started).total_seconds(), spent)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--responses", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=50, help="of a response")
    parser.add_argument("--job-seconds", type=float, default=20.0)
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args(arguments)
    found: list[Waited] = []
    for _ in range(given.repeats):
        with tempfile.TemporaryDirectory() as name:
            found.append(wave(given.responses, given.tokens, given.job_seconds, Path(name)))
    cells = " | ".join(f"{median(values):.1f}" for values in zip(*found, strict=True))
    print("| responses × tokens | a job, s | whole, s | from the flow's start, s | processor, s |")  # noqa: T201
    print("|---|---|---|---|---|")  # noqa: T201
    print(f"| {given.responses:,} × {given.tokens:,} | {given.job_seconds:.0f} | {cells} |")  # noqa: T201


if __name__ == "__main__":
    main()
