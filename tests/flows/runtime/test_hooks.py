"""What the hooks do with jobs of a run that ended in the middle; they know only the flow, the run and its state."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
from prefect.client.schemas.objects import FlowRun
from prefect.settings import PREFECT_LOGGING_TO_API_ENABLED, temporary_settings
from prefect.states import Cancelling, Crashed, Failed

from backends.base import ScoreRequest
from backends.vertex.jobs.ledger import JobLedger
from flows.config.comparison import Comparison
from flows.config.models import RunConfig
from flows.config.templates import RunValues
from flows.folder.layout import OutputFolder
from flows.folder.lock import run_lock
from flows.run import kl_divergence
from flows.runtime.hooks import settle_jobs
from flows.stages.inputs import find_inputs
from flows.stages.plan import make_plan, requests_of
from tests.vertex_world.fixtures import make_vertex_world
from tests.vertex_world.world import VertexWorld

__all__ = ["make_vertex_world"]

P, Q = "gemini-2.5-flash-lite", "gemini-2.5-flash"


@pytest.fixture
def world(make_vertex_world: Callable[..., VertexWorld], monkeypatch: pytest.MonkeyPatch) -> Iterator[VertexWorld]:
    world = make_vertex_world(job_seconds=3600.0)
    for name, value in world.environment().items():
        monkeypatch.setenv(name, value)
    with temporary_settings({PREFECT_LOGGING_TO_API_ENABLED: False}):
        yield world


def parameters(folder: Path, out: str = "out", **settings: Any) -> dict[str, Any]:
    """As Prefect has them of a run: plain values."""
    on_cancel = settings.pop("on_cancel", "cancel")
    return {
        "config": {
            "input_dir": str(folder / "in"),
            "output_dir": str(folder / out),
            "model2": Q,
            "backend": {"name": "vertex_batch", "on_cancel": on_cancel},
            **settings,
        }
    }


def run_of(values: dict[str, Any], run_id: UUID | None = None) -> FlowRun:
    scheduled = datetime(2026, 11, 7, 2, tzinfo=UTC)
    return FlowRun(
        id=run_id or uuid4(), flow_id=uuid4(), name="some-run", parameters=values, expected_start_time=scheduled
    )


def make_jobs(world: VertexWorld, folder: Path, out: str, run_id: UUID) -> None:
    """A job in the records of an output folder, as a run with this id that was killed leaves it."""
    world.write_responses(folder / "in", P, ["One"], n=1, max_tokens=5, seed=4)
    config = RunConfig.model_validate(parameters(folder, out)["config"])
    comparison = Comparison.of(config, RunValues.of_a_dry_run())
    plan = make_plan(find_inputs(config), comparison, comparison.folder.stores().scores, {}, 50)
    requests: list[ScoreRequest] = [request for group in plan.groups for _, request in requests_of(group, comparison)]

    async def submit() -> None:
        async with comparison.build_backend(str(run_id)) as backend:
            assert [result async for result in backend.submit(requests)]

    asyncio.run(submit())


def states(world: VertexWorld) -> list[bool]:
    """Whether each job was cancelled."""
    return [job.cancelled.is_set() for job in world.jobs]


@pytest.mark.parametrize("state", [Cancelling(), Crashed(), Failed()], ids=lambda state: state.name)
def test_a_hook_cancels_the_jobs_of_its_run_and_a_second_call_does_nothing(
    state: Any, world: VertexWorld, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = run_of(parameters(tmp_path))
    make_jobs(world, tmp_path, "out", run.id)
    with caplog.at_level(logging.INFO, logger="prefect.flow_runs"):
        settle_jobs(kl_divergence, run_of(parameters(tmp_path)), state)
        assert states(world) == [False], "another run's"
        settle_jobs(kl_divergence, run, state)
        settle_jobs(kl_divergence, run, state)
    assert states(world) == [True]
    assert caplog.text.count("1 batch jobs were cancelled") == 1
    assert "could not be cancelled" not in caplog.text


def test_a_hook_that_leaves_the_jobs_says_which(
    world: VertexWorld, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = run_of(parameters(tmp_path, on_cancel="leave"))
    make_jobs(world, tmp_path, "out", run.id)
    settle_jobs(kl_divergence, run, Crashed())
    assert states(world) == [False]
    assert "1 batch jobs go on and are charged; the same command, run again, takes in what they answer: " in caplog.text
    assert job_name(tmp_path / "out") in caplog.text


def job_name(output_dir: Path) -> str:
    (entry,) = JobLedger(output_dir / "scores" / "jobs").entries()
    assert entry.job_name is not None
    return entry.job_name


def test_jobs_that_another_run_uses_are_left_to_it(
    world: VertexWorld, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = run_of(parameters(tmp_path))
    make_jobs(world, tmp_path, "out", run.id)
    with caplog.at_level(logging.INFO, logger="prefect.flow_runs"), run_lock(OutputFolder(tmp_path / "out")):
        settle_jobs(kl_divergence, run, Crashed())
    assert states(world) == [False]
    assert "left to the run that uses them now" in caplog.text


def test_a_collect_leaves_all_jobs_for_it_waits_for_none(world: VertexWorld, tmp_path: Path) -> None:
    run = run_of(parameters(tmp_path, stage="collect"))
    make_jobs(world, tmp_path, "out", run.id)
    settle_jobs(kl_divergence, run, Cancelling())
    assert states(world) == [False]


def test_the_folder_is_that_of_the_run_and_not_of_today(world: VertexWorld, tmp_path: Path) -> None:
    run = run_of(parameters(tmp_path, "results/{date}/{flow_run_name}"))
    make_jobs(world, tmp_path, "results/2026-11-07/some-run", run.id)
    settle_jobs(kl_divergence, run, Crashed())
    assert states(world) == [True]


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"config": 3},
        {"config": {"output_dir": "x"}},
        {"config": {"input_dir": "in", "output_dir": "o", "model2": "m"}},
    ],
    ids=["none", "no settings", "invalid", "nothing made"],
)
def test_a_run_that_made_nothing_is_settled_without_a_word(
    values: dict[str, Any], world: VertexWorld, caplog: pytest.LogCaptureFixture, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    settle_jobs(kl_divergence, run_of(values), Failed())
    assert caplog.text == ""
    assert list(tmp_path.iterdir()) == []
    assert world.requests == []


def test_a_service_that_refuses_is_one_line(
    world: VertexWorld, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of(parameters(tmp_path))
    make_jobs(world, tmp_path, "out", run.id)
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "gone.json"))
    settle_jobs(kl_divergence, run, Crashed())
    (line,) = (record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING)
    assert line.startswith("the batch jobs of this run were left as they are: ")
    assert states(world) == [False]


def test_the_hooks_stand_on_every_end_in_the_middle() -> None:
    for hooks in (kl_divergence.on_cancellation_hooks, kl_divergence.on_crashed_hooks, kl_divergence.on_failure_hooks):
        assert hooks == [settle_jobs]
