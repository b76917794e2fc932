"""What is killed under a real worker and a real server: all is measured in the end, and nothing is bought twice."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import FlowRunFilter

from tests import ROOT
from tests.process_worker import ProcessWorker, kill_group, started_worker, wait_for
from tests.programs import Process, SessionServer, Start, clean_environment, finish, free_port, started_server
from tests.vertex_world.fixtures import make_vertex_world
from tests.vertex_world.world import VertexWorld

__all__ = ["make_vertex_world"]

pytestmark = pytest.mark.slow

P, Q = "gemini-2.5-flash-lite", "gemini-2.5-flash"
MakeWorld = Callable[..., VertexWorld]


def settings(folder: Path, on_cancel: str = "leave") -> dict[str, Any]:
    backend = {"name": "vertex_batch", "poll_interval_s": 0.3, "output_deadline_s": 3, "on_cancel": on_cancel}
    return {"input_dir": str(folder / "in"), "output_dir": str(folder / "out"), "model2": Q, "backend": backend}


def write_input(world: VertexWorld, folder: Path, name: str) -> Path:
    """Responses that no other folder has: equal contexts would be answered by each other's jobs."""
    prompts = [f"{name} {number}" for number in range(2)]
    world.write_responses(folder / name / "in", P, prompts, n=1, max_tokens=6, seed=1)
    return folder / name


def assert_measured(folder: Path) -> int:
    tokens = pl.read_parquet(folder / "out" / "tokens.parquet")
    assert tokens["error"].null_count() == tokens.height
    return tokens.height


def assert_bought_once(world: VertexWorld, n_positions: int) -> None:
    probes = sum("Continue the row" in str(call.request) for call in world.online_calls)
    assert sum(world.rows_bought.values()) - probes <= n_positions
    assert world.rejected == []


def test_runs_that_are_cancelled_or_killed_under_a_worker_end_and_the_next_ones_go_on(
    make_vertex_world: MakeWorld, process_worker: ProcessWorker, tmp_path: Path
) -> None:
    world = make_vertex_world(job_seconds=3600.0)
    folders = {name: write_input(world, tmp_path, name) for name in ("cancelled", "left", "killed")}
    deployments = {
        name: process_worker.deploy(
            name, settings(folder, "cancel" if name == "cancelled" else "leave"), world.environment()
        )
        for name, folder in folders.items()
    }
    runs = {name: process_worker.start(deployment) for name, deployment in deployments.items()}
    wait_for(lambda: len(world.jobs) == 2 * len(folders), timeout_s=180)

    for name in ("cancelled", "left"):
        command = [sys.executable, "-m", "prefect", "flow-run", "cancel", str(runs[name])]
        environment = clean_environment(tmp_path / "home", PREFECT_API_URL=process_worker.api)
        subprocess.run(command, env=environment, check=True, capture_output=True, timeout=120)
    os.kill(process_worker.flow_process(runs["killed"]), signal.SIGKILL)

    assert {name: process_worker.wait(run).state.name for name, run in runs.items()} == {
        "cancelled": "Cancelled",
        "left": "Cancelled",
        "killed": "Crashed",
    }
    # Killed by nobody: it stopped at once, well within the time after which a worker would.
    for name, says in (("cancelled", "2 batch jobs were cancelled"), ("left", "2 batch jobs go on")):
        assert f"the run was stopped; {says}" in process_worker.log.read_text(), name
    # Its own process could say nothing any more: this is the hook, in another one.
    wait_for(lambda: "2 batch jobs go on and are charged" in process_worker.logs(runs["killed"]))
    cancelled = {job.display_name for job in world.jobs if job.cancelled.is_set()}
    assert cancelled == job_keys(folders["cancelled"])

    world.hurry()
    again = {name: process_worker.start(deployment) for name, deployment in deployments.items()}
    for run in again.values():
        state = process_worker.wait(run, timeout_s=180).state
        assert state.name == "Completed", state.message
    assert_bought_once(world, sum(assert_measured(folder) for folder in folders.values()))


def job_keys(folder: Path) -> set[str]:
    return {path.stem for path in (folder / "out" / "scores" / "jobs").glob("tokenkl-*.json")}


