"""What runs on clusters are made of: settings, shares of limits, orders to workers, partitions."""

from __future__ import annotations

import pickle
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from backends.errors import BackendError, ConfigError
from flows.cluster.pulse import Order, PulseReader, RunPulse, dismiss_orphans, pulse_path
from flows.cluster.scoring import joined_reports, tasks_allowed
from flows.cluster.sessions import check_worker
from flows.cluster.tasks import portable
from flows.cluster.ticket import Ticket, check_installation, worker_config
from flows.config.models import RunConfig, build_config, resolve_backend
from flows.stages import passes as partitions
from flows.stages.inputs import InputFile, find_inputs
from flows.stages.passes import measure_files
from flows.stages.plan import Asker, make_plan, requests_of
from flows.stages.scoring import Stores
from kl.records import Candidate, Score
from tests import ROOT
from tests.vertex_world.world import VertexWorld

MODEL = "gemini-2.5-flash"


def config_of(folder: Path, **settings: Any) -> RunConfig:
    plain = {"input_dir": str(folder / "in"), "output_dir": str(folder / "out"), "model2": MODEL}
    return RunConfig.model_validate({**plain, "project_id": "a-project", **settings})


@pytest.mark.parametrize(
    ("file", "flags", "sets", "expected"),
    [
        ("", {"task_runner": {"kind": "dask"}}, ["task_runner.workers=3"], ("dask", None, 3, None)),
        ("task_runner: dask", {}, ["task_runner.threads_per_worker=8"], ("dask", None, None, 8)),
        ("task_runner: {kind: dask, address: 'tcp://h:1'}", {}, [], ("dask", "tcp://h:1", None, None)),
        ("task_runner: {kind: ray, workers: 2}", {}, ["task_runner.address=ray://h:1"], ("ray", "ray://h:1", 2, None)),
        ("task_runner: dask", {}, ["task_runner=threads"], ("threads", None, None, None)),
    ],
)
def test_the_task_runner_is_set_by_name_or_in_detail(file, flags, sets, expected, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(file)
    plain = {"input_dir": "in", "output_dir": "out", "model2": MODEL}
    runner = build_config(RunConfig, path, {**plain, **flags}, sets).task_runner
    assert (runner.kind, runner.address, runner.workers, runner.threads_per_worker) == expected


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("spark", "should be 'threads', 'dask' or 'ray'"),
        ({"kind": "threads", "workers": 2}, "kind threads has no address and no size"),
        ({"workers": 2}, "kind threads has no address and no size"),
        ({"kind": "ray", "threads_per_worker": 2}, "threads_per_worker is for dask workers"),
        ({"kind": "dask", "address": "tcp://h:1", "threads_per_worker": 2}, "threads_per_worker is for dask workers"),
        ({"kind": "dask", "adress": "tcp://h:1"}, "Did you mean 'address'?"),
    ],
)
def test_a_setting_that_would_be_ignored_is_refused(setting, words: str) -> None:
    flags = {"input_dir": "in", "output_dir": "out", "model2": MODEL, "task_runner": setting}
    with pytest.raises(ConfigError, match=words.replace("?", r"\?")):
        build_config(RunConfig, None, flags)


