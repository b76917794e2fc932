"""Batch jobs that nobody waits for: made in one process, looked at in others, each row bought once."""

from __future__ import annotations

import asyncio
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest

from backends.base import ScoreRequest
from backends.vertex.batch import VertexBatchBackend, VertexBatchOptions
from backends.vertex.jobs.ledger import JobLedger
from kl.records import Response, Score, ScoreFailure
from tests.backends.conftest import Results, distinct, request_for, score_all
from tests.documents import ROOT
from tests.vertex_world.world import VertexWorld

Call = Literal["score", "submit", "collect"]
Ask = Callable[..., Results]


def options(**settings: Any) -> VertexBatchOptions:
    fast = {"project_id": "stand-in-project", "poll_interval_s": 0.05, "output_deadline_s": 3.0}
    return VertexBatchOptions(**(fast | settings))


def requests_for(responses: Sequence[Response]) -> list[ScoreRequest]:
    return distinct([request_for(response, VertexBatchBackend, options()) for response in responses])


@pytest.fixture
def ask(tmp_path: Path) -> Ask:
    """One call of a fresh backend, as one run makes it, over one folder; each response is a group."""

    def call(
        what: Call, responses: Sequence[Response], run_id: str | None = None, state: str = "state", **settings: Any
    ) -> Results:
        backend = VertexBatchBackend(options(**settings), tmp_path / state)
        backend.run_id = run_id

        async def one(request: ScoreRequest) -> list[Score | ScoreFailure]:
            found = [result async for result in getattr(backend, what)([request])]
            assert sorted(result.key for result in found) == sorted(request.keys)
            return found

        async def work() -> Results:
            async with backend:
                groups = await asyncio.gather(*(one(request) for request in requests_for(responses)))
            return {result.key: result for group in groups for result in group}

        return asyncio.run(work())

    return call


def reasons(results: Results) -> Counter[str]:
    return Counter(result.reason if isinstance(result, ScoreFailure) else "scored" for result in results.values())


def world_for_here(make_vertex_world: Callable[..., VertexWorld], monkeypatch: pytest.MonkeyPatch, **settings: Any):
    world = make_vertex_world(**settings)
    for name, value in world.environment().items():
        monkeypatch.setenv(name, value)
    return world


def collected(ask: Ask, world: VertexWorld, responses: Sequence[Response], **settings: Any) -> Results:
    """Collect until nothing waits any more."""
    for _ in range(20):
        world.wait_for_jobs()
        results = ask("collect", responses, **settings)
        if "waiting" not in reasons(results):
            return results
    raise AssertionError("it waits for ever")


def test_a_submission_waits_for_nothing_and_a_collect_looks_once(
    make_vertex_world, responses, ask: Ask, monkeypatch
) -> None:
    world = world_for_here(make_vertex_world, monkeypatch, job_seconds=3.0)
    asked = responses(prompts=2, n=1)
    assert set(reasons(ask("collect", asked))) == {"not-submitted"}
    assert world.jobs == []
    assert set(reasons(ask("submit", asked))) == {"waiting"}
    assert {job.state for job in world.jobs} <= {"JOB_STATE_PENDING", "JOB_STATE_RUNNING"}
    waiting = ask("collect", asked)
    assert set(reasons(waiting)) == {"waiting"}
    assert all(result.final is False for result in waiting.values())
    assert set(reasons(ask("submit", asked))) == {"waiting"}
    found = collected(ask, world, asked)
    assert set(reasons(found)) == {"scored"}
    assert found == ask("score", asked)
    assert len(world.jobs) == 2
    assert set(world.rows_bought.values()) == {1}


def test_what_jobs_left_out_goes_into_follow_up_jobs_that_a_later_collect_reads(
    in_vertex_world, responses, ask: Ask
) -> None:
    in_vertex_world.faults.job_outcomes = [("EXPIRED", 0.5), "FAILED"]
    asked = responses(prompts=2, n=1)
    ask("submit", asked)
    in_vertex_world.wait_for_jobs()
    first = reasons(ask("collect", asked))
    assert first["scored"]
    assert first["waiting"]
    assert first.total() == first["scored"] + first["waiting"]
    assert set(reasons(collected(ask, in_vertex_world, asked))) == {"scored"}
    assert len(in_vertex_world.jobs) == 4
    assert set(in_vertex_world.rows_bought.values()) == {1}


def test_follow_ups_are_bounded_over_all_runs_and_a_new_submission_is_one_more_try(
    in_vertex_world, responses, ask: Ask
) -> None:
    in_vertex_world.faults.failing_rate = 0.2
    asked = responses(prompts=1, n=1)
    ask("submit", asked)
    found = collected(ask, in_vertex_world, asked, max_attempts=3)
    assert set(reasons(found)) == {"scored", "row-error"}
    assert len(in_vertex_world.jobs) == 3
    # What was answered is in the store of a run; here it is asked again, and read again in the job that had it.
    assert reasons(ask("collect", asked, max_attempts=3))["row-error"] == reasons(found)["row-error"]
    assert len(in_vertex_world.jobs) == 3
    ask("submit", asked, max_attempts=3)
    assert "row-error" in reasons(collected(ask, in_vertex_world, asked, max_attempts=3))
    assert len(in_vertex_world.jobs) == 4
    assert set(in_vertex_world.rows_bought.values()) == {1}


