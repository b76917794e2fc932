"""Runs on real clusters: the results of threads, byte for byte, whatever dies; what costs money is asked here."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from distributed import Client

from tests import ROOT
from tests.backends.local import tiny_llama as tiny
from tests.process_worker import ProcessWorker, wait_for
from tests.programs import Run, Start, clean_environment, finish
from tests.vertex_world.fixtures import make_vertex_world
from tests.vertex_world.world import VertexWorld

__all__ = ["make_vertex_world"]

pytestmark = pytest.mark.slow

P, Q = "gemini-2.5-flash-lite", "gemini-2.5-flash"
PROMPTS = [f"What do you know about the number {number}?" for number in range(70)]  # three parts to measure
BATCH = ("--set", "backend.poll_interval_s=0.2", "--responses-per-job", "7")
N_JOBS = 10
INCOMPLETE = 3  # two of the responses are empty


class DaskProcesses:
    """A scheduler and workers, each a process of its own, as an administrator starts them."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self._folder = folder
        self._environment = environment
        self._started: list[subprocess.Popen[bytes]] = []
        file = folder / "scheduler.json"
        self._start("scheduler", "--host", "127.0.0.1", "--port", "0", "--scheduler-file", file)
        wait_for(lambda: file.exists() and file.stat().st_size)
        self.address = json.loads(file.read_text())["address"]

    def worker(self, *arguments: object, cwd: Path = ROOT) -> subprocess.Popen[bytes]:
        """One worker process with two threads."""
        flags = ("--no-nanny", "--nthreads", "2", "--local-directory", self._folder)
        return self._start("worker", self.address, *flags, *arguments, cwd=cwd)

    def _start(self, program: str, *arguments: object, cwd: Path = ROOT) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "dask", program, "--no-dashboard", *map(str, arguments)]
        log = (self._folder / f"{program}-{len(self._started)}.log").open("wb")
        environment = self._environment | {"PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(command, env=environment, cwd=cwd, stdout=log, stderr=log)
        log.close()
        self._started.append(process)
        return process

    def log(self) -> str:
        return "".join(path.read_text() for path in sorted(self._folder.glob("*.log")))

    def stop(self) -> None:
        for process in self._started:
            process.kill()
            process.wait()


@pytest.fixture
def make_dask(tmp_path: Path) -> Iterator[Callable[[], DaskProcesses]]:
    started: list[DaskProcesses] = []

    def make() -> DaskProcesses:
        folder = tmp_path / f"dask-{len(started)}"
        folder.mkdir()
        cluster = DaskProcesses(folder, clean_environment(tmp_path / "worker-home"))
        started.append(cluster)
        return cluster

    yield make
    for cluster in started:
        cluster.stop()


def results(folder: Path) -> dict[str, bytes]:
    """Every result file but the record of the run, which has its times."""
    paths = [folder / name for name in ("tokens.parquet", "candidates.parquet", "responses.parquet", "summary.json")]
    return {path.name: path.read_bytes() for path in [*paths, *sorted(folder.glob("*_kl.json"))]}


def repeated(world: VertexWorld) -> int:
    """Rows and calls that were answered again, without the two tiny requests that prove the model usable."""
    probes = sum(1 for call in world.online_calls if "Continue the row" in str(call.request) and call.status == 200)
    counts = world.rows_bought
    return sum(counts.values()) - len(counts) - max(probes - 2, 0)


@dataclass(frozen=True)
class Reference:
    """Responses, and what a run in threads makes of them."""

    inputs: Path
    results: dict[str, bytes]
    spent: object


@pytest.fixture(scope="module")
def reference(run_program: Run, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    folder = tmp_path_factory.mktemp("threads")
    with VertexWorld() as world:
        world.write_responses(folder / "in", P, PROMPTS, n=1, max_tokens=4, seed=2)
        done = run_program("flows.run", *flags(folder / "in", folder / "out"), *BATCH, env=world.environment())
    assert done.code == INCOMPLETE, done.err
    record = json.loads((folder / "out" / "run.json").read_text())
    return Reference(folder / "in", results(folder / "out"), record["spent"])


def flags(inputs: Path, output: Path) -> tuple[object, ...]:
    return ("--input-dir", inputs, "--output-dir", output, "--model2", Q)


def on_dask(cluster: DaskProcesses) -> tuple[str, ...]:
    return ("--task-runner", "dask", "--set", f"task_runner.address={cluster.address}")


def test_a_deployed_run_asks_by_itself_and_outlives_a_worker_that_measures(
    reference: Reference, make_vertex_world, make_dask, process_worker: ProcessWorker, tmp_path: Path
) -> None:
    world = make_vertex_world(job_seconds=1.0)
    cluster = make_dask()  # its workers know nothing of the service and have no credentials for it
    doomed, _ = cluster.worker(), cluster.worker()
    config = {
        "input_dir": str(reference.inputs),
        "output_dir": str(tmp_path / "out"),
        "model2": Q,
        "responses_per_job": 7,
        "backend": {"name": "vertex_batch", "poll_interval_s": 0.2},
        "task_runner": {"kind": "dask", "address": cluster.address},
    }
    run_id = process_worker.start(process_worker.deploy("on-dask", config, world.environment()))
    wait_for(lambda: len(world.jobs) == N_JOBS and all(job.end_time for job in world.jobs))
    doomed.kill()
    run = process_worker.wait(run_id, timeout_s=200)
    log = process_worker.logs(run_id)
    assert run.state is not None
    assert run.state.is_completed(), log + cluster.log()
    assert repeated(world) == 0
    assert len(world.jobs) == N_JOBS
    assert results(tmp_path / "out") == reference.results
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["spent"] == reference.spent


@dataclass(frozen=True)
class LocalPair:
    """A tiny model's responses, another tiny model, and what a run in threads makes of them."""

    inputs: Path
    model2: Path
    results: dict[str, bytes]

    def flags(self, output: Path) -> tuple[object, ...]:
        files = ("--input-dir", self.inputs, "--output-dir", output, "--model2", self.model2)
        return (*files, "--backend", "local", "--top-logprobs", "full", "--set", "noise_floor.fraction=0.2")


@pytest.fixture(scope="module")
def local_pair(run_program: Run, tmp_path_factory: pytest.TempPathFactory) -> LocalPair:
    folder = tmp_path_factory.mktemp("local")
    p, other = tiny.random_weights(seed=0), tiny.random_weights(seed=1)
    q = {name: weights + 0.05 * other[name] for name, weights in p.items()}
    models = [tiny.write(folder / f"{name}.gguf", weights, tiny.metadata()) for name, weights in (("p", p), ("q", q))]
    settings = {
        "backend": "local",
        "model1": str(models[0]),
        "output_dir": str(folder / "in"),
        "prompts": [f"the {number}" for number in range(40)],  # two parts to measure
        "sampling": {"max_tokens": 12},
    }
    (folder / "sample.yaml").write_text(json.dumps(settings))
    assert run_program("flows.sample", "--config", folder / "sample.yaml").code == 0
    pair = LocalPair(folder / "in", models[1], {})
    assert run_program("flows.run", *pair.flags(folder / "out")).code == 0
    floor = json.loads((folder / "out" / "summary.json").read_text())["noise_floor"]
    assert (floor["n_measured"], floor["kl_per_token"]["n_clusters"], floor["of"]) == (floor["n_drawn"], 40, "p")
    return LocalPair(folder / "in", models[1], results(folder / "out"))


def test_a_model_that_computes_is_asked_on_the_workers_and_one_that_dies_costs_nothing(
    local_pair: LocalPair, make_dask, start_program: Start, run_program: Run, tmp_path: Path
) -> None:
    cluster = make_dask()
    doomed, _ = cluster.worker(), cluster.worker()
    run = start_program("flows.run", *local_pair.flags(tmp_path / "out"), *on_dask(cluster))
    wait_for(lambda: list((tmp_path / "out" / "scores").glob("*/*.parquet")) or run.poll() is not None)
    doomed.kill()
    done = finish(run)
    assert done.code == 0, done.err + cluster.log()
    assert results(tmp_path / "out") == local_pair.results
    assert "contexts scored: " in done.err
    again = run_program("flows.run", *local_pair.flags(tmp_path / "out"))
    assert "0 to ask" in again.err, "what came home is in the store"
    with Client(cluster.address, set_as_default=False) as client:
        (threads,) = client.run(eval, "[thread.name for thread in __import__('threading').enumerate()]").values()
    assert not {"backend-loop", "backend-call"} & set(threads), "the worker that is left holds nothing"


@pytest.mark.skipif(not os.environ.get("TOKENKL_TEST_RAY"), reason="set TOKENKL_TEST_RAY=1; it takes a minute or two")
def test_a_run_on_ray_outlives_a_worker(local_pair: LocalPair, start_program: Start, tmp_path: Path) -> None:
    size = ("--task-runner", "ray", "--set", "task_runner.workers=2")
    run = start_program("flows.run", *local_pair.flags(tmp_path / "out"), *size)
    wait_for(lambda: list((tmp_path / "out" / "scores").glob("*/*.parquet")) or run.poll() is not None)
    os.kill(next(ray_workers(run.pid)), signal.SIGKILL)
    done = finish(run)
    assert done.code == 0, done.err
    assert results(tmp_path / "out") == local_pair.results


def ray_workers(session: int) -> Iterator[int]:
    """The processes of a run that work on a task."""
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if (
                process.joinpath("cmdline").read_bytes().startswith(b"ray::score")
                and os.getsid(int(process.name)) == session
            ):
                yield int(process.name)


def test_ctrl_c_ends_a_run_with_workers_of_its_own(
    local_pair: LocalPair, start_program: Start, run_program: Run, tmp_path: Path
) -> None:
    """A terminal sends it to the whole process group: to the workers of this machine, and to the temporary server."""
    size = ("--task-runner", "dask", "--set", "task_runner.workers=2", "--set", "task_runner.threads_per_worker=1")
    run = start_program("flows.run", *local_pair.flags(tmp_path / "out"), *size, server=False)
    wait_for(lambda: list((tmp_path / "out" / "scores").glob("*/*.parquet")) or run.poll() is not None)
    os.killpg(run.pid, signal.SIGINT)
    done = finish(run)
    assert done.code == 130, done.err
    assert "Traceback" not in done.out + done.err
    assert "Go on with: python -m flows.run --input-dir" in done.err
    again = run_program("flows.run", *local_pair.flags(tmp_path / "out"))
    assert again.code == 0, again.err
    assert results(tmp_path / "out") == local_pair.results


def test_workers_that_do_not_see_the_folders_are_refused_before_anything_is_bought(
    reference: Reference, make_vertex_world, make_dask, start_program: Start, tmp_path: Path
) -> None:
    world = make_vertex_world()
    cluster = make_dask()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    cluster.worker(cwd=elsewhere)
    # The working directory by a name that means another folder to every process, as a disk of one's own does.
    out = Path("/proc/self/cwd") / os.path.relpath(tmp_path, ROOT) / "out"
    arguments = (*flags(reference.inputs, out), *on_dask(cluster))
    done = finish(start_program("flows.run", *arguments, env=world.environment()))
    assert done.code == 2, done.err + cluster.log()
    assert "does not see the run's output folder" in done.err.strip().splitlines()[-1], done.err
    assert "Traceback" not in done.err
    assert (world.jobs, world.rows_bought) == ([], {})
