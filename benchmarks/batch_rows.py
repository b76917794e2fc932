"""What the rows of batch jobs cost: making the input, reading the output, keeping the answers.

    python benchmarks/batch_rows.py                                     # 400 responses of 50 tokens, one of 8,000
    python benchmarks/batch_rows.py --short 20 --long 200 --repeats 1

``build`` makes the lines of an input file from requests, ``read`` makes scores of an output file whose rows echo their
requests, ``store`` puts scores into a journal and then into parts of the table on this disk, a response a group.
The figures are processor time of this process, medians over the repeats; the last columns are how many times as fast
that is as the plain way in the same run (``json.dumps`` of each request, ``json.loads`` of each row), what share it is
of the speed of a copy in memory, and the most memory that Python held meanwhile beyond what went in. The table is
Markdown.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import random
import shutil
import sys
import tempfile
import time
import tracemalloc
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":  # started as a file, the project itself is not on the path
    sys.path.insert(0, str(ROOT))

from flows.runtime.environment import prepare_environment  # noqa: E402

prepare_environment()

from backends.base import ScoreRequest  # noqa: E402 - the settings of Prefect were prepared above
from backends.keys import context_keys  # noqa: E402
from backends.vertex import wire  # noqa: E402
from backends.vertex.jobs.rows import OutputReader, RowSet, score_rows  # noqa: E402
from flows.folder.layout import OutputFolder  # noqa: E402
from flows.stages.scoring import store_answers  # noqa: E402
from kl.records import Prompt, Score, ScoreFailure, Turn  # noqa: E402

MODEL = "gemini-2.5-flash"
PROMPT_CHARACTERS = 600
WORDS = (" the", " model", " says", " of", "\n", ' "so"', " über", " 12", ",", " and", " a", " 🙂")
LISTED = 20


class Figures(NamedTuple):
    """What one way of working on some bytes took."""

    seconds: float
    plain_s: float | None
    copy_s: float
    peak_bytes: int


def requests(n_responses: int, n_tokens: int) -> list[ScoreRequest]:
    """What a backend is asked about responses that are all different."""
    made: list[ScoreRequest] = []
    for number in range(n_responses):
        draw = random.Random(number)
        prompt = _prompt(number)
        tokens = [draw.choice(WORDS) for _ in range(n_tokens)]
        ends = [0]
        for token in tokens[:-1]:
            ends.append(ends[-1] + len(token))
        keys = tuple(context_keys(MODEL, prompt, {}, tokens))
        positions = tuple(range(n_tokens))
        text = "".join(tokens)
        made.append(ScoreRequest(f"{number}", MODEL, prompt, text, tuple(ends), None, positions, keys, LISTED))
    return made


def _prompt(number: int) -> Prompt:
    return Prompt((Turn("user", f"Question {number}?" + " why" * (PROMPT_CHARACTERS // 4)),))


def response(number: int) -> dict[str, Any]:
    """An answer as the service writes it."""
    draw = random.Random(number)
    listed = [
        {"token": draw.choice(WORDS), "tokenId": draw.randrange(250_000), "logProbability": -draw.random() - rank}
        for rank in range(LISTED)
    ]
    counts = {"promptTokenCount": 150 + number % 50, "candidatesTokenCount": 1, "totalTokenCount": 151 + number % 50}
    return {
        "candidates": [
            {
                "content": {"role": "model", "parts": [{"text": listed[0]["token"]}]},
                "finishReason": "MAX_TOKENS",
                "avgLogprobs": listed[0]["logProbability"],
                "score": listed[0]["logProbability"],
                "logprobsResult": {"chosenCandidates": listed[:1], "topCandidates": [{"candidates": listed}]},
            }
        ],
        "usageMetadata": {**counts, "promptTokensDetails": [{"modality": "TEXT", "tokenCount": 150}]},
        "modelVersion": MODEL,
        "createTime": "2026-01-01T00:00:00.000000Z",
        "responseId": f"{number:024x}",
    }


def write_output(rows: RowSet[Score], path: Path) -> int:
    """The output file of a job over some rows; its size."""
    with path.open("wb") as file:
        for number, line in enumerate(rows):
            asked = json.loads(line)
            row = {"key": asked["key"], "status": "", "request": asked["request"], "response": response(number)}
            file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
    return path.stat().st_size


def cpu_seconds(work: Callable[[], object]) -> float:
    """Processor time of this process."""
    gc.collect()
    began = time.process_time()
    work()
    return time.process_time() - began


def peak_of(work: Callable[[], object]) -> int:
    """The most bytes that Python held meanwhile beyond what it held before."""
    gc.collect()
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    work()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak - before


def exhaust(items: Iterator[object]) -> int:
    """How many there are; none is kept."""
    return sum(1 for _ in items)


def measured(work: Callable[[], object], plain: Callable[[], object] | None, size: int, repeats: int) -> Figures:
    """A way of working against the plain one and a copy in memory; they take turns."""
    block = bytes(min(size, 50_000_000))
    spent: list[float] = []
    spent_plain: list[float] = []
    copied: list[float] = []
    for _ in range(repeats):
        spent.append(cpu_seconds(work))
        if plain is not None:
            spent_plain.append(cpu_seconds(plain))
        copied.append(cpu_seconds(lambda: bytearray(block)) * size / len(block))
    return Figures(median(spent), median(spent_plain) if spent_plain else None, median(copied), peak_of(work))


def build(asked: Sequence[ScoreRequest], size: int, repeats: int) -> Figures:
    """The lines of an input file."""

    def plain() -> None:
        for request in asked:
            config = wire.generation_config(request.model, request.top_logprobs)
            for _, key, prefix in request.contexts():
                json.dumps({"key": key, "request": wire.request_body(request.prompt, prefix, config)})

    return measured(lambda: exhaust(iter(score_rows(asked))), plain, size, repeats)


def read(rows: RowSet[Score], path: Path, size: int, repeats: int) -> Figures:
    """Scores of an output file."""

    def plain() -> None:
        with path.open("rb") as file:
            for line in file:
                json.loads(line)

    return measured(lambda: exhaust(OutputReader(rows).read(path)), plain, size, repeats)


def store(asked: Sequence[ScoreRequest], path: Path, folder: Path, size: int, repeats: int) -> Figures:
    """Scores on disk, a response a group."""
    found = {score.key: score for score in OutputReader(score_rows(asked)).read(path)}

    async def answers(request: ScoreRequest) -> AsyncIterator[Score | ScoreFailure]:
        for key in request.keys:
            yield found[key]

    async def all_groups(to: Path) -> None:
        stores = OutputFolder(to).stores()
        for request in asked:
            await store_answers(answers(request), [(request.prompt.prompt_id, request)], stores, lambda *_: None)

    def work() -> None:
        asyncio.run(all_groups(folder / "out"))
        shutil.rmtree(folder / "out")

    return measured(work, None, size, repeats)


def lines_of(n_responses: int, n_tokens: int, repeats: int) -> list[str]:
    """The rows of the table for responses of one length."""
    asked = requests(n_responses, n_tokens)
    rows = score_rows(asked)
    n = len(rows.keys)
    with tempfile.TemporaryDirectory() as name:
        path = Path(name, "predictions.jsonl")
        in_size, out_size = sum(map(len, rows)), write_output(rows, path)
        stages = [
            ("build", in_size, build(asked, in_size, repeats)),
            ("read", out_size, read(rows, path, out_size, repeats)),
            ("store", out_size, store(asked, path, Path(name), out_size, repeats)),
        ]
    return [
        f"| {stage} | {n_responses:,} × {n_tokens:,} | {size / n:,.0f} | {figures.seconds:.3f} "
        f"| {1e6 * figures.seconds / n:.2f} | {size / figures.seconds / 1e6:,.0f} "
        f"| {figures.plain_s / figures.seconds if figures.plain_s else float('nan'):.1f} "
        f"| {figures.copy_s / figures.seconds:.3f} | {figures.peak_bytes / 2**20:.1f} |"
        for stage, size, figures in stages
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", type=int, default=400, help="responses of 50 tokens")
    parser.add_argument("--long", type=int, default=8000, help="tokens of the one long response")
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args(arguments)
    head = "| | responses × tokens | bytes a row | s | µs a row | MB/s | × plain | share of a copy | peak MiB |"
    lines = [head, "|---|" + "---|" * 8]
    lines += lines_of(given.short, 50, given.repeats) + lines_of(1, given.long, given.repeats)
    print("\n".join(lines))  # noqa: T201


if __name__ == "__main__":
    main()
