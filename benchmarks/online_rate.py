"""How fast a service is asked that takes its time: calls a second against what the calls in flight allow.

    python benchmarks/online_rate.py                                        # 20 and 100 in flight, 600 and 3,000 calls
    python benchmarks/online_rate.py --in-flight 4 --positions 20 --latency 0.05 --repeats 1

The ideal is as many calls in each ``latency`` as may be in flight, from the first call to the last answer. The stand-in
of the service is a process of its own, and says when calls came and were answered. ``backend`` is the backend alone,
with the processor time of a call in this process; ``run`` is a whole ``python -m flows.run``, which also reads, begins
a task for each response and keeps each answer on disk. Medians over the repeats; the table is Markdown.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":  # started as a file, the project itself is not on the path
    sys.path.insert(0, str(ROOT))

from flows.runtime.environment import prepare_environment  # noqa: E402

prepare_environment()

from backends.base import ScoreRequest  # noqa: E402 - the settings of Prefect were prepared above
from backends.keys import context_keys  # noqa: E402
from backends.vertex.online import VertexOnlineBackend  # noqa: E402
from backends.vertex.options import VertexOnlineOptions  # noqa: E402
from benchmarks.stand_in import stand_in  # noqa: E402
from flows.watch.report import EXIT_COMPLETE, EXIT_INCOMPLETE  # noqa: E402
from kl.records import Prompt, Score, Turn  # noqa: E402
from tests.vertex_world.language_model import SyntheticModel  # noqa: E402
from tests.vertex_world.sampling import write_response_files  # noqa: E402

MODEL = "gemini-2.5-flash"
TOKENS = 50  # of a response


class Case(NamedTuple):
    """What is measured."""

    in_flight: int
    positions: int
    latency_s: float


class Rate(NamedTuple):
    """Calls a second as a share of the ideal, and processor time of a call in milliseconds."""

    share: float
    cpu_ms: float


def share_of_ideal(calls: Path, case: Case) -> float:
    """The rate from the first call to the last answer; the calls of the proof that a model can be used came before."""
    times = sorted(json.loads(calls.read_text(encoding="utf-8")))[-case.positions :]
    assert len(times) == case.positions, "some calls are missing"
    took = max(answered for _, answered in times) - times[0][0]
    return len(times) / took / (case.in_flight / case.latency_s)


def requests(positions: int) -> list[ScoreRequest]:
    """Responses with so many positions in all."""
    made: list[ScoreRequest] = []
    for number, start in enumerate(range(0, positions, TOKENS)):
        n = min(TOKENS, positions - start)
        prompt = Prompt((Turn("user", f"Question {number}?"),))
        tokens = [f" t{number}"] * n
        ends = tuple(len(tokens[0]) * position for position in range(n))
        keys = tuple(context_keys(MODEL, prompt, {}, tokens))
        made.append(ScoreRequest(f"{number}", MODEL, prompt, "".join(tokens), ends, None, tuple(range(n)), keys, 20))
    return made


def backend(case: Case, folder: Path) -> Rate:
    """Ask through the backend alone."""
    calls = folder / "calls.json"
    with stand_in("--latency", str(case.latency_s), "--calls", str(calls)) as told:
        os.environ.update(told)
        spent = asyncio.run(_ask(requests(case.positions), told["GOOGLE_CLOUD_PROJECT"], case.in_flight))
    return Rate(share_of_ideal(calls, case), 1000 * spent / case.positions)


async def _ask(asked: Sequence[ScoreRequest], project: str, in_flight: int) -> float:
    options = VertexOnlineOptions(project_id=project, max_concurrent=in_flight)
    async with VertexOnlineBackend(options) as entered:
        await entered.preflight(MODEL)
        began = time.process_time()
        n = 0
        async for result in entered.score(asked):
            assert isinstance(result, Score), result
            n += 1
        spent = time.process_time() - began
    assert n == sum(len(request.keys) for request in asked)
    return spent


def run(case: Case, folder: Path) -> Rate:
    """Ask by a whole run; its processor time holds its start."""
    calls = folder / "calls.json"
    prompts = [f"Question number {number}?" for number in range(case.positions // TOKENS or 1)]
    n_tokens = min(TOKENS, case.positions)
    endless = SyntheticModel(eos_probability=0.0)
    write_response_files(folder / "in", endless, "gemini-2.5-flash-lite", prompts, 1, n_tokens)
    with stand_in("--latency", str(case.latency_s), "--calls", str(calls)) as told:
        command = [
            sys.executable, "-m", "flows.run", "--backend", "vertex_online", "--model2", MODEL,
            "--input-dir", str(folder / "in"), "--output-dir", str(folder / "out"),
            "--max-concurrent", str(case.in_flight),
        ]  # fmt: skip
        before = os.times()
        done = subprocess.run(command, cwd=ROOT, env=os.environ | told, capture_output=True, text=True)
        after = os.times()
    # Some positions follow tokens that the stand-in sees as one; they are asked and not measured, as the code says.
    assert done.returncode in (EXIT_COMPLETE, EXIT_INCOMPLETE), done.stderr
    spent = after.children_user + after.children_system - before.children_user - before.children_system
    return Rate(share_of_ideal(calls, case), 1000 * spent / case.positions)


WAYS = {"backend": backend, "run": run}


def figures(way: str, case: Case, repeats: int) -> Rate:
    """Medians."""
    rates: list[Rate] = []
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as name:
            rates.append(WAYS[way](case, Path(name)))
    return Rate(median(rate.share for rate in rates), median(rate.cpu_ms for rate in rates))


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--in-flight", type=int, nargs="+", default=[20, 100])
    parser.add_argument("--positions", type=int, nargs="+", default=[600, 3000], help="50 or less, or multiples of 50")
    parser.add_argument("--latency", type=float, default=0.2, help="seconds")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    given = parser.parse_args(arguments)
    lines = ["| way | in flight | positions | share of the ideal rate | CPU ms a call |", "|---|---|---|---|---|"]
    for way in given.ways:
        for in_flight in given.in_flight:
            for positions in given.positions:
                rate = figures(way, Case(in_flight, positions, given.latency), given.repeats)
                lines.append(f"| {way} | {in_flight} | {positions:,} | {rate.share:.3f} | {rate.cpu_ms:.2f} |")
    print("\n".join(lines))  # noqa: T201


if __name__ == "__main__":
    main()
