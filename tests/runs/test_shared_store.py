"""Two runs at the same moment, in two output folders with one store of scores: each context is bought once."""

from __future__ import annotations

import threading
from pathlib import Path

import polars as pl
import pytest

from tests.process_worker import kill_group, wait_for
from tests.programs import Done, Run, Start
from tests.vertex_world.fixtures import make_vertex_world
from tests.vertex_world.testing import bought

__all__ = ["make_vertex_world"]

pytestmark = pytest.mark.slow

P, Q = "gemini-2.5-flash-lite", "gemini-2.5-flash"
AT_ONCE = 5


def flags(folder: Path, name: str, *more: object) -> tuple[object, ...]:
    return ("--input-dir", folder / "in", "--output-dir", folder / name, "--model2", Q, *more)


def n_measured(folder: Path) -> int:
    tokens = pl.read_parquet(folder / "tokens.parquet")
    assert tokens["error"].null_count() == tokens.height
    return tokens.height


def test_a_run_waits_for_what_another_buys_and_takes_over_when_it_is_killed(
    make_vertex_world, start_program: Start, run_program: Run, tmp_path: Path
) -> None:
    world = make_vertex_world()
    world.faults.latency_s = 0.1
    world.write_responses(tmp_path / "in", P, [f"Prompt {i}" for i in range(8)], n=1, max_tokens=25, seed=2)
    store = tmp_path / "store"
    online = ("--scores-dir", store, "--backend", "vertex_online", "--max-concurrent", AT_ONCE)
    first = start_program("flows.run", *flags(tmp_path, "a", *online), env=world.environment())
    wait_for(lambda: len(world.online_calls) > 20)
    world.faults.latency_s = 15  # it gets no further until the other run has come

    before_kill: list[int] = []

    def kill_when_the_other_waits() -> None:
        wait_for(lambda: len(list((store / "members").glob("*/lock"))) == 2)
        before_kill.append(len(world.online_calls))
        kill_group(first)
        world.faults.latency_s = 0.0

    killer = threading.Thread(target=kill_when_the_other_waits)
    killer.start()
    done: Done = run_program("flows.run", *flags(tmp_path, "b", *online), env=world.environment())
    killer.join()
    assert done.code == 0, done.err
    assert "waiting for their answers" in done.err
    assert "a run that used" in done.err
    n_positions = n_measured(tmp_path / "b")
    assert before_kill[0] < n_positions, "the first run was at work until it was killed"
    assert bought(world) <= n_positions + AT_ONCE, "a kill costs the calls in flight"

    world.write_responses(tmp_path / "in", P, ["New 0", "New 1"], n=1, max_tokens=5, seed=2)
    batch = ("--scores-dir", store, "--set", "backend.poll_interval_s=0.2")
    submitted = run_program("flows.run", *flags(tmp_path, "c", *batch, "--stage", "submit"), env=world.environment())
    assert submitted.code == 0, submitted.err
    assert "10 to ask" in submitted.err
    jobs = len(world.jobs)
    fourth = run_program("flows.run", *flags(tmp_path, "d", *batch), env=world.environment())
    assert fourth.code == 0, fourth.err
    assert n_measured(tmp_path / "d") > 10
    assert (jobs, len(world.jobs)) == (2, 2), "a run takes in the jobs that another one made"
    assert list((store / "members").iterdir()) == []

    forgotten = run_program("flows.run", *flags(tmp_path, "c"), env=world.environment())
    assert forgotten.code != 0
    assert f"give --scores-dir {store} again" in forgotten.err
