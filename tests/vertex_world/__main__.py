"""``python -m tests.vertex_world``: run the world until interrupted, for trying by hand."""

from __future__ import annotations

import argparse
import json
import shlex
import signal
import sys
import threading
from pathlib import Path
from typing import cast

from tests.vertex_world.faults import Faults, HttpFault
from tests.vertex_world.language_model import SyntheticModel
from tests.vertex_world.world import VertexWorld


def main() -> None:
    arguments = _parse()
    http: dict[str, dict[HttpFault, float]] = {}
    for kind, _, fault in (item.partition(":") for item in arguments.http):
        name, _, rate = fault.partition("=")
        http.setdefault(kind, {})[cast(HttpFault, name)] = float(rate)
    noise, unrest = (
        {name: float(value) for name, _, value in (item.partition("=") for item in items)}
        for items in (arguments.noise, arguments.unrest)
    )
    world = VertexWorld(
        project=arguments.project,
        location=arguments.location,
        port=arguments.port,
        job_seconds=arguments.job_seconds,
        language_model=SyntheticModel(noise=noise, unrest=unrest),
        faults=Faults(latency_s=arguments.latency, http=http),
        storage_backend=arguments.storage,
    )
    stopped = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):  # before anybody reads that it runs
        signal.signal(number, lambda *_: stopped.set())
    with world:
        if arguments.responses:
            prompts = [f"Question number {index}?" for index in range(arguments.prompts)]
            world.write_responses(arguments.responses, "gemini-2.5-flash-lite", prompts, n=2, max_tokens=20)
            sys.stdout.write(f"# responses of gemini-2.5-flash-lite are in {arguments.responses}\n")
        for name, value in world.environment().items():
            sys.stdout.write(f"export {name}={shlex.quote(value)}\n")
        sys.stdout.write("# running; stop with Ctrl-C\n")
        sys.stdout.flush()
        stopped.wait()
        if arguments.calls:
            times = [(call.arrived_s, call.answered_s) for call in world.online_calls]
            arguments.calls.write_text(json.dumps(times), encoding="utf-8")
        states = {job.display_name: job.state for job in world.jobs}
        sys.stderr.write(f"# online calls: {len(world.online_calls)}, at most {world.max_online_in_flight} at once\n")
        sys.stderr.write(f"# jobs: {states}\n# rejected: {world.rejected}\n")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.vertex_world", description=__doc__)
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one")
    parser.add_argument("--project", default="stand-in-project")
    parser.add_argument("--location", default="us-central1")
    parser.add_argument("--job-seconds", type=float, default=2.0, help="how long a batch job takes")
    parser.add_argument("--latency", type=float, default=0.0, help="seconds, of every online call")
    parser.add_argument("--calls", type=Path, help="write when each online call came and was answered to this file")
    parser.add_argument(
        "--http",
        action="append",
        default=[],
        metavar="KIND:FAULT=RATE",
        help="a fault of HTTP calls, such as online:503=0.08 (repeatable)",
    )
    parser.add_argument(
        "--noise",
        action="append",
        default=[],
        metavar="MODEL=NATS",
        help="how far a model is from the base (repeatable)",
    )
    parser.add_argument(
        "--unrest",
        action="append",
        default=[],
        metavar="MODEL=NATS",
        help="how far a model is from itself when it is asked again (repeatable)",
    )
    parser.add_argument("--responses", type=Path, help="write response files of P into this directory first")
    parser.add_argument("--prompts", type=int, default=3, help="how many of them")
    parser.add_argument("--storage", choices=["memory", "filesystem"], default="memory")
    return parser.parse_args()


if __name__ == "__main__":
    main()