def test_a_service_that_does_not_answer_is_no_end_of_the_wait(in_vertex_world, responses, ask: Ask) -> None:
    asked = responses(prompts=1, n=1)
    ask("submit", asked)
    in_vertex_world.faults.http = {"list": {"503": 1.0}}
    assert set(reasons(ask("collect", asked, retry_deadline_s=0.5))) == {"waiting"}
    in_vertex_world.faults.http = {}
    assert set(reasons(collected(ask, in_vertex_world, asked))) == {"scored"}


@pytest.mark.parametrize("outcome", ["NEVER", "JOB_STATE_FROBNICATED"])
def test_the_wait_for_a_job_ends_at_its_deadline_whoever_looks(
    outcome, in_vertex_world, responses, ask: Ask, tmp_path: Path
) -> None:
    in_vertex_world.faults.job_outcomes = [outcome]
    asked = responses(prompts=1, n=1)
    ask("submit", asked)
    assert set(reasons(ask("collect", asked))) == {"waiting"}
    (record,) = (tmp_path / "state" / "jobs").glob("tokenkl-*.json")
    record.write_text(json.dumps(json.loads(record.read_text()) | {"recorded_at": "2026-01-01T00:00:00+00:00"}))
    assert set(reasons(ask("collect", asked))) == {"deadline" if outcome == "NEVER" else "unknown-state"}
    assert len(in_vertex_world.jobs) == 1


def test_a_day_whose_quota_is_used_up_is_waited_for(in_vertex_world, responses, ask: Ask) -> None:
    in_vertex_world.faults.logprobs_daily_quota = 4
    asked = responses(prompts=1, n=1)
    ask("submit", asked)
    in_vertex_world.wait_for_jobs()
    found = reasons(ask("collect", asked))
    assert (found["scored"], set(found)) == (4, {"scored", "waiting"})
    assert len(in_vertex_world.jobs) == 1
    in_vertex_world.faults.logprobs_daily_quota = None
    assert set(reasons(collected(ask, in_vertex_world, asked))) == {"scored"}
    assert set(in_vertex_world.rows_bought.values()) == {1}


def test_a_run_on_the_day_after_a_used_up_quota_goes_on(in_vertex_world, responses, ask: Ask) -> None:
    in_vertex_world.faults.logprobs_daily_quota = 4
    asked = responses(prompts=1, n=1)
    assert set(reasons(ask("score", asked))) == {"scored", "daily-quota"}
    in_vertex_world.faults.logprobs_daily_quota = None
    assert set(reasons(ask("score", asked))) == {"scored"}
    assert set(in_vertex_world.rows_bought.values()) == {1}


def test_jobs_of_a_lost_folder_are_found_by_name(in_vertex_world, responses, ask: Ask) -> None:
    asked = responses(prompts=2, n=1)
    ask("submit", asked)
    in_vertex_world.wait_for_jobs()
    assert set(reasons(ask("collect", asked, state="another"))) == {"scored"}
    assert len(in_vertex_world.jobs) == 2


def test_a_submission_killed_before_its_job_was_made_is_no_submission(
    in_vertex_world, responses, ask: Ask, tmp_path: Path
) -> None:
    asked = responses(prompts=1, n=1)
    backend = VertexBatchBackend(options(), tmp_path / "state")
    ledger = JobLedger(tmp_path / "state" / "jobs")
    ledger.update(ledger.next_entry(backend._place, requests_for(asked)[0].keys, "killed"))
    assert set(reasons(ask("collect", asked))) == {"not-submitted"}
    assert set(reasons(ask("submit", asked))) == {"waiting"}
    assert set(reasons(collected(ask, in_vertex_world, asked))) == {"scored"}
    assert len(in_vertex_world.jobs) == 1


@pytest.mark.parametrize("on_cancel", ["leave", "cancel"])
def test_the_jobs_of_an_abandoned_run_are_settled_from_the_record_and_no_others(
    on_cancel, make_vertex_world, responses, ask: Ask, monkeypatch, tmp_path: Path
) -> None:
    world = world_for_here(make_vertex_world, monkeypatch, job_seconds=20.0)
    mine, other = responses(prompts=2, n=1)
    ask("submit", [mine], run_id="mine")
    ask("submit", [other], run_id="other")

    async def settle(run_id: str) -> str | None:
        async with VertexBatchBackend(options(on_cancel=on_cancel), tmp_path / "state") as backend:
            return await backend.abandoned(run_id)

    line = asyncio.run(settle("mine"))
    assert world.jobs[0].id in line
    assert world.jobs[1].id not in line
    again, nobodys = asyncio.run(settle("mine")), asyncio.run(settle("nobody"))
    assert nobodys is None
    if on_cancel == "leave":
        assert "1 batch jobs go on" in line
        assert again == line
        assert not any(job.cancelled.is_set() for job in world.jobs)
    else:
        assert "1 batch jobs were cancelled" in line
        assert again is None
        assert [job.cancelled.is_set() for job in world.jobs] == [True, False]


