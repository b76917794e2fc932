"""What one response costs as there are more of them: planning, rows of jobs, the record of jobs, looks at jobs.

    python benchmarks/growth.py                                # 625, 2,500 and 10,000 responses of one job each
    python benchmarks/growth.py --responses 250 --repeats 5    # 250, 1,000 and 4,000

The figures are processor time of this process per response, medians over the repeats, and their ratio to the fewest
responses: what is linear stays at 1. The looks go over HTTP to the stand-in of the service, which is another process.
The table is Markdown.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":  # started as a file, the project itself is not on the path
    sys.path.insert(0, str(ROOT))

from flows.runtime.environment import prepare_environment  # noqa: E402

prepare_environment()

from backends.base import ScoreRequest  # noqa: E402 - the settings of Prefect were prepared above
from backends.keys import context_keys  # noqa: E402
from backends.vertex.jobs.bucket import BatchBucket  # noqa: E402
from backends.vertex.jobs.ledger import JobLedger  # noqa: E402
from backends.vertex.jobs.remote import BatchJobs  # noqa: E402
from backends.vertex.jobs.rows import score_rows, split_rows  # noqa: E402
from backends.vertex.service.client import make_client  # noqa: E402
from benchmarks.stand_in import stand_in  # noqa: E402
from flows.config.comparison import Comparison  # noqa: E402
from flows.config.models import RunConfig  # noqa: E402
from flows.config.templates import RunValues  # noqa: E402
from flows.stages.inputs import find_inputs  # noqa: E402
from flows.stages.plan import make_plan  # noqa: E402
from kl.records import Prompt, Turn  # noqa: E402

GROWTH = (1, 4, 16)
MODEL = "gemini-2.5-flash"
PLACE = "project/us-central1/bucket"
RESPONSES_PER_FILE = 4
TOKENS = 20
LISTED = 5
LOOKS_AT_ONCE = 1000  # the most jobs in flight
MAX_FILE_BYTES = 10**9

Stage = Callable[[int, Path], float]


@contextmanager
def timed() -> Iterator[list[float]]:
    """The processor time of what is inside, in a list that has it afterwards."""
    gc.collect()
    spent: list[float] = []
    began = time.process_time()
    yield spent
    spent.append(time.process_time() - began)


def write_input(folder: Path, n: int) -> None:
    """``n`` responses of a model that does not exist, all different."""
    folder.mkdir(parents=True)
    for start in range(0, n, RESPONSES_PER_FILE):
        responses = [response(index) for index in range(start, min(start + RESPONSES_PER_FILE, n))]
        document = {"prompt": f"Question {start}?", "model": "p", "responses": responses}
        (folder / f"{start:06d}.json").write_text(json.dumps(document), encoding="utf-8")


def response(number: int) -> dict[str, Any]:
    """A response in the form of the input files."""
    content: list[dict[str, Any]] = []
    for position in range(TOKENS):
        names = [f" t{number}", *(f" o{position}{other}" for other in range(1, LISTED))]
        listed = [{"token": name, "logprob": -1.0 - rank, "token_id": rank} for rank, name in enumerate(names)]
        content.append({**listed[0], "top_logprobs": listed})
    text = "".join(item["token"] for item in content)
    return {"model": "p", "text": text, "finish_reason": "STOP", "logprobs": {"content": content}}


def requests(n: int) -> list[ScoreRequest]:
    """What a backend is asked about ``n`` responses."""
    made: list[ScoreRequest] = []
    for number in range(n):
        prompt = Prompt((Turn("user", f"Question {number}?"),))
        tokens = [f" t{number}"] * TOKENS
        ends = tuple(len(tokens[0]) * position for position in range(TOKENS))
        keys = tuple(context_keys(MODEL, prompt, {}, tokens))
        made.append(
            ScoreRequest(
                f"{number}", MODEL, prompt, "".join(tokens), ends, None, tuple(range(TOKENS)), keys, top_logprobs=20
            )
        )
    return made


def plan(n: int, folder: Path) -> float:
    """Read the files and decide what is missing; each response is a group."""
    write_input(folder / "in", n)
    config = RunConfig(input_dir=folder / "in", output_dir=folder / "out", model2=MODEL, project_id="none")
    comparison = Comparison.of(config, RunValues.of_a_dry_run())
    store = comparison.folder.stores().scores
    with timed() as spent:
        made = make_plan(find_inputs(config), comparison, store, {}, n)
    assert len(made.groups) == made.n_responses == n
    return spent[0]


def rows(n: int, folder: Path) -> float:
    """Cut all rows into a job a response, write its lines, take half as answered; find the rows of each job again."""
    asked = requests(n)
    jobs = {key: request.name for request in asked for key in request.keys}
    with timed() as spent:
        everything = score_rows(asked)
        parts = list(split_rows(everything, TOKENS, MAX_FILE_BYTES))
        for part in parts:
            for _ in part:
                pass
            part.without(part.keys[: TOKENS // 2])
        everything.without(everything.keys[: n * TOKENS // 2])
        by_job = everything.by(jobs.__getitem__)
    assert len(parts) == len(by_job) == n
    return spent[0]


def ledger(n: int, folder: Path) -> float:
    """Record jobs, name them and end them, then read the record again, as the next run does."""
    keys = [request.keys for request in requests(n)]
    with timed() as spent:
        book = JobLedger(folder / "jobs")
        for of_job in keys:
            assert book.to_read(PLACE, of_job, ()) is None
            entry = book.update(book.next_entry(PLACE, of_job, "name"))
            entry = book.update(replace(entry, job_name="projects/1/x", state="RUNNING"))
            book.update(replace(entry, state="SUCCEEDED", ended=True))
        again = JobLedger(folder / "jobs")
        known = again.in_flight(PLACE)
        assert sum(again.tries(PLACE, key) for key in known) == n * TOKENS
    assert len(again.entries()) == n
    return spent[0]


def polling(n: int, folder: Path) -> float:
    """Look at jobs once each, as many at once as may be in flight."""
    return asyncio.run(look(n))


async def look(n: int) -> float:
    """The looks at a job that is under way; the first ones, which load the client, are not counted."""
    project, location = os.environ["GOOGLE_CLOUD_PROJECT"], os.environ["GOOGLE_CLOUD_LOCATION"]
    client = make_client(project, location, 120.0)
    jobs = BatchJobs(client, project, location, 60.0, 120.0)
    bucket = BatchBucket(project, location, f"{project}-kl-batch", 60.0)
    places = asyncio.Semaphore(LOOKS_AT_ONCE)

    async def once(name: str) -> None:
        async with places:
            assert await jobs.get(name) is not None

    try:
        await bucket.ensure()
        uri = await bucket.upload_once("batch_input/x.jsonl", score_rows(requests(1)))
        job = await jobs.create(MODEL, uri, f"gs://{bucket.name}/batch_output/x", "x")
        await asyncio.gather(*(once(job.name) for _ in range(20)))
        with timed() as spent:
            await asyncio.gather(*(once(job.name) for _ in range(n)))
    finally:
        await client.aclose()
        bucket.close()
    return spent[0]


@contextmanager
def service() -> Iterator[None]:
    """The stand-in of the service, in whose environment this process lives meanwhile; its jobs never end."""
    before = dict(os.environ)
    with stand_in("--job-seconds", "100000") as told:
        os.environ.update(told)
        try:
            yield
        finally:
            os.environ.clear()
            os.environ.update(before)


STAGES: dict[str, Stage] = {"plan": plan, "rows": rows, "ledger": ledger, "polling": polling}


def per_response(stage: Stage, sizes: Sequence[int], repeats: int) -> list[float]:
    """Milliseconds a response at each size: medians; the sizes take turns, so that a busy machine disturbs all."""
    spent: dict[int, list[float]] = {n: [] for n in sizes}
    for _ in range(repeats):
        for n in sizes:
            with tempfile.TemporaryDirectory() as name:
                spent[n].append(1000 * stage(n, Path(name)) / n)
    return [median(spent[n]) for n in sizes]


def table(sizes: Sequence[int], figures: dict[str, list[float]]) -> str:
    """Markdown."""
    heads = " | ".join(f"{n:,} responses" for n in sizes)
    lines = [f"| ms a response | {heads} |", "|---|" + "---|" * len(sizes)]
    for stage, values in figures.items():
        cells = " | ".join(f"{value:.3f} ({value / values[0]:.2f})" for value in values)
        lines.append(f"| {stage} | {cells} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--responses", type=int, default=625, help="the fewest; 4 and 16 times as many follow")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    given = parser.parse_args(arguments)
    sizes = [given.responses * factor for factor in GROWTH]
    with service() if "polling" in given.stages else nullcontext():
        figures = {name: per_response(STAGES[name], sizes, given.repeats) for name in given.stages}
    print(table(sizes, figures))  # noqa: T201


if __name__ == "__main__":
    main()
