"""What runs on clusters are made of: settings, what travels, what workers must have, parts."""

from __future__ import annotations

import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from backends.errors import BackendError, ConfigError
from backends.extras import install_extra
from flows.cluster.workers import Needs, check_worker
from flows.config.comparison import Comparison
from flows.config.models import RunConfig
from flows.config.reading import build_config
from flows.config.templates import RunValues
from flows.stages import passes
from flows.stages.inputs import find_inputs
from flows.stages.passes import measure_files
from flows.stages.plan import make_plan, requests_of
from flows.stages.scorers import portable
from kl.records import Candidate, Score
from tests import ROOT
from tests.flows.parts import joined
from tests.vertex_world.world import VertexWorld

MODEL = "gemini-2.5-flash"
NO_SERVER = "http://127.0.0.1:9/api"


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
        "from flows.config.runner import TaskRunnerConfig\n"
        f"TaskRunnerConfig(kind={kind!r}).check_installed()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert f"MissingDependencyError: task_runner {kind} needs" in done.stderr
    assert install_extra(kind) in done.stderr


def test_a_comparison_travels_with_all_that_the_environment_said(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GOOGLE_CLOUD_PROJECT", "here")
    monkeypatch.setenv("GOOGLE_CLOUD_LOCATION", "europe-north1")
    plain = {"input_dir": "in", "output_dir": "out", "model2": MODEL}
    config = RunConfig.model_validate({**plain, "backend": {"name": "vertex_online", "retry_deadline_s": 7}})
    sent = pickle.dumps(Comparison.of(config, RunValues.of_a_dry_run()).made_absolute())
    monkeypatch.setenv("GOOGLE_CLOUD_PROJECT", "there")
    monkeypatch.setenv("GOOGLE_CLOUD_LOCATION", "us-east1")
    told = pickle.loads(sent)
    assert (told.options.project_id, told.options.location) == ("here", "europe-north1")
    assert told.options.retry_deadline_s == 7
    assert (told.config.input_dir, told.folder.path) == (tmp_path / "in", tmp_path / "out")


def test_a_worker_with_another_installation_or_disk_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("{}")
    needs = Needs(path, tmp_path)
    with pytest.raises(ConfigError, match=r"other versions: numpy .* \(the flow: 0\.1\)"):
        check_worker(replace(needs, versions={**needs.versions, "numpy": "0.1"}), NO_SERVER)
    with pytest.raises(ConfigError, match=r"does not see the run's input file .*b\.json"):
        check_worker(replace(needs, input_file=tmp_path / "b.json"), NO_SERVER)
    with pytest.raises(ConfigError, match=r"does not see the run's output folder .*nowhere"):
        check_worker(replace(needs, output_dir=tmp_path / "nowhere"), NO_SERVER)
    with pytest.raises(ConfigError, match=r"does not reach the Prefect server at http://127.0.0.1:9/api \("):
        check_worker(needs, NO_SERVER)


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
    comparison = Comparison.of(config, RunValues.of_a_dry_run())
    scores = comparison.folder.stores().scores
    noise = np.random.default_rng(0)
    for group in make_plan(find_inputs(config), comparison, scores, {}, 50).groups:
        for prompt_id, request in requests_of(group, comparison):
            answers = [
                Score(key, tuple(Candidate(f" t{i}", float(-0.5 - i - noise.random()), i) for i in range(20)))
                for key in request.keys[:-1]
            ]
            scores.append(prompt_id, request.model, answers)
    return config


@pytest.mark.parametrize("size", [1, 3, 7])
def test_the_size_of_the_parts_changes_no_bit(
    size: int, scored: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored = scored.model_copy(update={"force": True})  # the made-up answers are of other tokens
    comparison, files = Comparison.of(scored, RunValues.of_a_dry_run()), find_inputs(scored)
    whole = measure_files(files, comparison, comparison.folder.stores(), tmp_path / "whole")
    monkeypatch.setattr(passes, "PART_FILES", size)
    divided = measure_files(files, comparison, comparison.folder.stores(), tmp_path / "divided")
    assert (len(whole.parts), len(divided.parts)) == (1, -(-len(files) // size))
    assert joined(divided.parts) == joined(whole.parts)
    for field in ("files", "priors", "diagnostic", "responses", "samplings", "models_p", "versions_q", "repaired"):
        assert getattr(divided, field) == getattr(whole, field), field