def test_a_run_whose_worker_was_stopped_is_taken_up_by_the_next_one(
    make_vertex_world: MakeWorld, process_worker: ProcessWorker, tmp_path: Path
) -> None:
    world = make_vertex_world(job_seconds=3600.0)
    folder = write_input(world, tmp_path, "stopped")
    environment = clean_environment(tmp_path / "home")
    with started_worker(process_worker.api, environment, tmp_path / "worker") as worker:
        run = worker.start(worker.deploy("stopped", settings(folder), world.environment()))
        wait_for(lambda: len(world.jobs) == 2, timeout_s=180)
        flow_process = worker.flow_process(run)
        os.kill(worker.process.pid, signal.SIGTERM)
        try:
            worker.process.wait(30)
        except subprocess.TimeoutExpired:
            # Under load Prefect's worker may miss its own signal. A supervisor then kills all that it started.
            kill_group(worker.process)
            with suppress(ProcessLookupError):
                os.kill(flow_process, signal.SIGKILL)
        wait_for(lambda: not is_alive(flow_process))
    world.hurry()
    again = process_worker.start(process_worker.deploy("again", settings(folder), world.environment()))
    state = process_worker.wait(again, timeout_s=180).state
    assert state.name == "Completed", state.message
    assert len(world.jobs) == 2
    assert_bought_once(world, assert_measured(folder))


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()


def test_runs_outlive_a_server_that_is_killed_whether_it_comes_back_or_not(
    make_vertex_world: MakeWorld, start_program: Start, tmp_path: Path
) -> None:
    def start(url: str, folder: Path, **more: str) -> Process:
        flags = ("--input-dir", folder / "in", "--output-dir", folder / "out", "--model2", Q)
        one_by_one = ("--responses-per-job", "1", "--set", "backend.max_jobs_in_flight=1")
        environment = {**world.environment(), **more, "PREFECT_API_URL": url}
        fast = ("--set", "backend.poll_interval_s=0.3")
        return start_program("flows.run", *flags, *one_by_one, *fast, env=environment, server=False)

    world = make_vertex_world(job_seconds=3600.0)
    patient, hasty = write_input(world, tmp_path, "outage"), write_input(world, tmp_path, "gone")
    home, port = tmp_path / "server", free_port()
    SessionServer().copy_new_database(home)
    with started_server(home, port) as server:
        runs = start(server.url, patient), start(server.url, hasty, PREFECT_CLIENT_MAX_RETRIES="1")
        wait_for(lambda: len(world.jobs) == 2 or any(run.poll() is not None for run in runs), timeout_s=180)
        kill_group(server.process)
    world.hurry()  # the second job of each is made, waited for and read while no server is there
    done = finish(runs[1])
    assert done.code == 0, done.err
    assert done.out.startswith("KL(P‖Q) per token")
    assert "it shows this run as running. The results above are whole." in done.err
    wait_for(lambda: len(world.jobs) == 4 and all(job.settled for job in world.jobs))
    with started_server(home, port) as server:
        done = finish(runs[0])
        assert done.code == 0, done.err
        with SyncPrefectClient(server.url) as client:
            states = [run.state_name for run in client.read_flow_runs(flow_run_filter=FlowRunFilter())]
    assert sorted(map(str, states)) == ["Completed", "Running"]
    assert (hasty / "out" / "history.parquet").exists()
    assert len(world.jobs) == 4
    assert_bought_once(world, assert_measured(patient) + assert_measured(hasty))


def test_a_program_whose_server_is_not_there_says_so_in_one_line(start_program: Start, tmp_path: Path) -> None:
    flags = ("--backend", "local", "--model2", "smollm2-135m@int4", "--output-dir", tmp_path / "out")
    url = f"http://127.0.0.1:{free_port()}/api"
    inputs = ("--input-dir", ROOT / "examples" / "responses")
    done = finish(start_program("flows.run", *flags, *inputs, env={"PREFECT_API_URL": url}, server=False))
    assert done.code == 1
    assert done.err.splitlines()[-1].startswith(f"error: the Prefect server {url} does not answer")
    assert "Traceback" not in done.err
