"""Runs that an earlier version left, killed or finished: this version takes them up, and buys nothing again.

The output folders in ``earlier_runs/`` were written by commit 93cadd7, in which several processes could make the jobs
of a run. All were over the responses in ``earlier_runs/in``:

``vertex_online``
    Killed with -9 when it had asked one response of three and a part of the next.
``vertex_batch``
    Killed with -9 when one of four jobs was read, one was running, and two creations were under way. The input files of
    its jobs are in ``vertex_batch_bucket``.
``finished``
    Ended; two responses.
"""

from __future__ import annotations

import json
import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from kl import load_run
from tests.programs import Done, Run
from tests.vertex_world.fixtures import in_vertex_world, make_vertex_world, vertex_world
from tests.vertex_world.testing import genai_client
from tests.vertex_world.world import VertexWorld

__all__ = ["in_vertex_world", "make_vertex_world", "vertex_world"]

STORED = Path(__file__).parent / "earlier_runs"
BUCKET = "stand-in-project-kl-batch"
Q = "gemini-2.5-flash"
ONLINE = ("--backend", "vertex_online")
BATCH = ("--set", "backend.poll_interval_s=0.1")
N_TOKENS = 8  # of each response


@pytest.fixture
def run(run_program: Run):
    def over_the_same_responses(world: VertexWorld, output: Path, *arguments: object) -> Done:
        flags = ("--input-dir", STORED / "in", "--output-dir", output, "--model2", Q)
        return run_program("flows.run", *flags, *arguments, env=world.environment())

    return over_the_same_responses


def copy_of(name: str, folder: Path) -> Path:
    return Path(shutil.copytree(STORED / name, folder / name))


def in_parts(output: Path) -> int:
    return pl.read_parquet(output / "scores" / "*" / "*.parquet", columns=["key"]).height


def test_a_killed_online_run_asks_what_is_neither_in_its_parts_nor_in_its_journal(
    run, make_vertex_world, tmp_path: Path
) -> None:
    output, world = copy_of("vertex_online", tmp_path), make_vertex_world()
    (journal,) = output.glob("scores/journals/*.jsonl")
    n_stored = in_parts(output) + journal.read_bytes().count(b"\n")
    assert N_TOKENS < n_stored < 2 * N_TOKENS

    done = run(world, output, *ONLINE, "--max-files", "3")
    assert done.code == 0, done.err
    probes = sum("Continue the row" in str(call.request) for call in world.online_calls)
    assert len(world.rows_bought) - probes == 3 * N_TOKENS - n_stored
    assert set(world.rows_bought.values()) == {1}
    assert_as_of_a_run_in_one_go(run, make_vertex_world(), output, *ONLINE, "--max-files", "3")


def test_a_killed_batch_run_waits_for_its_jobs_and_makes_the_one_that_was_not_made(
    run, in_vertex_world: VertexWorld, make_vertex_world, tmp_path: Path
) -> None:
    output, world = copy_of("vertex_batch", tmp_path), in_vertex_world
    jobs = {entry["sequence"]: entry for entry in map(read_json, output.glob("scores/jobs/*.json"))}
    running, made_unheard, never_made, read = (jobs[number] for number in (1, 2, 3, 4))
    assert (read["ended"], in_parts(output)) == (True, N_TOKENS)
    assert running["job_name"]
    assert {made_unheard["maker"], never_made["maker"]} == {made_unheard["maker"]} != {None}
    # The service went on with two of them. It gives their resources names by chance; and it was a moment ago.
    world.objects.create_bucket(BUCKET)
    running["job_name"] = made_in(world, running)
    made_in(world, made_unheard)
    for entry in jobs.values():
        entry["recorded_at"] = datetime.now(UTC).isoformat(timespec="seconds")
        (output / "scores" / "jobs" / f"{entry['job_key']}.json").write_text(json.dumps(entry))

    done = run(world, output, *BATCH)
    assert done.code == 0, done.err
    made = [job.display_name for job in world.jobs]
    assert made == [entry["job_key"] for entry in (running, made_unheard, never_made)]
    assert sum(world.rows_bought.values()) == len(world.rows_bought) == 3 * N_TOKENS
    assert_as_of_a_run_in_one_go(run, make_vertex_world(), output, *BATCH)


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def made_in(world: VertexWorld, entry: dict[str, Any]) -> str | None:
    """Make the job of an entry as the killed run did; its resource name."""
    source = f"gs://{BUCKET}/{entry['input_path']}"
    world.objects.write(source, (STORED / "vertex_batch_bucket" / entry["input_path"]).read_bytes())
    settings = {"display_name": entry["job_key"], "dest": f"gs://{BUCKET}/{entry['output_prefix']}"}
    with genai_client(world) as client:
        return client.batches.create(model=Q, src=source, config=settings).name


def assert_as_of_a_run_in_one_go(run, world: VertexWorld, output: Path, *arguments: object) -> None:
    whole = output.with_name("whole")
    done = run(world, whole, *arguments)
    assert done.code == 0, done.err
    for name in ("tokens.parquet", "responses.parquet", "summary.json"):
        assert (output / name).read_bytes() == (whole / name).read_bytes(), name


def test_a_finished_run_is_analysed_and_measured_anew_without_asking(
    run, run_program: Run, vertex_world: VertexWorld, tmp_path: Path
) -> None:
    output = copy_of("finished", tmp_path)
    before = run_program("flows.analyze", output)
    assert before.code == 0, before.err
    assert "KL(P‖Q) per token" in before.out
    history = run_program("flows.analyze", "--history", output)
    assert history.code == 0, history.err
    assert load_run(output).candidates is None

    done = run(vertex_world, output, *ONLINE, "--max-files", "2")
    assert done.code == 0, done.err
    assert load_run(output).lists("prompt_000.json", 0, 0)["logprob_q"].drop_nulls().len() > 1
    assert "0 to ask" in done.err
    assert vertex_world.online_calls == []
    compared = run_program("flows.analyze", "--compare", STORED / "finished", output)
    assert compared.code == 0, compared.err
    assert f"over {2 * N_TOKENS} positions that both runs measured" in compared.out