# Imports once, and then is forked for each run that is killed.
RUNS = """
import asyncio, json, os, pickle, sys
from pathlib import Path
from backends.vertex.batch import VertexBatchBackend, VertexBatchOptions
async def score(folder, requests):
    options = VertexBatchOptions(project_id="stand-in-project", poll_interval_s=0.05)
    async with VertexBatchBackend(options, folder) as backend:
        async for result in backend.score(requests): pass
for line in sys.stdin:
    folder, requests, environment = json.loads(line)
    pid = os.fork()
    if not pid:
        os.environ.update(environment)
        asyncio.run(score(Path(folder), pickle.loads(Path(requests).read_bytes())))
        os._exit(0)
    print(pid, flush=True)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # its number stays taken
    print("gone", flush=True)
"""


@pytest.fixture(scope="module")
def start_run() -> Iterator[Callable[[Path, Path, VertexWorld], Callable[[], None]]]:
    """Start a run over a folder for pickled requests in a process of its own; returns how to kill it."""
    command = [sys.executable, "-c", RUNS]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:

        def start(state: Path, requests: Path, world: VertexWorld) -> Callable[[], None]:
            process.stdin.write(json.dumps([str(state), str(requests), world.environment()]) + "\n")
            process.stdin.flush()
            pid = int(process.stdout.readline())

            def kill() -> None:
                os.kill(pid, signal.SIGKILL)
                assert process.stdout.readline() == "gone\n"

            return kill

        yield start
        process.stdin.close()


STEPS: dict[str, Callable[[VertexWorld, Path], bool]] = {
    "recorded": lambda world, state: any((state / "jobs").glob("tokenkl-*.json")),
    "uploading": lambda world, state: any("/upload/" in line.path for line in world.requests),
    "making": lambda world, state: any(line.path.endswith("/batchPredictionJobs") for line in world.requests),
    "made": lambda world, state: bool(world.jobs),
    "name recorded": lambda world, state: any(
        '"job_name": "' in path.read_text() for path in (state / "jobs").glob("tokenkl-*.json")
    ),
    "ended": lambda world, state: any(job.settled for job in world.jobs),
    "reading": lambda world, state: any(line.path.startswith("/download/") for line in world.requests),
}


@pytest.mark.parametrize("step", STEPS)
def test_a_run_killed_at_any_step_buys_nothing_twice(
    step: str, make_vertex_world, responses, monkeypatch, tmp_path: Path, start_run: Callable[..., Callable[[], None]]
) -> None:
    world = world_for_here(make_vertex_world, monkeypatch, job_seconds=0.3)
    state, wanted = tmp_path / "state", requests_for(responses(prompts=3, n=1))
    (tmp_path / "requests").write_bytes(pickle.dumps(wanted))
    kill = start_run(state, tmp_path / "requests", world)
    until = time.monotonic() + 60
    while not STEPS[step](world, state):
        assert time.monotonic() < until
        time.sleep(0.001)
    kill()
    again = score_all(VertexBatchBackend(options(max_rows_per_job=25), state), [[request] for request in wanted])
    assert set(reasons(again)) == {"scored"}
    assert set(world.rows_bought.values()) == {1}
    assert world.rejected == []


@pytest.mark.parametrize("at_once", [1, 50])
def test_groups_that_ask_for_the_same_rows_at_the_same_time_buy_them_once(
    at_once: int, in_vertex_world, responses, tmp_path: Path
) -> None:
    """No flow does so: it plans equal contexts once; others may."""
    (request,) = requests_for(responses(prompts=1, n=1))
    rest = request.only(set(request.keys[5:]))

    async def work() -> list[int]:
        async with VertexBatchBackend(options(max_jobs_in_flight=at_once), tmp_path) as backend:
            return await asyncio.gather(*(answered(backend, want) for want in (request, rest, request, request)))

    async def answered(backend: VertexBatchBackend, want: ScoreRequest) -> int:
        return len([result async for result in backend.score([want]) if isinstance(result, Score)])

    assert asyncio.run(work()) == [len(request.keys), len(rest.keys), len(request.keys), len(request.keys)]
    assert set(in_vertex_world.rows_bought.values()) == {1}
    assert len(in_vertex_world.jobs) == 1


def test_what_could_not_be_made_is_made_once_by_one_of_those_who_waited_for_it(
    in_vertex_world, responses, tmp_path: Path
) -> None:
    (request,) = requests_for(responses(prompts=1, n=1))
    in_vertex_world.faults.http_script = {"create": ["403"]}

    async def work() -> list[Results]:
        async with VertexBatchBackend(options(), tmp_path) as backend:
            return await asyncio.gather(*(everything(backend) for _ in range(4)))

    async def everything(backend: VertexBatchBackend) -> Results:
        return {result.key: result async for result in backend.score([request])}

    first, *others = asyncio.run(work())
    assert set(reasons(first)) == {"refused"}
    assert [set(reasons(results)) for results in others] == [{"scored"}] * 3
    assert len(in_vertex_world.jobs) == 1
