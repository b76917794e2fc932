"""What a run costs that asks nothing, from the input files to all outputs: time a position, memory, and their growth.

    python benchmarks/whole_run.py                                     # 12,500, 50,000 and 200,000 positions
    python benchmarks/whole_run.py --positions 500000 2000000 --repeats 1
    python benchmarks/whole_run.py --one-prompt
    python benchmarks/whole_run.py --positions 400 --repeats 1 --length 20

Responses and scores are made up and lie on the disk: planning, both passes over the files, and writing are measured,
without Prefect, each time in a process of its own. Files have ten responses of ``--length`` tokens with lists of 20.
Figures are positions a second of wall time and of processor time (all threads), medians of the repeats, the time a
position against that at the fewest positions, the most memory of the process, and that against the fewest positions.
``--one-prompt`` has all files answer one prompt. ``--profile`` says where the time goes. The tables are Markdown.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":  # started as a file, the project itself is not on the path
    sys.path.insert(0, str(ROOT))

from flows.runtime.environment import prepare_environment  # noqa: E402

prepare_environment()

from flows.config.comparison import Comparison  # noqa: E402 - the settings of Prefect were prepared above
from flows.config.models import RunConfig  # noqa: E402
from flows.config.templates import RunValues  # noqa: E402
from flows.stages.inputs import find_inputs, parsed_files_kept  # noqa: E402
from flows.stages.passes import measure_files  # noqa: E402
from flows.stages.plan import make_plan  # noqa: E402
from flows.stages.writing import write_results  # noqa: E402
from kl.input.responses import read_responses  # noqa: E402
from kl.records import Candidate, Score  # noqa: E402

RESPONSES = 10  # of a file
K, NEAR = 20, 200  # listed, and drawn at each position
VOCABULARY = 20_000
STAGES = ("plan", "measure", "write")


class Lists(NamedTuple):
    """The K best of some positions by falling log-probability: values and tokens, shape (T, K)."""

    logprobs: np.ndarray
    tokens: np.ndarray


class Spent(NamedTuple):
    """What one run took: seconds of wall and of processor time, peak bytes, and the wall time of each stage."""

    wall: float
    processor: float
    peak: int
    stages: dict[str, float]


def drawn_lists(rng: np.random.Generator, n: int) -> tuple[Lists, Lists]:
    """The lists of P and Q at ``n`` positions, which share most of their tokens."""
    logits = rng.normal(0, 3, (n, NEAR))
    tokens = (rng.integers(0, VOCABULARY, (n, 1)) + np.arange(NEAR) * 23) % VOCABULARY
    return best(logits, tokens), best(logits + rng.normal(0, 0.3, logits.shape), tokens)


def best(logits: np.ndarray, tokens: np.ndarray) -> Lists:
    """As a service reports them, in single precision."""
    logs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    order = np.argsort(-logs, axis=1)[:, :K]
    values = np.take_along_axis(logs, order, axis=1).astype(np.float32).astype(np.float64)
    return Lists(values, np.take_along_axis(tokens, order, axis=1))


def rows_of(lists: Lists) -> Iterator[list[Candidate]]:
    """The lists as objects."""
    for logprobs, tokens in zip(lists.logprobs.tolist(), lists.tokens.tolist(), strict=True):
        yield [Candidate(f" w{token}", logp, token) for logp, token in zip(logprobs, tokens, strict=True)]


def response(lists: Lists, rng: np.random.Generator) -> dict[str, Any]:
    """A response in the form of the input files."""
    content: list[dict[str, Any]] = []
    for top in rows_of(lists):
        listed = [{"token": item.token, "logprob": item.logprob, "token_id": item.token_id} for item in top]
        content.append({**listed[rng.integers(3)], "top_logprobs": listed})
    text = "".join(item["token"] for item in content)
    return {"text": text, "finish_reason": "length", "logprobs": {"content": content}}


def config_of(folder: Path) -> RunConfig:
    """A run that has its scores: no service is asked whether there is one."""
    return RunConfig(input_dir=folder / "in", output_dir=folder / "out", model2="q", project_id="none")


def comparison_of(folder: Path) -> Comparison:
    """What is compared."""
    return Comparison.of(config_of(folder), RunValues.of_a_dry_run())


def prepare(folder: Path, positions: int, length: int, *, one_prompt: bool = False) -> int:
    """Input files, and an answer to every context; the number of positions, a multiple of those of a file."""
    (folder / "in").mkdir(parents=True)
    n_files = max(round(positions / (RESPONSES * length)), 1)
    for number in range(n_files):
        write_file(folder, number, length, "What is it?" if one_prompt else f"What is {number}?")
    comparison_of(folder).folder.stores().scores.compact_all()  # as at the end of a run
    return n_files * RESPONSES * length


def write_file(folder: Path, number: int, length: int, prompt: str) -> None:
    """One input file with its scores."""
    rng = np.random.default_rng(number)
    lists = [drawn_lists(rng, length) for _ in range(RESPONSES)]
    path = folder / "in" / f"{number:06d}.json"
    responses = [response(of_p, rng) for of_p, _ in lists]
    path.write_text(json.dumps({"prompt": prompt, "model": "p", "responses": responses}))
    comparison = comparison_of(folder)
    parsed = read_responses(path, path.name)
    assert parsed.prompt is not None
    scores: dict[str, Score] = {}
    for of_p, (_, of_q) in zip(parsed.responses, lists, strict=True):
        request = comparison.request(of_p, "q")
        assert request is not None
        tops = list(rows_of(of_q))
        for position, key in zip(request.positions, request.keys, strict=True):
            scores.setdefault(key, Score(key, tuple(tops[position]), model_version="q-1", input_tokens=7 + position))
    comparison.folder.stores().scores.append(parsed.prompt.prompt_id, "q", list(scores.values()))


def run(folder: Path) -> Spent:
    """All stages once, in this process."""
    comparison = comparison_of(folder)
    stores = comparison.folder.stores()
    shutil.rmtree(folder / "scratch", ignore_errors=True)
    marks = [time.perf_counter()]
    began = time.process_time()
    with parsed_files_kept():
        files = find_inputs(comparison.config)
        plan = make_plan(files, comparison, stores.scores, {}, 100)
        assert plan.n_to_ask == 0
        assert plan.n_stored > 0
        marks.append(time.perf_counter())
        measured = measure_files(files, comparison, stores, folder / "scratch")
        marks.append(time.perf_counter())
        results = write_results(measured, comparison, {})
        marks.append(time.perf_counter())
    assert results.report.n_measured == plan.n_selected
    stages = dict(zip(STAGES, np.diff(marks).tolist(), strict=True))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return Spent(marks[-1] - marks[0], time.process_time() - began, peak, stages)


def run_apart(folder: Path) -> Spent:
    """The same in a process of its own, whose memory nobody else used."""
    command = [sys.executable, str(Path(__file__)), "--run", str(folder)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return Spent(**json.loads(done.stdout.splitlines()[-1]))


def profile(folder: Path) -> None:
    """Where the time goes, by function, in all threads."""
    profiles = [cProfile.Profile()]

    def begin(*_: object) -> None:
        profiles.append(cProfile.Profile())
        profiles[-1].enable()  # takes the place of this function in its thread

    threading.setprofile(begin)
    profiles[0].runcall(run, folder)
    threading.setprofile(None)  # type: ignore[arg-type]
    stats = pstats.Stats(profiles[0])
    for other in profiles[1:]:
        stats.add(other)
    stats.sort_stats("tottime").print_stats(40)


def table(found: dict[int, list[Spent]]) -> str:
    """Markdown."""
    heads = "positions | positions/s | of processor time | time a position, × | peak MB | × | " + " | ".join(STAGES)
    lines = [f"| {heads} |", "|---|" + "---|" * (5 + len(STAGES))]
    shares: list[tuple[float, int]] = []
    for n, spent in found.items():
        wall, processor = median(one.wall for one in spent), median(one.processor for one in spent)
        shares.append((processor / n, max(one.peak for one in spent)))
        stages = " | ".join(f"{1e6 * median(one.stages[stage] for one in spent) / n:.1f} µs" for stage in STAGES)
        lines.append(
            f"| {n:,} | {n / wall:,.0f} | {n / processor:,.0f} | {shares[-1][0] / shares[0][0]:.2f} "
            f"| {shares[-1][1] / 1e6:.0f} | {shares[-1][1] / shares[0][1]:.2f} | {stages} |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--positions", type=int, nargs="+", default=[12_500, 50_000, 200_000])
    parser.add_argument("--length", type=int, default=100, help="tokens of a response")
    parser.add_argument("--one-prompt", action="store_true", help="all files answer one prompt, not each its own")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--profile", action="store_true", help="profile one run at the fewest positions instead")
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.run:
        print(json.dumps(run(given.run)._asdict()))  # noqa: T201
        return
    with tempfile.TemporaryDirectory() as name:
        folders = {
            prepare(Path(name, str(n)), n, given.length, one_prompt=given.one_prompt): Path(name, str(n))
            for n in sorted(given.positions)
        }
        if given.profile:
            profile(min(folders.items())[1])
            return
        found: dict[int, list[Spent]] = {n: [] for n in folders}
        for _ in range(given.repeats):
            for n, folder in folders.items():
                found[n].append(run_apart(folder))
    print(table(found))  # noqa: T201


if __name__ == "__main__":
    main()
