"""Responses that Gemini writes, online and in batches, against the local Vertex AI."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from backends.base import Backend, Sample, SampleRequest, SampleSettings
from backends.errors import ModelNotUsableError
from backends.vertex import samples
from backends.vertex.batch import VertexBatchBackend, VertexBatchOptions
from backends.vertex.online import VertexOnlineBackend, VertexOnlineOptions
from kl.input.responses import parse_responses
from kl.input.writer import response_document
from kl.records import Prompt, ScoreFailure, Turn
from tests.vertex_world.models import ModelSpec
from tests.vertex_world.world import VertexWorld

P = "gemini-2.5-flash-lite"
PROJECT = "stand-in-project"
Results = dict[str, Sample | ScoreFailure]
Take = Callable[..., Results]


def requests(n: int = 6, name: str = "key", **settings: Any) -> list[SampleRequest]:
    chosen = SampleSettings(**({"max_tokens": 12, "seed": 5} | settings))
    prompts = [Prompt((Turn("user", f"Question {index}?"),), "Be brief.") for index in range(n)]
    return [
        SampleRequest(f"{name}-{number}-{index}", f"{number}#{index}", P, prompt, chosen, index)
        for number, prompt in enumerate(prompts)
        for index in range(2)
    ]


async def taken(backend: Backend, asked: list[SampleRequest]) -> Results:
    async with backend:
        found = [result async for result in backend.sample(asked)]
    assert sorted(result.key for result in found) == sorted(request.key for request in asked)
    return {result.key: result for result in found}


@pytest.fixture(params=["online", "batch"])
def take(request: pytest.FixtureRequest, in_vertex_world: VertexWorld, tmp_path: Path) -> Take:
    """Sample with a backend that keeps its state in one folder over several calls."""

    def run(asked: list[SampleRequest]) -> Results:
        backend: Backend = VertexOnlineBackend(VertexOnlineOptions(project_id=PROJECT))
        if request.param == "batch":
            options = VertexBatchOptions(project_id=PROJECT, poll_interval_s=0.05, output_deadline_s=3.0)
            backend = VertexBatchBackend(options, tmp_path / "state")
        return asyncio.run(taken(backend, asked))

    return run


def test_a_response_has_the_models_own_list_at_every_token(take: Take, in_vertex_world: VertexWorld) -> None:
    in_vertex_world.language_model.eos_probability = 0.05
    in_vertex_world.faults.eos_logprobs = "always"
    asked = requests()
    results = take(asked)
    assert in_vertex_world.rejected == []
    assert set(in_vertex_world.rows_bought.values()) == {1}
    stops = 0
    for request in asked:
        sample = results[request.key]
        assert isinstance(sample, Sample), sample
        response, prefix = sample.response, ""
        for position in response.positions:
            turns = [(turn.role, turn.content) for turn in request.prompt.turns]
            known = in_vertex_world.language_model.distribution(P, turns, "Be brief.", prefix)
            best = np.sort(known.logprobs)[::-1][:20]
            assert [item.logprob for item in position.top] == pytest.approx(best.tolist(), abs=1e-5)
            prefix += position.sampled.token
        assert prefix == response.text
        assert response.has_stop == (response.finish_reason == "STOP")
        assert sample.output_tokens == len(response.positions) - response.has_stop
        assert sample.input_tokens
        assert (response.model_version, response.sampling.temperature) == (P, 1.0)
        stops += response.has_stop
        read = parse_responses(json.dumps(response_document(request.prompt, P, {}, [response])).encode(), "a.json")
        assert not read.problems
        assert read.responses[0].has_stop == response.has_stop
        assert len(read.responses[0].positions) == len(response.positions)
    assert 0 < stops


def test_the_same_requests_get_the_same_responses_and_other_seeds_others(take: Take) -> None:
    first, again, other = take(requests(1)), take(requests(1, "again")), take(requests(1, "other", seed=6))
    texts = [
        [item.response.text for _, item in sorted(results.items()) if isinstance(item, Sample)]
        for results in (first, again, other)
    ]
    assert texts[0] == texts[1] != texts[2]
    assert texts[0][0] != texts[0][1]
    # Its second response has the seed of the first one's third: the seed is what decides.
    assert texts[2][0] == texts[0][1]


@pytest.mark.parametrize(
    ("fault", "reason", "message"),
    [
        ("thoughts_rate", "hidden-thinking", "the model thought for 12 tokens"),
        ("short_lists_rate", "lists-missing", "11 chosen candidates for 12 tokens"),
        ("blocked_rate", "blocked", "blocked the prompt: PROHIBITED_CONTENT"),
        ("failing_rate", "refused", "Request contains an invalid argument"),
    ],
)
def test_what_is_of_no_use_is_refused_with_its_reason_and_stops_nothing(
    fault: str, reason: str, message: str, take: Take, in_vertex_world: VertexWorld
) -> None:
    in_vertex_world.language_model.eos_probability = 0.0
    setattr(in_vertex_world.faults, fault, 0.4)
    results = take(requests())
    failed = [result for result in results.values() if isinstance(result, ScoreFailure)]
    assert 0 < len(failed) < len(results)
    assert {failure.reason for failure in failed} == {reason}
    assert reason == "refused" or all(failure.final for failure in failed)
    assert all(message in failure.message for failure in failed)


def test_a_job_that_was_begun_is_taken_up_and_rows_without_keys_are_found(
    in_vertex_world: VertexWorld, tmp_path: Path
) -> None:
    faults = in_vertex_world.faults
    faults.drop_keys = faults.mangle_echo = faults.shuffle_rows = True
    faults.row_error_rate, faults.job_outcomes = 0.3, [("EXPIRED", 0.5)]
    asked = requests()
    options = VertexBatchOptions(project_id=PROJECT, poll_interval_s=0.05, output_deadline_s=3.0)

    async def begun() -> None:
        in_vertex_world.hurry(30)
        async with VertexBatchBackend(options, tmp_path / "state") as backend:
            work = asyncio.ensure_future(anext(aiter(backend.sample(asked))))
            while not backend.in_flight() or not in_vertex_world.jobs:
                await asyncio.sleep(0.02)
            work.cancel()

    asyncio.run(begun())
    in_vertex_world.hurry()
    results = asyncio.run(taken(VertexBatchBackend(options, tmp_path / "state"), asked))
    assert all(isinstance(result, Sample) for result in results.values())
    assert set(in_vertex_world.rows_bought.values()) == {1}
    assert len(in_vertex_world.rows_bought) == len(asked)


def test_a_response_goes_on_from_a_prefix(take: Take, in_vertex_world: VertexWorld) -> None:
    (request, *_) = requests(1)
    prefixed = replace(request, prefix="lo mi")
    sample = take([prefixed])[request.key]
    assert isinstance(sample, Sample)
    known = in_vertex_world.language_model.distribution(P, [("user", "Question 0?")], "Be brief.", "lo mi")
    assert sample.response.positions[0].top[0].logprob == pytest.approx(known.logprobs.max(), abs=1e-5)


def test_the_preflight_of_sampling_needs_no_prefill_but_lists_without_thoughts(
    make_vertex_world: Callable[..., VertexWorld], monkeypatch: pytest.MonkeyPatch
) -> None:
    models = {
        "writer": ModelSpec("writer-1", prefill=False, thinking="none"),
        "thinker": ModelSpec("thinker-1", thinking="on"),
        "silent": ModelSpec("silent-1", logprobs=False, thinking="none"),
    }
    world = make_vertex_world(models=models)
    for name, value in world.environment().items():
        monkeypatch.setenv(name, value)

    async def proven(model: str, **settings: Any) -> str | None:
        async with VertexOnlineBackend(VertexOnlineOptions(project_id=PROJECT)) as backend:
            return await backend.preflight_sampling(model, SampleSettings(**settings))

    assert asyncio.run(proven("writer")) == "writer-1"
    for model, message in [
        ("thinker", "cannot be sampled: the model thought for 8 tokens"),
        ("silent", "gives no log-probabilities"),
        ("gemini-2.5-pro", "always thinks"),
        ("gemini-0", "was not found"),
    ]:
        with pytest.raises(ModelNotUsableError, match=message):
            asyncio.run(proven(model))


def test_an_answer_that_ends_at_once_without_a_list_is_a_failure_that_may_pass() -> None:
    (request, *_) = requests(1)
    answer = {"candidates": [{"content": {"role": "model"}, "finishReason": "STOP"}], "usageMetadata": {}}
    failure = samples.read_sample(request, json.dumps(answer).encode())
    assert isinstance(failure, ScoreFailure)
    assert (failure.reason, failure.final) == ("no-logprobs", False)
    assert isinstance(samples.read_row(request, {"response": {"candidates": 3}}), ScoreFailure)


def test_a_seed_beyond_what_the_service_takes_is_brought_within() -> None:
    settings = SampleSettings(seed=2**31 - 1)
    assert samples.generation_config(P, settings, 1)["seed"] == 0
