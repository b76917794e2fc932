"""Online calls against the local Vertex AI: one limit over everything, faults repeated, refusals named."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from backends.base import ScoreRequest
from backends.errors import ConfigError, ModelNotUsableError
from backends.scores.raw_log import read_raw
from backends.vertex.online import VertexOnlineBackend, VertexOnlineOptions
from backends.vertex.service.retry import DailyQuotaError
from kl.input.responses import read_responses
from kl.records import Response, Score, ScoreFailure
from tests.backends.conftest import P, Q, Results, distinct, request_for, score_all
from tests.disks import files_of_at_most
from tests.vertex_world.models import MODELS


def options(**settings: Any) -> VertexOnlineOptions:
    return VertexOnlineOptions(**({"project_id": "stand-in-project", "retry_deadline_s": 60} | settings))


@pytest.fixture
def score() -> Callable[..., Results]:
    def run(responses: list[Response], **settings: Any) -> Results:
        chosen = options(**settings)
        requests = distinct([request_for(response, VertexOnlineBackend, chosen) for response in responses])
        return score_all(VertexOnlineBackend(chosen), [[request] for request in requests])

    return run


def reasons(results: Results) -> set[str]:
    return {result.reason for result in results.values() if isinstance(result, ScoreFailure)}


def preflight(model: str, **settings: Any) -> str | None:
    async def work() -> str | None:
        async with VertexOnlineBackend(options(**settings)) as backend:
            return await backend.preflight(model)

    return asyncio.run(work())


def test_every_context_is_one_call_and_the_limit_holds_over_all_responses(in_vertex_world, responses, score) -> None:
    in_vertex_world.faults.latency_s = 0.02
    results = score(responses(), max_concurrent=7)
    assert all(isinstance(result, Score) for result in results.values())
    assert len(in_vertex_world.online_calls) == len(results)
    assert in_vertex_world.max_online_in_flight == 7
    assert in_vertex_world.rejected == []


@pytest.mark.parametrize("fault", ["429", "429+retry-after", "500", "503", "reset", "lost", "lost-503"])
def test_faults_are_repeated_until_all_is_measured(fault, in_vertex_world, responses, score) -> None:
    in_vertex_world.faults.http = {"online": {fault: 0.2}, "token": {"503": 0.5}}
    in_vertex_world.faults.retry_after_s = 0.05
    results = score(responses(prompts=2, n=1))
    assert all(isinstance(result, Score) for result in results.values())


def test_retry_after_is_waited_for(in_vertex_world, responses, score) -> None:
    in_vertex_world.faults.http_script = {"online": ["429+retry-after"]}
    in_vertex_world.faults.retry_after_s = 1.5
    asked = responses(prompts=1, n=1, max_tokens=1)

    async def timed() -> float:
        loop = asyncio.get_running_loop()
        began = loop.time()
        async with VertexOnlineBackend(options()) as backend:
            found = [result async for result in backend.score([request_for(asked[0], VertexOnlineBackend, options())])]
        assert all(isinstance(result, Score) for result in found)
        return loop.time() - began

    assert asyncio.run(timed()) >= 1.5


def test_a_fault_that_does_not_pass_ends_with_the_deadline(in_vertex_world, responses, score) -> None:
    in_vertex_world.faults.http = {"online": {"503": 1.0}}
    results = score(responses(prompts=1, n=1, max_tokens=3), retry_deadline_s=0.5)
    assert reasons(results) == {"deadline"}


def test_blocked_and_refused_contexts_have_the_services_reason(in_vertex_world, responses, score) -> None:
    in_vertex_world.faults.blocked_rate = 0.15
    in_vertex_world.faults.failing_rate = 0.15
    results = score(responses())
    assert reasons(results) == {"blocked", "refused"}
    assert sum(isinstance(result, Score) for result in results.values()) > len(results) / 2
    for result in results.values():
        if isinstance(result, ScoreFailure):
            assert result.final == (result.reason == "blocked")


def test_the_daily_quota_ends_the_day_at_once(in_vertex_world, responses, score) -> None:
    in_vertex_world.faults.logprobs_daily_quota = 5
    results = score(responses(), max_concurrent=1)
    assert reasons(results) == {"daily-quota"}
    assert sum(isinstance(result, Score) for result in results.values()) == 5
    assert len(in_vertex_world.online_calls) <= 7
    assert "run again tomorrow" in next(r.message for r in results.values() if isinstance(r, ScoreFailure))


def test_a_daily_limit_that_only_the_services_sentence_names_is_not_asked_again(
    in_vertex_world, responses, score
) -> None:
    in_vertex_world.faults.logprobs_daily_quota = 5
    in_vertex_world.faults.quota_sentence = (
        "Quota exceeded for quota metric 'Logprobs requests' and limit 'Logprobs requests per day' of service "
        "'aiplatform.googleapis.com' for consumer 'project_number:123456789'."
    )
    results = score(responses(), max_concurrent=1, retry_deadline_s=3)
    assert reasons(results) == {"daily-quota"}
    assert len(in_vertex_world.online_calls) == 6


def both_models(responses: list[Response]) -> tuple[list[ScoreRequest], list[ScoreRequest]]:
    """Every response, for P and for Q."""
    p, q = ([request_for(item, VertexOnlineBackend, options(), model) for item in responses] for model in (P, Q))
    return distinct(p), distinct(q)


def test_the_daily_quota_of_one_model_does_not_stop_the_other(in_vertex_world, responses) -> None:
    in_vertex_world.faults.logprobs_daily_quota = {P: 5}
    p, q = both_models(responses())
    results = score_all(VertexOnlineBackend(options(max_concurrent=1)), [[*p, *q]])
    of_p = {key: results[key] for request in p for key in request.keys}
    assert reasons(of_p) == {"daily-quota"}
    assert sum(isinstance(result, Score) for result in of_p.values()) == 5
    assert all(isinstance(results[key], Score) for request in q for key in request.keys)
    assert sum(call.model == P for call in in_vertex_world.online_calls) == 6


def test_a_model_whose_preflight_meets_the_daily_quota_is_not_asked_in_this_run(in_vertex_world, responses) -> None:
    in_vertex_world.faults.logprobs_daily_quota = {P: 0}
    p, q = both_models(responses(prompts=1))

    async def work() -> Results:
        async with VertexOnlineBackend(options()) as backend:
            with pytest.raises(DailyQuotaError):
                await backend.preflight(P)
            return {result.key: result async for result in backend.score([*p, *q])}

    results = asyncio.run(work())
    assert reasons(results) == {"daily-quota"}
    assert all(isinstance(results[key], Score) for request in q for key in request.keys)
    assert sum(call.model == P for call in in_vertex_world.online_calls) == 1


@pytest.mark.parametrize("name", ["daily-evals", "per-day-quota"])
def test_a_name_that_errors_quote_is_no_daily_quota(name, make_vertex_world, monkeypatch, tmp_path) -> None:
    world = make_vertex_world(project=name)
    for variable, value in world.environment().items():
        monkeypatch.setenv(variable, value)
    (path,) = world.write_responses(tmp_path, P, ["Hello"], n=1, max_tokens=20, seed=1)
    asked = read_responses(path, path.name).responses
    world.faults.names = name
    world.faults.http = {"online": {"429": 0.3, "503": 0.1}}
    world.faults.failing_rate = 0.2
    chosen = options(project_id=name)
    results = score_all(VertexOnlineBackend(chosen), [[request_for(asked[0], VertexOnlineBackend, chosen)]])
    assert reasons(results) == {"refused"}
    failed = [result for result in results.values() if isinstance(result, ScoreFailure)]
    assert len(failed) < len(results) / 2
    assert all(name in result.message for result in failed)
    world.faults.failing_rate, world.faults.logprobs_daily_quota = 0.0, 0
    spent = score_all(VertexOnlineBackend(chosen), [[request_for(asked[0], VertexOnlineBackend, chosen)]])
    assert reasons(spent) == {"daily-quota"}


def test_throttling_lowers_the_calls_in_flight_and_they_come_back(in_vertex_world, responses) -> None:
    in_vertex_world.faults.http = {"online": {"429": 0.45}}
    asked = distinct([request_for(response, VertexOnlineBackend, options()) for response in responses()])
    chosen = options(max_concurrent=16)

    async def work() -> tuple[int, int]:
        async with VertexOnlineBackend(chosen) as backend:
            async for _ in backend.score(asked):
                pass
            low = backend._limit.now
            in_vertex_world.faults.http = {}
            for _ in range(6):
                async for _ in backend.score(asked):
                    pass
            return low, backend._limit.now

    low, high = asyncio.run(work())
    assert low <= 8
    assert high > low


UNUSABLE = [
    ("gemini-3.5-flash", "gives no log-probabilities"),
    ("gemini-3.6-flash", "gives no log-probabilities and does not continue a model turn"),
    ("gemini-9-nano", "was not found"),
    ("gemini-2.5-pro", "always thinks"),
    ("gemini-2.0-flash", "was not found"),
]


@pytest.mark.parametrize(("model", "expected"), UNUSABLE, ids=[model for model, _ in UNUSABLE])
def test_a_model_that_cannot_be_used_is_named_with_those_that_can(model, expected, in_vertex_world) -> None:
    with pytest.raises(ModelNotUsableError, match=rf"{model}.*{expected}.*gemini-2.5-flash|{expected}") as caught:
        preflight(model, location="global")
    assert model in str(caught.value)
    assert "gemini-2.5-flash" in str(caught.value)
    assert caught.value.permanent == (model != "gemini-2.5-pro")  # which is refused before it is asked
    assert sum(in_vertex_world.rows_bought.values()) <= 1  # what the model can do is found by trying


@pytest.mark.parametrize(
    "fault", [{"http": {"online": {"403": 1.0}}}, {"no_logprobs_rate": 1.0}, {"failing_rate": 1.0}]
)
def test_what_may_pass_is_no_proof_against_a_model(fault, in_vertex_world) -> None:
    for name, value in fault.items():
        setattr(in_vertex_world.faults, name, value)
    with pytest.raises(ModelNotUsableError) as caught:
        preflight(Q)
    assert not caught.value.permanent


def test_what_a_model_lacks_is_found_by_trying_whatever_the_service_writes(make_vertex_world, monkeypatch) -> None:
    world = make_vertex_world(models={"logprob-prefill": replace(MODELS[Q], prefill=False)}, project="logprob-evals")
    for name, value in world.environment().items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ModelNotUsableError, match=r"^logprob-prefill does not continue a model turn \(prefill\): "):
        preflight("logprob-prefill", project_id="logprob-evals")
    world.faults.failing_rate, world.faults.names = 1.0, "logprob-evals"
    with pytest.raises(ModelNotUsableError, match=rf"^{Q} cannot be used: .*logprob-evals"):
        preflight(Q, project_id="logprob-evals")


@pytest.mark.parametrize("faults", [{}, {"counts": "absent"}], ids=["continued", "not counted"])
def test_a_prefill_that_ends_in_white_space_is_tried(faults, in_vertex_world, caplog) -> None:
    for name, value in faults.items():
        setattr(in_vertex_world.faults, name, value)
    assert preflight(Q) == Q
    assert [call.request["contents"][-1]["parts"][0]["text"][-1] for call in in_vertex_world.online_calls] == ["o", " "]
    assert not caplog.records


@pytest.mark.parametrize(
    ("fault", "said"),
    [("trims_prefill", "does not count the white space at the end"), ("refuses_white_space", "refuses a prefill")],
)
def test_a_service_that_does_not_take_white_space_is_usable_and_said_to_be_so(
    fault: str, said: str, in_vertex_world, caplog
) -> None:
    setattr(in_vertex_world.faults, fault, True)
    assert preflight(Q) == Q
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert said in record.getMessage()


def test_a_usable_model_says_its_version(in_vertex_world) -> None:
    assert preflight("gemini-2.5-flash") == "gemini-2.5-flash"
    assert in_vertex_world.rejected == []


def test_an_api_key_alone_selects_the_developer_api(make_vertex_world, monkeypatch, tmp_path: Path) -> None:
    world = make_vertex_world(models={Q: replace(MODELS[Q], developer_logprobs=True)})
    (path,) = world.write_responses(tmp_path, P, ["Hello"], n=1, max_tokens=4, seed=1)
    for name in ("GOOGLE_CLOUD_PROJECT", "GOOGLE_API_KEY", "GOOGLE_APPLICATION_CREDENTIALS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GEMINI_API_KEY", world.api_key)
    monkeypatch.setenv("GOOGLE_GEMINI_BASE_URL", world.url)
    chosen = options(project_id=None)
    request = request_for(read_responses(path, path.name).responses[0], VertexOnlineBackend, chosen)
    results = score_all(VertexOnlineBackend(chosen), [[request]])
    assert {type(result) for result in results.values()} == {Score}
    assert all(line.path.endswith(f"/models/{Q}:generateContent") for line in world.requests)
    assert not any("/projects/" in line.path for line in world.requests)


def test_without_project_and_key_it_says_what_to_set(monkeypatch) -> None:
    for name in ("GOOGLE_CLOUD_PROJECT", "GOOGLE_API_KEY", "GEMINI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match="set --project-id or GOOGLE_CLOUD_PROJECT"):
        VertexOnlineBackend(options(project_id=None))


def test_rows_can_be_kept(in_vertex_world, responses, tmp_path: Path) -> None:
    from backends.scores.raw_log import read_raw

    asked = responses(prompts=1, n=1, max_tokens=4)
    chosen = options(keep_raw=True)
    results = score_all(VertexOnlineBackend(chosen, tmp_path), [[request_for(asked[0], VertexOnlineBackend, chosen)]])
    again = {key: VertexOnlineBackend.parse_raw(key, row) for key, row in read_raw(tmp_path / "raw")}
    assert again == results


def test_a_raw_row_that_the_disk_refuses_costs_no_answer(in_vertex_world, responses, tmp_path: Path) -> None:
    in_vertex_world.faults.latency_s = 0.02
    chosen = options(keep_raw=True, max_concurrent=5)
    requests = distinct([request_for(response, VertexOnlineBackend, chosen) for response in responses()])
    results: list[Any] = []

    async def work() -> None:
        async with VertexOnlineBackend(chosen, tmp_path) as backend:
            with files_of_at_most(100):
                async for result in backend.score(requests):
                    results.append(result)

    with pytest.raises(OSError, match=r"File too large.*raw"):
        asyncio.run(work())
    assert len({result.key for result in results}) == sum(len(request.keys) for request in requests)
    n_scored = sum(isinstance(result, Score) for result in results)
    assert n_scored == len(in_vertex_world.online_calls) == 5
    assert len(list(read_raw(tmp_path / "raw"))) == 5


def test_a_token_that_is_refused_early_is_renewed_and_nothing_is_lost(in_vertex_world, responses) -> None:
    asked = distinct([request_for(response, VertexOnlineBackend, options()) for response in responses()])

    async def work() -> list[Score | ScoreFailure]:
        found: list[Score | ScoreFailure] = []
        async with VertexOnlineBackend(options(max_concurrent=8)) as backend:
            for request in asked:
                in_vertex_world.expire_tokens()
                found += [result async for result in backend.score([request])]
        return found

    assert {type(result) for result in asyncio.run(work())} == {Score}
    assert in_vertex_world.token_requests <= 2 * len(asked) + 2


@pytest.mark.parametrize(("status", "most"), [("401", 40), ("403", 20)])
def test_a_service_that_refuses_every_call_is_not_asked_about_each_context(
    status, most, in_vertex_world, responses, score, caplog
) -> None:
    asked = responses()
    in_vertex_world.faults.http_script = {"online": [None] * 10 + [status] * 1000}
    results = score(asked, max_concurrent=4, retry_deadline_s=1)
    assert len(results) > 100
    assert reasons(results) - {"refused"} == {"not-asked"}
    assert sum(isinstance(result, Score) for result in results.values()) == 10
    assert in_vertex_world.faults.injected[f"online:{status}"] <= most
    (said,) = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert said.startswith(f"{Q} refuses every call (call: {status}")
    assert "run again: it asks for what is missing alone" in said


def test_refusals_of_single_contexts_stop_nothing(in_vertex_world, responses, score) -> None:
    in_vertex_world.faults.http_script = {"online": [None, *["403"] * 4, None, *["403"] * 5, None, *["403"] * 3]}
    results = score(responses(prompts=2, n=1), max_concurrent=1)
    assert reasons(results) == {"refused"}
    assert sum(isinstance(result, ScoreFailure) for result in results.values()) == 12
    (tiny,) = [call for call in in_vertex_world.online_calls if "Continue the row" in str(call.request)]
    assert tiny.status == 200  # after five refusals in a row


def test_credentials_that_are_refused_for_a_moment_cost_no_context(in_vertex_world, responses, score) -> None:
    in_vertex_world.faults.http_script = {"online": [None] * 10 + ["401"] * 12}
    results = score(responses(prompts=2, n=1), max_concurrent=4)
    assert all(isinstance(result, Score) for result in results.values())


def test_a_token_that_is_refused_for_good_is_a_refusal(make_vertex_world, monkeypatch, responses) -> None:
    asked = responses(prompts=1, n=1, max_tokens=3)
    other = make_vertex_world(project="other-project")
    for name in ("GOOGLE_VERTEX_BASE_URL",):
        monkeypatch.setenv(name, other.environment()[name])
    request = request_for(asked[0], VertexOnlineBackend, options())
    results = score_all(VertexOnlineBackend(options(retry_deadline_s=1)), [[request]])
    assert reasons(results) == {"not-asked"}
    assert "401" in next(iter(results.values())).message


def test_more_calls_in_flight_than_an_http_client_usually_allows(in_vertex_world, responses, score) -> None:
    in_vertex_world.faults.latency_s = 1.0
    results = score(responses(prompts=15, n=1), max_concurrent=150)
    assert all(isinstance(result, Score) for result in results.values())
    assert 100 < in_vertex_world.max_online_in_flight <= 150


def test_a_first_call_that_is_throttled_everywhere_is_repeated_soon(in_vertex_world, responses, score) -> None:
    in_vertex_world.faults.http_script = {"online": ["429"] * 20}
    began = time.monotonic()
    results = score(responses(prompts=4, n=1), max_concurrent=20)
    assert all(isinstance(result, Score) for result in results.values())
    assert time.monotonic() - began < 3


def test_one_empty_answer_does_not_make_a_model_unusable(in_vertex_world) -> None:
    in_vertex_world.faults.no_logprobs_rate = 1.0
    with pytest.raises(ModelNotUsableError, match="cannot be scored"):
        preflight("gemini-2.5-flash")
    in_vertex_world.faults.no_logprobs_rate = 0.6
    in_vertex_world.faults.seed = 3
    assert preflight("gemini-2.5-flash") == "gemini-2.5-flash"
