"""Batch jobs against the local Vertex AI: the happy path, every state, every trap, nothing bought twice."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from backends.base import ScoreRequest
from backends.errors import ConfigError, RetryableBackendError
from backends.storage import Lease, LeaseLostError, as_location
from backends.vertex.batch import VertexBatchBackend, VertexBatchOptions
from backends.vertex.jobs.ledger import JobLedger
from backends.vertex.jobs.rows import score_rows
from kl.input.responses import read_responses
from kl.records import Response, Score, ScoreFailure
from tests.backends.conftest import P, Q, Results, distinct, request_for, score_all
from tests.vertex_world.language_model import prompt_turns
from tests.vertex_world.world import VertexWorld


def options(**settings: Any) -> VertexBatchOptions:
    fast = {"poll_interval_s": 0.05, "output_deadline_s": 3.0}
    return VertexBatchOptions(**({"project_id": "stand-in-project"} | fast | settings))


@pytest.fixture
def score(tmp_path: Path) -> Callable[..., Results]:
    """Score responses, one group each, with a backend that keeps its state in one folder over several calls."""

    def run(responses: list[Response], per_group: int = 1, **settings: Any) -> Results:
        chosen = options(**settings)
        requests = distinct([request_for(response, VertexBatchBackend, chosen) for response in responses])
        groups = [requests[start : start + per_group] for start in range(0, len(requests), per_group)]
        return score_all(VertexBatchBackend(chosen, tmp_path / "state"), groups)

    return run


def all_scored(results: Results) -> bool:
    return bool(results) and all(isinstance(result, Score) for result in results.values())


def expected_top(world: VertexWorld, response: Response, position: int) -> list[float]:
    """Q's 20 largest log-probabilities at a position, from the world's own distribution."""
    prefix = "".join(item.sampled.token for item in response.positions[:position])
    turns = prompt_turns(response.prompt.turns[0].content)
    distribution = world.language_model.distribution("gemini-2.5-flash", turns, response.prompt.system, prefix)
    return sorted(distribution.logprobs, reverse=True)[:20]


def test_every_distinct_context_is_one_row_and_one_group_is_one_job(in_vertex_world, responses, score) -> None:
    asked = responses()
    results = score(asked)
    assert all_scored(results)
    assert in_vertex_world.rejected == []
    assert len(in_vertex_world.jobs) == len(asked)
    assert set(in_vertex_world.rows_bought.values()) == {1}
    assert sum(in_vertex_world.rows_bought.values()) == len(results)


def test_scores_are_those_of_the_model(in_vertex_world, responses, score) -> None:
    asked = responses(prompts=1, n=1)
    results = score(asked)
    keys = request_for(asked[0], VertexBatchBackend, options()).keys
    for position, key in enumerate(keys):
        logprobs = [candidate.logprob for candidate in results[key].top]
        assert logprobs == pytest.approx(expected_top(in_vertex_world, asked[0], position), abs=1e-5)
        assert results[key].model_version


def test_several_responses_in_one_group_share_a_job_and_their_equal_contexts(in_vertex_world, responses, score) -> None:
    asked = responses(prompts=3, n=3)
    results = score(asked, per_group=9)
    assert all_scored(results)
    assert len(in_vertex_world.jobs) == 1
    assert set(in_vertex_world.rows_bought.values()) == {1}
    assert sum(in_vertex_world.rows_bought.values()) == len(results)


def test_files_stay_within_the_limits_of_rows(in_vertex_world, responses, score) -> None:
    results = score(responses(prompts=2, n=2), per_group=4, max_rows_per_job=7)
    assert all_scored(results)
    assert max(job.rows_in for job in in_vertex_world.jobs) <= 7


@dataclass(frozen=True)
class Fault:
    """Switches of the world with which every position is still measured, each row bought at most once."""

    id: str
    switches: dict[str, Any]
    settings: dict[str, Any] = field(default_factory=dict)


SURVIVED = [
    Fault("rows in any order", {"shuffle_rows": True}),
    Fault("three shards", {"shards": 3, "shuffle_rows": True}),
    Fault("shards of another name", {"shards": 3, "shard_name": "predictions_{index:03d}.jsonl"}),
    Fault("rows without our key", {"drop_keys": True, "shuffle_rows": True}),
    Fault("rows without our key, echoed with nulls", {"drop_keys": True, "mangle_echo": True, "shuffle_rows": True}),
    Fault("rows twice", {"duplicate_rate": 0.5}),
    Fault("incremental files of wrong data", {"incremental_siblings": True}),
    Fault("fields nobody knows", {"extra_fields": True}),
    Fault("sampled token not in the list", {"chosen_absent_rate": 0.5}),
    Fault("masked tokens", {"sentinel_rate": 0.5}),
    Fault("throttled calls", {"http": {kind: {"429": 0.2} for kind in ("create", "get", "list", "token", "storage")}}),
    Fault("failing calls", {"http": {kind: {"503": 0.2} for kind in ("create", "get", "list", "token", "storage")}}),
    Fault("broken connections", {"http": {kind: {"reset": 0.2} for kind in ("create", "get", "list", "storage")}}),
    Fault("create done, answer lost", {"http_script": {"create": ["lost", "lost-503", "lost"]}}),
    Fault("uploads done, answer lost", {"http_script": {"storage.upload": [None, "lost", None, "lost-503"]}}),
    Fault("output after the end", {"output_delay_s": 0.5}),
    Fault("failed first", {"job_outcomes": ["FAILED"]}),
    Fault("expired half-way", {"job_outcomes": [("EXPIRED", 0.5), ("EXPIRED", 0.5)]}),
    Fault("cancelled half-way", {"job_outcomes": [("CANCELLED", 0.5)]}),
    Fault("partially succeeded", {"job_outcomes": ["PARTIALLY_SUCCEEDED", "PARTIALLY_SUCCEEDED"]}),
    Fault("succeeded, all rows failed", {"job_outcomes": ["SUCCEEDED_ALL_ROWS_FAILED"]}),
    Fault("error with objects", {"job_outcomes": ["FAILED", "FAILED"], "job_error_details": True}),
    Fault("service agents not there yet", {"provision_first_job": True}),
    Fault(
        "half the jobs throttled",
        {"http": {"get": {"429": 0.5}, "create": {"429+retry-after": 0.5}}, "retry_after_s": 0.1},
    ),
    Fault(
        "create done, answer lost, look-ups failing",
        {"http_script": {"create": ["lost"], "list": [None] * 3 + ["503"] * 2}},
    ),
    Fault("expired, its output later", {"job_outcomes": [("EXPIRED", 0.5)], "output_delay_s": 0.5}),
    Fault("row errors", {"row_error_rate": 0.2}),
    Fault("row errors, null response", {"row_error_rate": 0.2, "failed_response": "null"}),
    Fault("row errors, empty response", {"row_error_rate": 0.2, "failed_response": "empty"}),
]


@pytest.mark.parametrize("fault", SURVIVED, ids=lambda fault: fault.id)
def test_all_is_measured_and_nothing_bought_twice(fault: Fault, in_vertex_world, responses, score) -> None:
    for name, value in fault.switches.items():
        setattr(in_vertex_world.faults, name, value)
    results = score(responses(prompts=3, n=1), retry_deadline_s=60, **fault.settings)
    assert all_scored(results)
    assert in_vertex_world.rejected == []
    assert set(in_vertex_world.rows_bought.values()) == {1}


def test_rows_and_calls_that_fail_in_many_ways_cost_little_more(in_vertex_world, responses, score) -> None:
    faults = in_vertex_world.faults
    faults.row_error_rate, faults.missing_rate = 0.1, 0.05
    faults.http = {kind: {"503": 0.05, "429": 0.05} for kind in ("create", "get", "list", "token", "storage")}
    results = score(responses(prompts=8, n=1, max_tokens=40))
    assert all_scored(results)
    assert sum(in_vertex_world.rows_bought.values()) <= 1.35 * len(results)


def test_a_failed_job_and_two_that_expire_are_followed_up(in_vertex_world, responses, score) -> None:
    in_vertex_world.faults.job_outcomes = ["FAILED", ("EXPIRED", 0.5), ("EXPIRED", 0.5)]
    results = score(responses(prompts=1, n=1, max_tokens=40))
    assert all_scored(results)
    assert len(in_vertex_world.jobs) == 4
    assert set(in_vertex_world.rows_bought.values()) == {1}


def test_missing_rows_are_asked_again(in_vertex_world, responses, score) -> None:
    in_vertex_world.faults.missing_rate = 0.2
    results = score(responses(prompts=3, n=1))
    assert all_scored(results)
    assert len(in_vertex_world.jobs) > 3


def test_a_cut_last_line_is_one_missing_row(in_vertex_world, responses, score) -> None:
    in_vertex_world.faults.truncate_last_line = True
    results = score(responses(prompts=1, n=1), max_attempts=20)
    failed = [result for result in results.values() if isinstance(result, ScoreFailure)]
    assert len(failed) <= 1  # the last row of every job is cut, so that one row may never come


def test_blocked_prompts_are_final_and_always_failing_rows_are_named(in_vertex_world, responses, score) -> None:
    in_vertex_world.faults.blocked_rate = 0.1
    in_vertex_world.faults.failing_rate = 0.1
    results = score(responses(prompts=4, n=1), max_attempts=3)
    reasons = {result.reason for result in results.values() if isinstance(result, ScoreFailure)}
    assert reasons == {"blocked", "row-error"}
    assert all(
        result.final == (result.reason == "blocked") for result in results.values() if isinstance(result, ScoreFailure)
    )
    assert sum(isinstance(result, Score) for result in results.values()) > len(results) / 2


def test_a_job_that_always_fails_says_so_in_the_services_words(in_vertex_world, responses, score) -> None:
    in_vertex_world.faults.job_outcomes = ["FAILED"] * 10
    results = score(responses(prompts=1, n=1), max_attempts=2)
    assert {result.reason for result in results.values()} == {"job-failed"}
    assert all("FAILED" in result.message for result in results.values())
    assert len(in_vertex_world.jobs) == 2


def test_an_unknown_state_is_an_error_and_makes_no_second_job(in_vertex_world, responses, score) -> None:
    in_vertex_world.faults.job_outcomes = ["JOB_STATE_FROBNICATED"]
    results = score(responses(prompts=1, n=1))
    assert {result.reason for result in results.values()} == {"unknown-state"}
    assert "FROBNICATED" in next(iter(results.values())).message
    assert len(in_vertex_world.jobs) == 1


@pytest.mark.parametrize("outcome", ["NEVER", "PAUSED", "NEVER_STARTS"])
def test_a_wait_has_a_deadline_and_the_next_run_attaches(outcome, in_vertex_world, responses, score) -> None:
    in_vertex_world.faults.job_outcomes = [outcome]
    asked = responses(prompts=1, n=1)
    results = score(asked, wait_deadline_s=0.5)
    assert {result.reason for result in results.values()} == {"deadline"}
    again = score(asked, wait_deadline_s=0.5)
    assert {result.reason for result in again.values()} == {"deadline"}
    assert len(in_vertex_world.jobs) == 1


def test_a_second_run_with_the_same_folder_reads_the_same_job(in_vertex_world, responses, score) -> None:
    asked = responses()
    first, second = score(asked), score(asked)
    assert first == second
    assert len(in_vertex_world.jobs) == len(asked)


def test_a_run_grouped_otherwise_still_finds_the_jobs(in_vertex_world, responses, score) -> None:
    asked = responses(prompts=3, n=1)
    first = score(asked)
    assert score(asked, per_group=3) == first
    assert set(in_vertex_world.rows_bought.values()) == {1}


def test_a_run_without_the_folder_finds_the_jobs_by_name(in_vertex_world, responses, tmp_path) -> None:
    asked = responses(prompts=2, n=1)
    groups = [[request_for(response, VertexBatchBackend, options())] for response in asked]
    first = score_all(VertexBatchBackend(options(), tmp_path / "one"), groups)
    second = score_all(VertexBatchBackend(options(), tmp_path / "two"), groups)
    assert first == second
    assert len(in_vertex_world.jobs) == 2


def test_a_row_of_which_the_service_says_the_day_is_over_is_not_asked_again(in_vertex_world, responses, score) -> None:
    in_vertex_world.faults.logprobs_daily_quota = 4
    results = score(responses(prompts=1, n=1))
    assert sum(isinstance(result, Score) for result in results.values()) == 4
    assert {result.reason for result in results.values() if isinstance(result, ScoreFailure)} == {"daily-quota"}
    assert len(in_vertex_world.jobs) == 1


@pytest.mark.parametrize("name", ["daily-evals", "per-day-quota"])
def test_a_name_that_errors_quote_is_no_daily_quota(name, make_vertex_world, responses, monkeypatch, tmp_path) -> None:
    asked = responses(prompts=2, n=1)
    world = make_vertex_world(project=name)
    for variable, value in world.environment().items():
        monkeypatch.setenv(variable, value)
    world.faults.names = name
    world.faults.row_error_rate, world.faults.failing_rate = 0.3, 0.1
    world.faults.http_script = {kind: ["429", None, "429"] for kind in ("create", "get", "list", "storage")}
    chosen = options(project_id=name, bucket_name=name, max_attempts=6)
    groups = [[request_for(response, VertexBatchBackend, chosen)] for response in asked]
    results = score_all(VertexBatchBackend(chosen, tmp_path / "state"), groups)
    failed = [result for result in results.values() if isinstance(result, ScoreFailure)]
    assert {result.reason for result in failed} == {"row-error"}
    assert all('"code":400' in result.message and name in result.message for result in failed)
    assert world.faults.injected["row_error"] > 0  # those of 429, which a follow-up job mends


def test_the_daily_limit_ends_the_making_of_jobs_and_the_next_day_goes_on(in_vertex_world, responses, score) -> None:
    asked = responses(prompts=4, n=1)
    in_vertex_world.faults.logprobs_daily_quota = 4
    results = score(asked, max_jobs_in_flight=1)
    assert len(in_vertex_world.jobs) == 1
    assert sum(isinstance(result, Score) for result in results.values()) == 4
    in_vertex_world.faults.logprobs_daily_quota = None
    assert all_scored(score(asked))
    assert set(in_vertex_world.rows_bought.values()) == {1}


def test_the_daily_quota_of_one_model_does_not_stop_the_jobs_of_the_other(in_vertex_world, responses, tmp_path) -> None:
    in_vertex_world.faults.logprobs_daily_quota = {P: 4}
    chosen = options(max_jobs_in_flight=1)
    asked = responses(prompts=2, n=1)
    p, q = ([request_for(item, VertexBatchBackend, chosen, model) for item in asked] for model in (P, Q))
    results = score_all(VertexBatchBackend(chosen, tmp_path / "state"), [[request] for request in (*p, *q)])
    of_p = [results[key] for request in p for key in request.keys]
    assert sum(isinstance(result, Score) for result in of_p) == 4
    assert {result.reason for result in of_p if isinstance(result, ScoreFailure)} == {"daily-quota"}
    assert all(isinstance(results[key], Score) for request in q for key in request.keys)
    assert len(in_vertex_world.jobs) == 1 + 2


@pytest.mark.parametrize("fault", ["create", "storage.upload", "list", "get", "storage.download"])
def test_a_call_that_fails_for_long_is_a_failure_of_its_rows_and_the_next_run_goes_on(
    fault: str, in_vertex_world, responses, score
) -> None:
    asked = responses(prompts=3, n=1)
    score(asked[:1])
    in_vertex_world.faults.http = {fault: {"503": 1.0}}
    results = score(asked[1:], per_group=2, retry_deadline_s=0.5, max_rows_per_job=15)
    assert {result.reason for result in results.values()} <= {"deadline", "retryable-backend"}
    in_vertex_world.faults.http = {}
    assert all_scored(score(asked[1:], per_group=2, max_rows_per_job=15))
    assert set(in_vertex_world.rows_bought.values()) == {1}


def test_credentials_that_are_refused_while_jobs_are_waited_for_cost_nothing(in_vertex_world, responses, score) -> None:
    in_vertex_world.faults.http_script = {"get": ["401"] * 4, "list": [None, *["401"] * 3]}
    assert all_scored(score(responses(prompts=2, n=1)))
    assert in_vertex_world.faults.injected["get:401"] == 4
    assert set(in_vertex_world.rows_bought.values()) == {1}


@pytest.mark.parametrize("fault", ["create", "list", "storage.upload"])
def test_a_service_that_refuses_job_after_job_is_not_asked_for_each(
    fault: str, in_vertex_world, responses, score, caplog
) -> None:
    asked = responses(prompts=6, n=2, max_tokens=3)
    in_vertex_world.faults.http = {fault: {"403": 1.0}}
    results = score(asked, max_jobs_in_flight=2)
    assert {result.reason for result in results.values()} == {"refused", "not-asked"}
    n_refused = sum(count for name, count in in_vertex_world.faults.injected.items() if "403" in name)
    # Three, and one in flight; an upload that is refused at its start is refused at its end, too.
    assert n_refused <= (8 if fault == "storage.upload" else 4)
    (said,) = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert "3 jobs were refused one after the other" in said
    in_vertex_world.faults.http = {}
    assert all_scored(score(asked))


def test_a_job_that_was_refused_is_made_at_another_place(in_vertex_world, responses, tmp_path) -> None:
    request = request_for(responses(prompts=1, n=1, max_tokens=3)[0], VertexBatchBackend, options())
    in_vertex_world.faults.http = {"create": {"403": 1.0}}
    refused = VertexBatchBackend(options(), tmp_path)
    assert {result.reason for result in score_all(refused, [[request]]).values()} == {"refused"}
    assert not VertexBatchBackend(options(), tmp_path).in_flight()
    in_vertex_world.faults.http = {}
    elsewhere = options(bucket_name="another-bucket")
    assert all_scored(score_all(VertexBatchBackend(elsewhere, tmp_path), [[request]]))
    assert set(in_vertex_world.rows_bought.values()) == {1}


def test_a_job_that_is_refused_fails_its_rows_and_leaves_the_others_alone(in_vertex_world, responses, tmp_path) -> None:
    asked = responses(prompts=2, n=1)
    other = "gemini-9-nano"
    requests = [
        request_for(response, VertexBatchBackend, options(), model)
        for response, model in zip(asked, (other, "gemini-2.5-flash"), strict=True)
    ]
    results = score_all(VertexBatchBackend(options(), tmp_path), [requests])
    for request in requests:
        kinds = {getattr(results[key], "reason", "scored") for key in request.keys}
        assert kinds == ({"refused"} if request.model == other else {"scored"})


def delete_jobs(world: VertexWorld) -> None:
    from tests.vertex_world.testing import genai_client

    with genai_client(world) as client:
        for job in world.jobs:
            if not job.deleted:
                client.batches.delete(name=job.id)


def test_a_job_deleted_after_its_end_is_still_read_from_the_bucket(in_vertex_world, responses, score) -> None:
    asked = responses(prompts=2, n=1)
    first = score(asked)
    delete_jobs(in_vertex_world)
    assert score(asked) == first
    assert len(in_vertex_world.jobs) == 2


def test_a_job_deleted_under_a_waiting_run_is_read_and_the_rest_followed_up(in_vertex_world, responses, score) -> None:
    in_vertex_world.faults.job_outcomes = [("CANCELLED", 0.5)]
    asked = responses(prompts=1, n=1)
    stop = threading.Event()

    def delete() -> None:
        while not stop.wait(0.01):
            if any(job.settled for job in in_vertex_world.jobs):
                delete_jobs(in_vertex_world)
                return

    deleting = threading.Thread(target=delete)
    deleting.start()
    results = score(asked, poll_interval_s=1.0)
    stop.set()
    deleting.join()
    assert all_scored(results)
    assert set(in_vertex_world.rows_bought.values()) == {1}


def test_of_several_jobs_of_one_name_all_that_ended_are_read_and_none_is_made(
    make_vertex_world, responses, monkeypatch, tmp_path
) -> None:
    world = make_vertex_world(job_seconds=1.0)
    for name, value in world.environment().items():
        monkeypatch.setenv(name, value)
    world.faults.job_outcomes = [("FAILED", 0.0), ("EXPIRED", 0.5), None]
    request = request_for(responses(prompts=1, n=1)[0], VertexBatchBackend, options())
    backend = VertexBatchBackend(options(), tmp_path / "one")
    rows = score_rows([request])
    job_key = JobLedger(tmp_path / "none").job_key(backend._place, rows.keys)

    async def make_three() -> None:
        async with backend:
            await backend._bucket.ensure()
            uri = await backend._bucket.upload_once(f"batch_input/x_{job_key}.jsonl", rows)
            for _ in range(3):
                await backend._jobs.create(rows.model, uri, f"gs://{backend._bucket_name}/batch_output/x", job_key)

    asyncio.run(make_three())
    assert all_scored(score_all(VertexBatchBackend(options(), tmp_path / "two"), [[request]]))
    assert len(world.jobs) == 3


def test_an_input_file_that_a_killed_run_left_in_another_order_is_no_obstacle(
    in_vertex_world, responses, tmp_path
) -> None:
    asked = responses(prompts=2, n=1)
    one, two = (request_for(response, VertexBatchBackend, options()) for response in asked)
    one, two = replace(one, name="same"), replace(two, name="same")
    backend = VertexBatchBackend(options(), tmp_path)
    rows = score_rows([two, one])

    async def upload_only() -> None:
        async with backend:
            await backend._bucket.ensure()
            entry = backend._ledger.update(backend._ledger.next_entry(backend._place, rows.keys, "same"))
            await backend._bucket.upload_once(entry.input_path, rows)

    asyncio.run(upload_only())
    assert all_scored(score_all(VertexBatchBackend(options(), tmp_path), [[one, two]]))
    assert set(in_vertex_world.rows_bought.values()) == {1}


def test_jobs_are_cancelled_when_the_run_is_stopped_and_what_they_finished_is_kept(
    make_vertex_world, responses, monkeypatch, tmp_path
) -> None:
    world = make_vertex_world(job_seconds=3.0)
    for name, value in world.environment().items():
        monkeypatch.setenv(name, value)
    chosen = options(on_cancel="cancel")
    requests = [request_for(response, VertexBatchBackend, chosen) for response in responses(prompts=2, n=1)]

    async def stopped() -> str | None:
        async with VertexBatchBackend(chosen, tmp_path) as backend:
            work = [asyncio.create_task(_collect(backend, request)) for request in requests]
            while not all(job.state == "JOB_STATE_RUNNING" for job in world.jobs) or len(world.jobs) < 2:
                await asyncio.sleep(0.02)
            await asyncio.sleep(0.3)
            for task in work:
                task.cancel()
            await asyncio.wait(work)
            await backend._jobs.cancel(world.jobs[0].id)
            world.wait_for_jobs() if world.jobs[0].settled else await asyncio.sleep(0.5)
            return await asyncio.wait_for(backend.interrupted(), 2)

    said = asyncio.run(stopped())
    assert said is not None
    assert "1 batch jobs were cancelled" in said
    assert "1 batch jobs could not be cancelled, or have ended" in said
    assert {job.state for job in world.wait_for_jobs()} == {"JOB_STATE_CANCELLED"}
    assert all_scored(score_all(VertexBatchBackend(options(), tmp_path), [[request] for request in requests]))
    assert set(world.rows_bought.values()) == {1}


async def _collect(backend: VertexBatchBackend, request: ScoreRequest) -> None:
    async for _ in backend.score([request]):
        pass


def test_a_bucket_that_cannot_be_had_ends_all_groups_after_one_deadline(in_vertex_world, responses, score) -> None:
    in_vertex_world.faults.http = {"storage": {"503": 1.0}}
    asked = responses(prompts=6, n=1, max_tokens=3)
    began = time.monotonic()
    with pytest.raises(RetryableBackendError, match="look for the bucket"):
        score(asked, retry_deadline_s=1.5)
    assert time.monotonic() - began < 7, "a deadline for each would take nine"


@pytest.mark.parametrize("name", ["gs://bucket", "Bucket", "a", "example.com:project-kl-batch", "b/"])
def test_a_name_that_no_bucket_can_have_is_refused_at_once(name: str, tmp_path) -> None:
    with pytest.raises(ConfigError, match="--bucket-name"):
        VertexBatchBackend(options(bucket_name=name), tmp_path)


def test_one_output_file_that_cannot_be_had_takes_nothing_from_the_others(in_vertex_world, responses, score) -> None:
    in_vertex_world.faults.shards = 3
    in_vertex_world.faults.http_script = {"storage.download": [None] + ["503"] * 200}
    asked = responses(prompts=1, n=1)
    results = score(asked, retry_deadline_s=0.5)
    kinds = [getattr(result, "reason", "scored") for result in results.values()]
    assert set(kinds) == {"scored", "deadline"}
    in_vertex_world.faults.http_script = {}
    assert all_scored(score(asked))
    assert len(in_vertex_world.jobs) == 1


def test_a_job_whose_rows_were_all_refused_for_now_has_a_pause_before_the_next(
    in_vertex_world, responses, score
) -> None:
    in_vertex_world.faults.provision_first_job = True
    began = time.monotonic()
    assert all_scored(score(responses(prompts=1, n=1, max_tokens=3), poll_interval_s=0.5))
    assert time.monotonic() - began > 1.0 + 3 * 0.5, "a look at each job, and three looks between"
    assert len(in_vertex_world.jobs) == 2


@pytest.mark.parametrize("stage", ["score", "collect"])
def test_contexts_that_jobs_of_another_location_or_bucket_answer_are_not_bought_here(
    stage: str, in_vertex_world, responses, tmp_path: Path
) -> None:
    (response,) = responses(prompts=1, n=1, max_tokens=3)
    request = request_for(response, VertexBatchBackend, options())

    async def ask(how: str, **settings: Any) -> list[Any]:
        async with VertexBatchBackend(options(**settings), tmp_path / "state") as backend:
            return [result async for result in getattr(backend, how)([request])]

    asyncio.run(ask("submit"))
    with pytest.raises(ConfigError, match=r"3 of these contexts are in 1 batch jobs in stand-in-project/us-central1/"):
        asyncio.run(ask(stage, location="europe-west4"))
    with pytest.raises(ConfigError, match="Run with that project, location and bucket to take them in"):
        asyncio.run(ask(stage, bucket_name="another"))
    assert len(in_vertex_world.jobs) == 1
    assert all_scored({result.key: result for result in asyncio.run(ask("score"))})
    asyncio.run(ask("submit", bucket_name="another"))  # they are in: whoever asks anew means it
    assert len(in_vertex_world.jobs) == 2


def test_a_lock_that_was_lost_during_an_upload_makes_no_job(in_vertex_world, responses, tmp_path: Path) -> None:
    in_vertex_world.objects.create_bucket("data")
    in_vertex_world.faults.http_script = {"storage.upload": ["slow"]}
    in_vertex_world.faults.slow_s = 0.6
    lease = Lease(as_location("gs://data/out/.lock"), lease_s=0.4)
    (response,) = responses(prompts=1, n=1, max_tokens=3)
    request = request_for(response, VertexBatchBackend, options())

    async def work() -> None:
        backend = VertexBatchBackend(options(), tmp_path / "state")
        backend.check_lock = lease.check
        async with backend:
            lease.acquire()
            lease._ended.set()  # the process is held up: nothing renews
            async for _ in backend.score([request]):
                pass

    with pytest.raises(LeaseLostError, match="it was not renewed in time"):
        asyncio.run(work())
    assert in_vertex_world.jobs == []


def test_what_goes_on_at_the_end_is_said(make_vertex_world, monkeypatch, tmp_path: Path) -> None:
    world = make_vertex_world(job_seconds=3600.0)
    for name, value in world.environment().items():
        monkeypatch.setenv(name, value)
    (path,) = world.write_responses(tmp_path / "in", P, ["Hello"], n=1, max_tokens=3, seed=1)
    request = request_for(read_responses(path, path.name).responses[0], VertexBatchBackend, options())

    async def work() -> str | None:
        async with VertexBatchBackend(options(wait_deadline_s=0.2), tmp_path / "state") as backend:
            results = [result async for result in backend.score([request])]
            assert {result.reason for result in results} == {"deadline"}
            return backend.going_on()

    said = asyncio.run(work())
    assert said is not None
    assert said.startswith("1 batch jobs go on and are charged; the same command, run again, takes in what they answer")
