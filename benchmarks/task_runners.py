"""What partition workers bring to the measuring stage: seconds and memory in this process, on one worker and on two.

    python benchmarks/task_runners.py                          # 192 files x 4 responses x 100 tokens
    python benchmarks/task_runners.py --files 384 --workers 1 2 4

The responses and answers are made up, from a fixed seed; no service is asked. All runners get the same files in one
run, so that the ratios mean something though the seconds depend on the machine. The time to start the processes is left
out, and given by itself. The table is Markdown.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

if __name__ == "__main__":  # started as a file, the project itself is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from flows.runtime.environment import prepare_environment

prepare_environment()

from prefect import flow  # noqa: E402 - its settings were prepared above

from flows.cluster.runners import LazyCluster  # noqa: E402
from flows.config.comparison import Comparison  # noqa: E402
from flows.config.models import RunConfig  # noqa: E402
from flows.config.runner import TaskRunnerConfig  # noqa: E402
from flows.config.templates import RunValues  # noqa: E402
from flows.stages.inputs import find_inputs  # noqa: E402
from flows.stages.passes import CLUSTER_PART_FILES, measure_files  # noqa: E402
from flows.stages.plan import make_plan, requests_of  # noqa: E402
from kl.records import Candidate, Score  # noqa: E402

K = 20
VOCABULARY = 4000


class Row(NamedTuple):
    """One runner's figures; memory in MB, of this process and of the largest worker."""

    runner: str
    start_s: float
    measure_s: float
    own_mb: float
    worker_mb: float | None


def top(noise: np.random.Generator, shift: float) -> list[tuple[int, float]]:
    """A list of K tokens with falling log-probabilities."""
    logits = np.sort(noise.normal(0.0, 2.0, K))[::-1] + noise.normal(0.0, shift, K)
    logprobs = logits - np.log(np.exp(logits).sum() + 0.5)
    tokens = noise.choice(VOCABULARY // 50, K, replace=False)
    order = np.argsort(-logprobs)
    return [(int(tokens[i]), float(logprobs[i])) for i in order]


def write_input(folder: Path, n_files: int, n_responses: int, n_tokens: int) -> None:
    """Response files of a model that does not exist."""
    folder.mkdir(parents=True)
    noise = np.random.default_rng(1)
    for number in range(n_files):
        responses = [_response(noise, n_tokens) for _ in range(n_responses)]
        document = {"prompt": f"Prompt {number}", "model": "p", "responses": responses}
        (folder / f"{number:05d}.json").write_text(json.dumps(document))


def _response(noise: np.random.Generator, n_tokens: int) -> dict[str, Any]:
    content: list[dict[str, Any]] = []
    for _ in range(n_tokens):
        listed = [{"token": f" t{token}", "logprob": logprob, "token_id": token} for token, logprob in top(noise, 0.0)]
        content.append({**listed[0], "top_logprobs": listed})
    text = "".join(item["token"] for item in content)
    return {"model": "p", "text": text, "finish_reason": "STOP", "logprobs": {"content": content}}


def write_scores(config: RunConfig) -> None:
    """An answer of Q to every context."""
    comparison = comparison_of(config)
    scores = comparison.folder.stores().scores
    noise = np.random.default_rng(2)
    for group in make_plan(find_inputs(config), comparison, scores, {}, 50).groups:
        for prompt_id, request in requests_of(group, comparison):
            answers = [
                Score(key, tuple(Candidate(f" t{token}", logprob, token) for token, logprob in top(noise, 0.3)))
                for key in request.keys
            ]
            scores.append(prompt_id, request.model, answers)
    scores.compact_all()


def comparison_of(config: RunConfig) -> Comparison:
    """What is measured."""
    return Comparison.of(config, RunValues.of_a_dry_run())


def peak_mb() -> float:
    """The most memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@flow(name="benchmark")
def measure_on(config: RunConfig, workers: int) -> Row:
    """Measure all files with so many workers; 0: in this process."""
    files, comparison = find_inputs(config), comparison_of(config)
    given = (comparison, comparison.folder.stores(), comparison.folder.token_parts)
    if not workers:
        began = time.monotonic()
        measure_files(files, *given)
        return Row("in this process", 0.0, time.monotonic() - began, peak_mb(), None)
    began = time.monotonic()
    runner = TaskRunnerConfig(kind="dask", workers=workers, threads_per_worker=1)
    with LazyCluster(runner) as cluster:
        measure_files(files[: 2 * CLUSTER_PART_FILES * workers], *given, cluster)  # the workers load the program
        started = time.monotonic()
        measure_files(files, *given, cluster)
        ended = time.monotonic()
        worker_mb = max(cluster.get().everywhere(peak_mb))
    return Row(f"dask, {workers} workers", started - began, ended - started, peak_mb(), worker_mb)


def table(rows: Sequence[Row]) -> str:
    """Markdown."""
    lines = [
        "| runner | start s | measure s | ratio | this process MB | largest worker MB |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        worker = "" if row.worker_mb is None else f"{row.worker_mb:.0f}"
        ratio = rows[0].measure_s / row.measure_s
        lines.append(
            f"| {row.runner} | {row.start_s:.1f} | {row.measure_s:.1f} | {ratio:.2f} | {row.own_mb:.0f} | {worker} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=192)
    parser.add_argument("--responses", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_input(folder / "in", arguments.files, arguments.responses, arguments.tokens)
        config = RunConfig(input_dir=folder / "in", output_dir=folder / "out", model2="q", project_id="none")
        write_scores(config)
        rows = [measure_on(config, workers) for workers in [0, *arguments.workers]]
    positions = arguments.files * arguments.responses * arguments.tokens
    print(f"{positions:,} positions in {arguments.files} files, {os.cpu_count()} processors\n")  # noqa: T201
    print(table(rows))  # noqa: T201


if __name__ == "__main__":
    main()
