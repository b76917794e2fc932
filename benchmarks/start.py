"""How long a user waits: for the first sign, for the help, for the first score, for the whole quickstart.

    python benchmarks/start.py                                   # 5 times each, minutes
    python benchmarks/start.py --repeats 1 --what help import

Figures are seconds of wall time and of processor time, medians over the repeats, each in a process of its own.
``first run`` has a home in which Prefect makes its database first; the other runs find one. The first score is there
when the local model has answered its first context, as the file of scores says. The table is Markdown.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
QUICKSTART = ("-m", "flows.run", "--config", "examples/quickstart.yaml", "--output-dir")
LOOK_S = 0.02


class Waited(NamedTuple):
    """Seconds."""

    wall: float
    processor: float


Figures = dict[str, Waited]


def environment(home: Path) -> dict[str, str]:
    """Of a user who was told of no server."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    return kept | {"PREFECT_HOME": str(home), "PYTHONUNBUFFERED": "1"}


def ended(arguments: Sequence[str]) -> Waited:
    """A program from its start to its end."""
    before, began = children_s(), time.perf_counter()
    subprocess.run([sys.executable, *arguments], cwd=ROOT, stdout=subprocess.DEVNULL, check=True)
    return Waited(time.perf_counter() - began, children_s() - before)


def children_s() -> float:
    """Processor time of the programs that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def quickstart(home: Path) -> Figures:
    """The quickstart's first sign, first score and end."""
    with tempfile.TemporaryDirectory() as folder:
        before, began = children_s(), time.perf_counter()
        scored = FirstScore(Path(folder), began)
        terminal, side = os.openpty()
        process = subprocess.Popen(
            [sys.executable, *QUICKSTART, folder], env=environment(home), cwd=ROOT, stdout=side, stderr=side
        )
        os.close(side)
        shown = os.read(terminal, 1024)
        line_s = time.perf_counter() - began
        with suppress(OSError):  # which is how a terminal says that nobody writes to it any more
            while more := os.read(terminal, 65536):
                shown += more
        os.close(terminal)
        code = process.wait()
        end_s = time.perf_counter() - began
        score_s = scored.stop()
    if code != 0 or score_s is None:
        raise RuntimeError(f"the quickstart ended with {code}: {shown.decode(errors='replace')}")
    used = children_s() - before
    return {"first sign": Waited(line_s, 0.0), "first score": Waited(score_s, 0.0), "whole": Waited(end_s, used)}


class FirstScore:
    """Notes when a file of scores is first in an output folder."""

    def __init__(self, folder: Path, began: float) -> None:
        self._folder, self._began = folder, began
        self._found: float | None = None
        self._ended = threading.Event()
        self._watch = threading.Thread(target=self._look)
        self._watch.start()

    def stop(self) -> float | None:
        """Seconds from the beginning; None if there was none."""
        self._ended.set()
        self._watch.join()
        return self._found

    def _look(self) -> None:
        while self._found is None and not self._ended.wait(LOOK_S):
            if any(path.is_file() and path.stat().st_size for path in (self._folder / "scores").rglob("*")):
                self._found = time.perf_counter() - self._began


def warm(repeats: int) -> list[Figures]:
    """Runs in a home that has its database."""
    with tempfile.TemporaryDirectory() as home:
        quickstart(Path(home))
        return [quickstart(Path(home)) for _ in range(repeats)]


def fresh(repeats: int) -> list[Figures]:
    """Runs in homes without one."""
    found: list[Figures] = []
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as home:
            found.append(quickstart(Path(home)))
    return found


def several(arguments: Sequence[str]) -> Callable[[int], list[Figures]]:
    """A program that ends by itself, so many times."""
    return lambda repeats: [{"end": ended(arguments)} for _ in range(repeats)]


WHAT: Mapping[str, Callable[[int], list[Figures]]] = {
    "import": several(("-c", "import kl, pydantic")),
    "help": several(("-m", "flows.run", "--help")),
    "quickstart": warm,
    "first run": fresh,
}


def table(chosen: Sequence[str], repeats: int) -> str:
    """Markdown."""
    lines = ["| what | until | wall, s | processor, s |", "|---|---|---|---|"]
    for name in chosen:
        found = WHAT[name](repeats)
        for until in found[0]:
            wall = median(figures[until].wall for figures in found)
            used = median(figures[until].processor for figures in found)
            lines.append(f"| {name} | {until} | {wall:.2f} | {f'{used:.2f}' if used else '-'} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--what", nargs="+", choices=WHAT, default=list(WHAT))
    given = parser.parse_args(arguments)
    print(table(given.what, given.repeats))  # noqa: T201


if __name__ == "__main__":
    main()
