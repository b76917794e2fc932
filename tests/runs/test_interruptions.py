"""Runs that are killed, stopped or repeated: all is measured in the end, and nothing is bought twice."""

from __future__ import annotations

import os
import random
import signal
import time
from functools import partial
from pathlib import Path

import polars as pl
import pytest

from tests.process_worker import kill_group, wait_for
from tests.programs import Done, Process, Run, Start, finish
from tests.vertex_world.fixtures import make_vertex_world
from tests.vertex_world.testing import bought
from tests.vertex_world.world import VertexWorld

__all__ = ["make_vertex_world"]

pytestmark = pytest.mark.slow

P, Q = "gemini-2.5-flash-lite", "gemini-2.5-flash"


@pytest.fixture
def start(start_program: Start, tmp_path: Path) -> Start:
    """Start a run in its own process group; what is left of it is killed after the test."""

    def begin(world: VertexWorld, *arguments: object) -> Process:
        return start_program("flows.run", *flags(tmp_path), *arguments, env=world.environment())

    return begin


@pytest.fixture
def run(run_program: Run, tmp_path: Path) -> Run:
    """A run that nobody stops."""

    def to_the_end(world: VertexWorld, *arguments: object) -> Done:
        return run_program("flows.run", *flags(tmp_path), *arguments, env=world.environment())

    return to_the_end


def flags(folder: Path) -> tuple[object, ...]:
    return ("--input-dir", folder / "in", "--output-dir", folder / "out", "--model2", Q)


def _has_jobs(process: Process, world: VertexWorld, n: int) -> bool:
    return process.poll() is not None or len(world.jobs) >= n


def _has_calls(world: VertexWorld, n: int) -> bool:
    return len(world.online_calls) > n


def assert_complete(tmp_path: Path, n_positions: int) -> None:
    tokens = pl.read_parquet(tmp_path / "out" / "tokens.parquet")
    assert tokens.height == n_positions
    assert tokens["error"].null_count() == n_positions


def test_a_batch_run_killed_three_times_buys_nothing_twice(
    make_vertex_world, start: Start, run: Run, tmp_path: Path
) -> None:
    world = make_vertex_world(job_seconds=2.0)
    world.write_responses(tmp_path / "in", P, [f"Prompt {i}" for i in range(6)], n=1, max_tokens=20, seed=2)
    batch = ("--set", "backend.poll_interval_s=0.2")
    moments = random.Random(4)
    for kill in range(3):
        process = start(world, *batch)
        wait_for(partial(_has_jobs, process, world, 2 * kill))
        time.sleep(moments.uniform(0.0, 2.0))
        kill_group(process)
    done = run(world, *batch)
    assert done.code == 0, done.err
    n_positions = pl.read_parquet(tmp_path / "out" / "tokens.parquet").height
    assert_complete(tmp_path, n_positions)
    assert set(world.rows_bought.values()) <= {1, 2, 3, 4}  # the tiny request of each run is the only one repeated
    assert bought(world) <= n_positions
    before, jobs, began = sum(world.rows_bought.values()), len(world.jobs), time.monotonic()
    assert run(world, *batch).code == 0
    assert time.monotonic() - began < 20
    assert (sum(world.rows_bought.values()), len(world.jobs)) == (before, jobs)


def test_an_online_run_killed_twice_repeats_few_calls(
    make_vertex_world, start: Start, run: Run, tmp_path: Path
) -> None:
    world = make_vertex_world()
    world.faults.latency_s = 0.1
    world.write_responses(tmp_path / "in", P, [f"Prompt {i}" for i in range(12)], n=1, max_tokens=25, seed=2)
    online = ("--backend", "vertex_online", "--max-concurrent", "10")
    for share in (60, 140):
        process = start(world, *online)
        wait_for(partial(_has_calls, world, share))
        kill_group(process)
    done = run(world, *online)
    assert done.code == 0, done.err
    n_positions = pl.read_parquet(tmp_path / "out" / "tokens.parquet").height
    assert_complete(tmp_path, n_positions)
    assert bought(world) <= n_positions + 2 * 2 * 10, "a kill costs the calls in flight, here and there"
    assert world.max_online_in_flight <= 10


@pytest.mark.parametrize("on_cancel", ["leave", "cancel"])
def test_ctrl_c_ends_soon_and_says_how_to_go_on(
    on_cancel, make_vertex_world, start: Start, run: Run, tmp_path: Path
) -> None:
    world = make_vertex_world(job_seconds=3600.0)
    world.write_responses(tmp_path / "in", P, ["One", "Two"], n=1, max_tokens=10, seed=2)
    batch = ("--set", "backend.poll_interval_s=0.2", "--set", f"backend.on_cancel={on_cancel}")
    process = start(world, *batch)
    wait_for(lambda: len(world.jobs) == 2)
    time.sleep(0.5)
    began = time.monotonic()
    os.kill(process.pid, signal.SIGINT)
    done = finish(process)
    assert time.monotonic() - began < 20, "an hour before the jobs end"
    assert done.code == 130
    assert "Traceback" not in done.out + done.err
    assert "Go on with: python -m flows.run --input-dir" in done.err
    assert ("2 batch jobs go on" if on_cancel == "leave" else "2 batch jobs were cancelled") in done.err
    if on_cancel == "cancel":
        assert {job.state for job in world.wait_for_jobs()} == {"JOB_STATE_CANCELLED"}
    world.hurry()
    done = run(world, *batch)
    assert done.code == 0, done.err
    assert bought(world) == len({*world.rows_bought}) - 2  # the tiny requests that prove the model usable


def test_two_runs_at_once_do_not_share_a_folder(make_vertex_world, start: Start, run: Run, tmp_path: Path) -> None:
    world = make_vertex_world(job_seconds=3600.0)
    world.write_responses(tmp_path / "in", P, ["One"], n=1, max_tokens=5, seed=2)
    first = start(world, "--set", "backend.poll_interval_s=0.2")
    wait_for(lambda: len(world.jobs) == 1)
    second = run(world)
    assert second.code == 2
    assert "another run is using" in second.err
    world.hurry()
    assert finish(first).code == 0
