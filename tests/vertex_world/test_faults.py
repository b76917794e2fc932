"""Faults of jobs, rows, files and answers, as they show over the wire, and their counts."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import pytest
from google.genai import errors, types
from pydantic import ValidationError

from tests.vertex_world import Faults, VertexWorld
from tests.vertex_world.answering import DAILY_QUOTA
from tests.vertex_world.fixtures import in_vertex_world, make_vertex_world, vertex_world
from tests.vertex_world.testing import (
    FLASH,
    ask,
    authorized_session,
    files,
    genai_client,
    rows_of,
    scoring_request,
    start_job,
    vertex_url,
)

__all__ = ["in_vertex_world", "make_vertex_world", "vertex_world"]

pytestmark = pytest.mark.world


@pytest.fixture
def world(in_vertex_world: VertexWorld) -> VertexWorld:
    return in_vertex_world


@pytest.mark.parametrize(
    ("outcome", "state", "rows", "code"),
    [
        ("FAILED", "JOB_STATE_FAILED", 0, 13),
        (("EXPIRED", 0.5), "JOB_STATE_EXPIRED", 5, 4),
        (("CANCELLED", 0.3), "JOB_STATE_CANCELLED", 3, 1),
        ("PARTIALLY_SUCCEEDED", "JOB_STATE_PARTIALLY_SUCCEEDED", 5, None),
        ("SUCCEEDED_ALL_ROWS_FAILED", "JOB_STATE_SUCCEEDED", 10, None),
        ("SUCCEEDED", "JOB_STATE_SUCCEEDED", 10, None),
    ],
)
def test_jobs_end_as_scripted_with_their_finished_rows(
    world: VertexWorld, outcome: Any, state: str, rows: int, code: int | None
) -> None:
    world.faults.job_outcomes = [outcome]
    start_job(world)
    (job,) = world.wait_for_jobs()
    assert job.state == state
    assert (job.error or {}).get("code") == code
    assert len(rows_of(world)) == job.rows_finished == rows
    sold = 0 if outcome == "SUCCEEDED_ALL_ROWS_FAILED" else rows
    assert sum(world.rows_bought.values()) == sold
    assert {row["status"] == "" for row in rows_of(world)} <= {bool(sold)}


@pytest.mark.parametrize(
    ("outcome", "state"),
    [
        ("PAUSED", "JOB_STATE_PAUSED"),
        ("JOB_STATE_FROBNICATED", "JOB_STATE_FROBNICATED"),
        (("NEVER", 0.5), "JOB_STATE_RUNNING"),
        ("NEVER_STARTS", "JOB_STATE_PENDING"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*JOB_STATE_FROBNICATED.*:UserWarning")
def test_jobs_that_never_end_can_be_cancelled(world: VertexWorld, outcome: Any, state: str) -> None:
    world.faults.job_outcomes = [outcome]
    created = start_job(world)
    with genai_client(world) as client:
        _wait_until(lambda: world.jobs[0].parked is not None)
        job = client.batches.get(name=str(created.name))
        assert job.state is not None
        assert job.state.value == state
        client.batches.cancel(name=str(created.name))
    (ended,) = world.wait_for_jobs()
    assert ended.state == "JOB_STATE_CANCELLED"
    assert len(rows_of(world)) == (5 if isinstance(outcome, tuple) else 0)


def _wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_cancel_can_be_ignored(world: VertexWorld) -> None:
    world.faults.ignore_cancel = True
    world.hurry(600)  # so that the job is under way whenever the cancel comes
    created = start_job(world)
    with genai_client(world) as client:
        client.batches.cancel(name=str(created.name))
    world.hurry()
    assert [job.state for job in world.wait_for_jobs()] == ["JOB_STATE_SUCCEEDED"]


def test_details_of_an_error_are_objects_on_which_the_client_stumbles(world: VertexWorld) -> None:
    world.faults.job_outcomes = ["FAILED"]
    world.faults.job_error_details = True
    created = start_job(world)
    world.wait_for_jobs()
    with genai_client(world) as client, pytest.raises(ValidationError):
        client.batches.get(name=str(created.name))


@pytest.mark.parametrize(("shape", "expected"), [("absent", "absent"), ("null", None), ("empty", {})])
def test_transient_row_errors_pass_when_asked_again(world: VertexWorld, shape: Any, expected: object) -> None:
    world.faults.row_error_rate = 0.4
    world.faults.failed_response = shape
    start_job(world, 30)
    world.wait_for_jobs()
    failed = [row for row in rows_of(world) if row["status"]]
    assert 0 < len(failed) < 30
    assert len(failed) == world.faults.injected["row_error"] == world.jobs[0].rows_failed
    assert all(row.get("response", "absent") == expected for row in failed)
    assert "RESOURCE_EXHAUSTED" in failed[0]["status"]
    start_job(world, 30, "b")
    world.wait_for_jobs()
    still = {row["key"] for row in rows_of(world, 1) if row["status"]}
    assert still != {row["key"] for row in failed}


def test_permanent_faults_hit_the_same_rows_again_and_online_too(world: VertexWorld) -> None:
    world.faults.failing_rate = world.faults.blocked_rate = 0.3
    for name in "ab":
        start_job(world, 30, name)
    world.wait_for_jobs()
    first, second = rows_of(world, 0), rows_of(world, 1)
    failed = [row["key"] for row in first if row["status"]]
    blocked = [row["key"] for row in first if "promptFeedback" in row.get("response", {})]
    assert failed
    assert blocked
    assert failed == [row["key"] for row in second if row["status"]]
    assert blocked == [row["key"] for row in second if "promptFeedback" in row.get("response", {})]
    answer = ask(world, f"q{blocked[0][1:]}")
    assert answer.candidates is None
    assert answer.prompt_feedback is not None
    assert answer.prompt_feedback.block_reason == types.BlockedReason.PROHIBITED_CONTENT
    with pytest.raises(errors.ClientError, match="400"):
        ask(world, f"q{failed[0][1:]}")
    assert world.rejected == []


def test_missing_rows_have_no_line_and_are_not_bought(world: VertexWorld) -> None:
    world.faults.missing_rate = 0.4
    start_job(world, 30)
    (job,) = world.wait_for_jobs()
    assert 0 < len(rows_of(world)) == 30 - job.rows_missing < 30
    assert job.to_json()["completionStats"]["incompleteCount"] == str(job.rows_missing)
    assert sum(world.rows_bought.values()) == 30 - job.rows_missing


def test_service_agents_of_the_first_job_are_being_provisioned(world: VertexWorld) -> None:
    world.faults.provision_first_job = True
    for name in "ab":
        start_job(world, 3, name)
    world.wait_for_jobs()
    assert all("FAILED_PRECONDITION" in row["status"] for row in rows_of(world, 0))
    assert all(row["status"] == "" for row in rows_of(world, 1))


@pytest.mark.parametrize("name", ["predictions-{index:05d}-of-{count:05d}.jsonl", "predictions_{index:03d}.jsonl"])
def test_shards_shuffling_duplicates_and_incremental_files(world: VertexWorld, name: str) -> None:
    world.faults.shards, world.faults.shard_name = 3, name
    world.faults.shuffle_rows = world.faults.incremental_siblings = True
    world.faults.duplicate_rate = 0.3
    start_job(world, 30)
    world.wait_for_jobs()
    written = files(world)
    shards = [name.format(index=index, count=3) for index in range(3)]
    wrong = ["incremental_predictions-00000-of-00001.jsonl", "incremental_predictions.jsonl"]
    assert sorted(written) == sorted([*shards, *wrong])
    keys = [row["key"] for row in rows_of(world)]
    assert len(keys) == 30 + world.faults.injected["duplicate"] > 30
    assert list(dict.fromkeys(keys)) != [f"k{index}" for index in range(30)]
    assert set(world.rows_bought.values()) == {1}
    first = json.loads(written["incremental_predictions.jsonl"].split(b"\n")[0])
    tokens = first["response"]["candidates"][0]["logprobsResult"]["topCandidates"][0]["candidates"]
    assert {token["logProbability"] for token in tokens} == {-1.0}


def test_keys_can_be_dropped_and_the_echo_mangled(world: VertexWorld) -> None:
    world.faults.drop_keys = world.faults.mangle_echo = True
    start_job(world, 2)
    world.wait_for_jobs()
    for index, row in enumerate(rows_of(world)):
        assert set(row) == {"status", "processed_time", "request", "response"}
        assert next(iter(row["request"])) == "generationConfig"
        part = row["request"]["contents"][0]["parts"][0]
        assert part == {"text": f"q{index}", "file_data": None, "function_call": None, "inline_data": None}


def test_a_last_line_can_be_cut_and_its_row_is_not_counted_as_bought(world: VertexWorld) -> None:
    world.faults.truncate_last_line = True
    start_job(world, 5)
    world.wait_for_jobs()
    lines = files(world)["predictions.jsonl"].split(b"\n")
    assert len(lines) == 5
    assert [json.loads(line)["key"] for line in lines[:4]] == ["k0", "k1", "k2", "k3"]
    with pytest.raises(json.JSONDecodeError):
        json.loads(lines[4])
    assert sum(world.rows_bought.values()) == 4


def test_the_folder_can_appear_after_the_state_is_terminal(world: VertexWorld) -> None:
    world.faults.output_delay_s = 0.5
    start_job(world)
    _wait_until(lambda: world.jobs[0].state == "JOB_STATE_SUCCEEDED")
    assert world.jobs[0].to_json()["outputInfo"]
    assert files(world) == {}
    world.wait_for_jobs()
    assert len(rows_of(world)) == 10


def test_answers_can_lack_the_chosen_token_hold_sentinels_or_have_no_logprobs(world: VertexWorld) -> None:
    with authorized_session(world) as session:
        url = vertex_url(world, f"publishers/google/models/{FLASH}:generateContent")

        def result() -> dict[str, Any]:
            return session.post(url, json=scoring_request("q"), timeout=10).json()["candidates"][0]

        world.faults.chosen_absent_rate = 1
        answer = result()["logprobsResult"]
        listed = [token["tokenId"] for token in answer["topCandidates"][0]["candidates"]]
        assert answer["chosenCandidates"][0]["tokenId"] not in listed
        assert len(listed) == 20
        world.faults.sentinel_rate = 1
        values = [token["logProbability"] for token in result()["logprobsResult"]["topCandidates"][0]["candidates"]]
        assert values[-3:] == [-1.2676506e30] * 3
        assert min(values[:-3]) > -100
        world.faults.no_logprobs_rate = 1
        assert "logprobsResult" not in result()


def test_unknown_fields_and_a_new_model_version_can_appear(world: VertexWorld) -> None:
    world.faults.model_version_change_after = 2
    versions = [ask(world).model_version for _ in range(4)]
    assert versions == [FLASH, FLASH, f"{FLASH}-002", f"{FLASH}-002"]
    world.faults.extra_fields = True
    with authorized_session(world) as session:
        url = vertex_url(world, f"publishers/google/models/{FLASH}:generateContent")
        assert "serviceTier" in session.post(url, json=scoring_request("q"), timeout=10).json()


def test_the_daily_quota_of_logprobs_ends_online_and_in_rows(world: VertexWorld) -> None:
    world.faults.logprobs_daily_quota = 3
    ask(world)
    start_job(world, 5)
    world.wait_for_jobs()
    spent = [row for row in rows_of(world) if row["status"]]
    assert len(spent) == 3
    assert DAILY_QUOTA in spent[0]["status"]
    with pytest.raises(errors.ClientError, match="daily limit of logprobs requests"):
        ask(world)


def test_draws_are_equal_for_equal_seeds_and_differ_between_seeds() -> None:
    first, again, other = Faults(seed=1), Faults(seed=1), Faults(seed=2)
    draws = [first.draw("row", index) for index in range(50)]
    assert draws == [again.draw("row", index) for index in range(50)]
    assert draws != [other.draw("row", index) for index in range(50)]
    assert 0 <= min(draws) < 0.2
    assert 0.8 < max(draws) < 1


def test_more_jobs_than_workers_are_queued(
    make_vertex_world: Callable[..., VertexWorld], monkeypatch: pytest.MonkeyPatch
) -> None:
    world = make_vertex_world(max_running=1, job_seconds=1.5)
    for name, value in world.environment().items():
        monkeypatch.setenv(name, value)
    for name in ("a", "b", "c"):
        start_job(world, 2, name)
    assert world.jobs[2].state == "JOB_STATE_QUEUED"
    assert [job.state for job in world.wait_for_jobs()] == ["JOB_STATE_SUCCEEDED"] * 3
