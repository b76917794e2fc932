"""Run the benchmarks of `docs/performance.md`, one script a row, after a line about the machine.

    python -m benchmarks                                  # all of them, an hour on two cores
    python -m benchmarks --only reading writing
    python -m benchmarks --smoke                          # that each runs: tiny sizes, once; the figures mean nothing

Each script is a process of its own; its figures are medians of five or more repeats. Below its table stand the
processor time of that process and those that it started, and the most memory that one of them had. Where a script
fails, the others still run.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# What makes each small.
SMOKE = {
    "baseline": "--positions 100 --repeats 1",
    "list_bounds": "--positions 100 --repeats 1",
    "token_rows": "--positions 100 --repeats 1",
    "reading": "--responses 2 --tokens 5 --repeats 1",
    "writing": "--positions 400 --length 30 --repeats 1",
    "whole_run": "--positions 100 200 --length 10 --repeats 1",
    "batch_rows": "--short 2 --long 60 --repeats 1",
    "local_engine": "--responses 1 --tokens 4 --repeats 1 --threads 1",
    "device_pairs": "--shapes tiny --repeats 1",
    "growth": "--responses 2 --repeats 1",
    "online_rate": "--in-flight 4 --positions 20 --latency 0.05 --repeats 1 --ways backend",
    "prefect_groups": "--groups 8 --repeats 1",
    "batch_wave": "--responses 4 --tokens 5 --job-seconds 1 --repeats 1",
    "start": "--repeats 1 --what import help",
}


def machine() -> str:
    """The processor, and what computes on it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("numpy", "polars", "prefect"))
    return (
        f"{names[0] if names else platform.processor()}, {cores} cores, Python {platform.python_version()}, {versions}"
    )


def load() -> str:
    """How much else the machine did in the last minute."""
    return f"load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "load not known"


def run(name: str, *, smoke: bool) -> bool:
    """Run one script and print what it took; whether it succeeded."""
    arguments = SMOKE[name].split() if smoke else []
    show(f"\n## {name}: python {' '.join([f'benchmarks/{name}.py', *arguments])} ({load()})\n")
    process = subprocess.Popen([sys.executable, f"benchmarks/{name}.py", *arguments], cwd=ROOT)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    show(
        f"\n{used.ru_utime + used.ru_stime:.0f} s of processor time, at most {used.ru_maxrss / 1024:,.0f} MiB a process"
    )
    if process.returncode:
        show(f"failed: exit code {process.returncode}")
    return process.returncode == 0


def show(text: str) -> None:
    """Print before the next process does."""
    print(text, flush=True)  # noqa: T201


def main(arguments: Sequence[str] | None = None) -> int:
    """Run them; 1 if one failed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", nargs="+", choices=SMOKE, default=list(SMOKE), metavar="SCRIPT", help=", ".join(SMOKE)
    )
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, once")
    given = parser.parse_args(arguments)
    show(machine())
    succeeded = [run(name, smoke=given.smoke) for name in given.only]
    return 0 if all(succeeded) else 1


if __name__ == "__main__":
    raise SystemExit(main())