@pytest.mark.parametrize(("kind", "package"), [("dask", "prefect_dask"), ("ray", "prefect_ray")])
def test_a_missing_package_is_named_with_its_extra(kind: str, package: str) -> None:
    code = (
        f"import sys; sys.modules[{package!r}] = None\n"
        "from flows.cluster.runners import TaskRunnerConfig, check_installed\n"
        f"check_installed(TaskRunnerConfig(kind={kind!r}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert f"MissingDependencyError: task_runner {kind} needs" in done.stderr
    assert f"pip install 'tokenkl[{kind}]'" in done.stderr


def test_workers_are_told_everything_and_share_the_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GOOGLE_CLOUD_PROJECT", "here")
    monkeypatch.setenv("GOOGLE_CLOUD_LOCATION", "europe-north1")
    plain = {"input_dir": "in", "output_dir": "out", "model2": MODEL, "max_concurrent": 9}
    config = RunConfig.model_validate({**plain, "backend": {"name": "vertex_online", "retry_deadline_s": 7}})
    told = pickle.loads(pickle.dumps(worker_config(config, 4)))
    monkeypatch.setenv("GOOGLE_CLOUD_PROJECT", "there")
    monkeypatch.setenv("GOOGLE_CLOUD_LOCATION", "us-east1")
    options: Any = resolve_backend(told)[1]
    assert (options.project_id, options.location, options.retry_deadline_s) == ("here", "europe-north1", 7)
    assert options.max_concurrent == 2
    assert (told.input_dir, told.output_dir) == (tmp_path / "in", tmp_path / "out")
    batch: Any = resolve_backend(worker_config(config_of(tmp_path, backend={"max_jobs_in_flight": 3}), 5))[1]
    assert batch.max_jobs_in_flight == 1


@pytest.mark.parametrize(
    ("threads", "shares", "limit", "expected"),
    [
        ([4, 4], 2, 10, 16),  # each process keeps its share; one task waits behind each
        ([4, 4, 4], 2, 10, 2),  # one has joined: two of them may be at work
        ([1] * 8, 8, 3, 3),  # a share would be less than one call
        ([2, 2], 2, None, 8),
        ([], 2, 10, 0),
    ],
)
def test_no_more_is_under_way_than_the_limits_allow(threads, shares, limit, expected: int) -> None:
    assert tasks_allowed(threads, shares, limit) == expected


def test_reports_of_several_processes_become_one() -> None:
    first = {"bucket": "b", "calls": {"answered": 3, "fault": 1}, "jobs": [{"name": "1", "state": "RUNNING"}]}
    second = {
        "bucket": "b",
        "calls": {"answered": 4},
        "jobs": [{"name": "2", "state": "X"}, {"name": "1", "state": "Y"}],
    }
    assert joined_reports([first, second]) == {
        "bucket": "b",
        "calls": {"answered": 7, "fault": 1},
        "jobs": [{"name": "1", "state": "Y"}, {"name": "2", "state": "X"}],
    }


def test_orders_reach_a_worker_and_a_run_that_is_gone_ends_it(tmp_path: Path) -> None:
    order = Order.WORK
    with RunPulse(tmp_path, lambda: order) as pulse:
        ours, other = PulseReader(tmp_path, pulse.run_id), PulseReader(tmp_path, "of another run")
        assert (ours.look(), ours.ours) == (Order.WORK, True)
        assert (other.look(), other.ours) == (Order.FINISH, False)
        order = Order.INTERRUPT
        until = time.monotonic() + 60
        while ours.look() is not Order.INTERRUPT:
            assert time.monotonic() < until
            time.sleep(0.05)
    assert [ours.look(), ours.look()] == [Order.WORK, Order.FINISH], "one look may meet a file that is being replaced"
    assert not ours.ours


def test_a_pulse_that_a_killed_run_left_behind_is_taken_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flows.cluster.pulse._STOP_S", 0.0)
    with RunPulse(tmp_path, lambda: Order.WORK) as pulse:
        left = pulse_path(tmp_path).read_bytes()
    pulse_path(tmp_path).write_bytes(left)
    reader = PulseReader(tmp_path, pulse.run_id)
    assert reader.look() is Order.WORK
    dismiss_orphans(tmp_path)
    reader.look()
    assert reader.look() is Order.FINISH


def test_a_worker_with_another_installation_or_input_is_named(tmp_path: Path) -> None:
    path = tmp_path / "in" / "a.json"
    path.parent.mkdir()
    path.write_text("{}")
    ticket = Ticket("run", None, config_of(tmp_path), (InputFile(path, "a.json"), 2))
    check_installation(ticket)
    with pytest.raises(ConfigError, match=r"other versions: numpy .* \(the flow: 0\.1\)"):
        check_installation(Ticket("run", None, ticket.config, ticket.sample, {**ticket.versions, "numpy": "0.1"}))
    with pytest.raises(ConfigError, match=r"has 3 bytes, but the worker on .* sees 2 bytes"):
        check_installation(Ticket("run", None, ticket.config, (ticket.sample[0], 3)))


def test_a_worker_that_does_not_reach_the_server_is_named(tmp_path: Path) -> None:
    path = tmp_path / "in" / "a.json"
    path.parent.mkdir()
    path.write_text("{}")
    (tmp_path / "out").mkdir()
    with RunPulse(tmp_path / "out", lambda: Order.WORK) as pulse:
        ticket = Ticket(pulse.run_id, None, config_of(tmp_path), (InputFile(path, "a.json"), 2))
        with pytest.raises(ConfigError, match=r"does not reach the Prefect server at http://127.0.0.1:9/api \("):
            check_worker(ticket, "http://127.0.0.1:9/api")
    with pytest.raises(ConfigError, match=r"does not see the run's output folder"):
        check_worker(Ticket("another", None, config_of(tmp_path / "nowhere"), ticket.sample), "http://127.0.0.1:9/api")


class _Stubborn(BackendError):
    def __reduce__(self) -> tuple[Any, ...]:
        raise TypeError("cannot be sent")


def test_errors_keep_their_kind_between_processes() -> None:
    for error in (ConfigError("no rights"), OSError(28, "disk full", "/x"), BackendError("it broke", model="m")):
        again = pickle.loads(pickle.dumps(portable(error)))
        assert (type(again), str(again)) == (type(error), str(error))
    assert type(portable(_Stubborn("it broke"))).__name__ == "TokenKLError"


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """Eleven files, one of them not readable, with an answer of Q to most contexts."""
    folder = tmp_path_factory.mktemp("scored")
    with VertexWorld() as world:
        prompts = [f"Prompt {index}" for index in range(10)]
        world.write_responses(folder / "in", "gemini-2.5-flash-lite", prompts, n=2, max_tokens=7, seed=4)
    (folder / "in" / "broken.json").write_text("{")
    config = config_of(folder)
    backend, options, _ = resolve_backend(config)
    asker, stores = Asker(config, backend, options), Stores.of(config.output_dir)
    noise = np.random.default_rng(0)
    for group in make_plan(find_inputs(config), asker, stores.scores, {}).groups:
        for prompt_id, request in requests_of(group, asker):
            answers = [
                Score(key, tuple(Candidate(f" t{i}", float(-0.5 - i - noise.random()), i) for i in range(20)))
                for key in request.keys[:-1]
            ]
            stores.scores.append(prompt_id, request.model, answers)
    return config


@pytest.mark.parametrize("size", [1, 3, 7])
def test_the_size_of_the_parts_changes_no_bit(size: int, scored: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    scored = scored.model_copy(update={"force": True})  # the made-up answers are of other tokens
    backend, options, _ = resolve_backend(scored)
    asker, files = Asker(scored, backend, options), find_inputs(scored)
    whole = measure_files(files, asker, Stores.of(scored.output_dir))
    tables = [part.read_bytes() for part in whole.parts]
    monkeypatch.setattr(partitions, "FILES_PER_PART", size)
    divided = measure_files(files, asker, Stores.of(scored.output_dir))
    assert [part.name for part in divided.parts] == [part.name for part in whole.parts]
    assert [part.read_bytes() for part in divided.parts] == tables
    assert len(tables) == 10
    for field in ("files", "prior", "diagnostic", "responses", "samplings", "models_p", "versions_q", "repaired"):
        assert getattr(divided, field) == getattr(whole, field), field
