"""What is estimated, and counted before anything is bought, against what the service then counts."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from backends.base import Backend, Sample, SampleRequest, SampleSettings, ScoreRequest
from backends.service.counting import TextSample, TokenCounts, count_texts
from backends.vertex.batch import VertexBatchBackend, VertexBatchOptions
from backends.vertex.online import VertexOnlineBackend, VertexOnlineOptions
from kl.records import Prompt, Score, Turn
from kl.text_tokens import prompt_tokens_of
from tests.counted_texts import FIVE_SCRIPTS
from tests.vertex_world.language_model import SyntheticModel, build_vocabulary
from tests.vertex_world.world import VertexWorld

Q = "gemini-2.5-flash"
PROJECT = "stand-in-project"
N_TOKENS = 8000
PROMPTS = [Prompt((Turn("user", item.text),)) for item in FIVE_SCRIPTS]
REAL = {item.text: item.tokens for item in FIVE_SCRIPTS}
# Of a service with another vocabulary, whatever the rule says: two bytes a token.
FOREIGN = {text: len(text.encode()) // 2 for text in REAL}

Make = Callable[..., Backend]


@pytest.fixture(params=["online", "batch"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Make:
    def made() -> Backend:
        if request.param == "online":
            return VertexOnlineBackend(VertexOnlineOptions(project_id=PROJECT), tmp_path / "state")
        options = VertexBatchOptions(project_id=PROJECT, poll_interval_s=0.05, output_deadline_s=3.0)
        return VertexBatchBackend(options, tmp_path / "state")

    return made


@pytest.fixture
def world_of(make_vertex_world: Callable[..., VertexWorld], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """This process lives in a world that counts the texts so."""

    def start(token_counts: dict[str, int]) -> VertexWorld:
        world = make_vertex_world(language_model=SyntheticModel(token_counts=token_counts))
        world.hurry()
        for name, value in world.environment().items():
            monkeypatch.setenv(name, value)
        return world

    return start


def long_request(prompt: Prompt, positions: tuple[int, ...], number: int = 0) -> ScoreRequest:
    """Positions of a response of 8,000 tokens of the service's vocabulary."""
    text, ends = long_response()
    keys = tuple(f"{number:08x}{position:024x}" for position in positions)
    return ScoreRequest("r", Q, prompt, text, ends, None, positions, keys, 20)


@cache
def long_response() -> tuple[str, tuple[int, ...]]:
    texts, _ = build_vocabulary(1000)
    words = [text for text in texts if text.startswith(" ") and text.strip().isascii() and text.strip()]
    tokens = [words[index] for index in np.random.default_rng(0).integers(0, len(words), N_TOKENS)]
    return "".join(tokens), tuple(np.cumsum([0, *map(len, tokens)])[:-1].tolist())


def counts_of(backend: Backend, requests: list[ScoreRequest]) -> TokenCounts:
    async def work() -> TokenCounts:
        async with backend:
            return await count_texts(backend, drawn(requests))

    return asyncio.run(work())


def drawn(requests: list[ScoreRequest]) -> TextSample:
    sample = TextSample()
    for request in requests:
        sample.note_prompt(Q, request.prompt, len(request.positions), 0)
        sample.note_response(request)
    return sample


def estimated(backend: Backend, request: ScoreRequest, counts: TokenCounts) -> int:
    work = type(backend).estimate(backend.options, request)
    script = prompt_tokens_of(request.prompt).script
    return counts.corrected(work, Q, script, type(backend), backend.options).input_tokens


def taken(backend: Backend, requests: list[ScoreRequest]) -> dict[str, int]:
    """What the service counts of each key."""

    async def work() -> dict[str, int]:
        async with backend:
            results = [result async for result in backend.score(requests)]
        assert all(isinstance(result, Score) for result in results), results
        return {result.key: result.input_tokens or 0 for result in results if isinstance(result, Score)}

    return asyncio.run(work())


@pytest.mark.parametrize(
    ("token_counts", "is_counted"), [(REAL, False), (FOREIGN, True)], ids=["by rule alone", "counted"]
)
def test_five_scripts_and_8000_tokens_are_estimated_as_they_are_counted(
    world_of: Callable[..., VertexWorld], make: Make, token_counts: dict[str, int], is_counted: bool
) -> None:
    """Each script to 15 %, at positions all over the response and over the whole of it.

    The service's own count rises by a token a position, so that its sum over 8,000 follows from the counts of some.
    """
    world = world_of(token_counts)
    spread = (0, 700, 7999)
    asked = [long_request(prompt, spread, number) for number, prompt in enumerate(PROMPTS)]
    whole = [long_request(prompt, tuple(range(N_TOKENS)), number) for number, prompt in enumerate(PROMPTS)]
    counts = counts_of(make(), whole) if is_counted else TokenCounts()
    assert counts.n_prompts == (len(PROMPTS) if is_counted else 0)
    backend = make()
    found = taken(backend, asked)
    for some, request in zip(asked, whole, strict=True):
        by_position = dict(zip(spread, (found[key] for key in some.keys), strict=True))
        n_prompt = by_position[0]
        assert n_prompt == token_counts[request.prompt.turns[0].content]
        assert by_position == {position: n_prompt + position for position in spread}
        first = long_request(request.prompt, (0,))
        assert estimated(backend, first, counts) == pytest.approx(n_prompt, rel=0.15)
        total = N_TOKENS * n_prompt + sum(range(N_TOKENS))
        assert estimated(backend, request, counts) == pytest.approx(total, rel=0.15)
    assert world.rejected == []


@pytest.mark.parametrize("token_counts", [REAL, FOREIGN], ids=["by rule alone", "counted"])
def test_a_sampling_in_five_scripts_is_estimated_as_it_is_counted(
    world_of: Callable[..., VertexWorld], make: Make, token_counts: dict[str, int]
) -> None:
    world_of(token_counts)
    settings = SampleSettings(max_tokens=4)
    asked = [SampleRequest(f"{index:032x}", str(index), Q, prompt, settings) for index, prompt in enumerate(PROMPTS)]

    async def work() -> tuple[TokenCounts, dict[str, int]]:
        async with make() as backend:
            sample = TextSample()
            for request in asked:
                sample.note_prompt(Q, request.prompt, 1, 0)
            counts = await count_texts(backend, sample) if token_counts is FOREIGN else TokenCounts()
            results = [result async for result in backend.sample(asked)]
            return counts, {item.key: item.input_tokens or 0 for item in results if isinstance(item, Sample)}

    counts, found = asyncio.run(work())
    backend = make()
    for request in asked:
        work_of_one = type(backend).estimate_sample(backend.options, request)
        script = prompt_tokens_of(request.prompt).script
        fixed = counts.corrected(work_of_one, Q, script, type(backend), backend.options)
        assert fixed.input_tokens == pytest.approx(found[request.key], rel=0.15)
        assert fixed.output_tokens == 4


def test_system_text_and_turns_are_counted_with_the_prompt(in_vertex_world: VertexWorld, make: Make) -> None:
    turns = (Turn("user", "mi lo"), Turn("model", " ka"), Turn("user", "7"))
    bare, system = Prompt(turns), Prompt(turns, "12345")

    async def work() -> Any:
        async with make() as backend:
            return await backend.count_prompt_tokens(Q, [bare, system, Prompt((Turn("user", ""),))])

    counted = asyncio.run(work())
    assert counted[1] == counted[0] + 5
    assert in_vertex_world.rejected == []


def test_the_developer_api_counts_the_system_text_as_a_turn(
    in_vertex_world: VertexWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GOOGLE_CLOUD_PROJECT", raising=False)
    monkeypatch.setenv("GOOGLE_API_KEY", in_vertex_world.api_key)
    monkeypatch.setenv("GOOGLE_GEMINI_BASE_URL", in_vertex_world.environment()["GOOGLE_VERTEX_BASE_URL"])

    async def work() -> Any:
        async with VertexOnlineBackend(VertexOnlineOptions()) as backend:
            return await backend.count_prompt_tokens(Q, [Prompt((Turn("user", "77"),), "12345")])

    assert asyncio.run(work()) == [7]


def test_a_service_that_does_not_count_is_asked_once_and_the_rule_stands(
    in_vertex_world: VertexWorld, caplog: pytest.LogCaptureFixture
) -> None:
    requests = [long_request(prompt, (0,), number) for number, prompt in enumerate(PROMPTS)]
    in_vertex_world.faults.slow_s = 0.5

    async def work() -> None:
        async with VertexOnlineBackend(VertexOnlineOptions(project_id=PROJECT)) as backend:
            for fault in ("403", "404", "429", "500", "reset", "slow", "401"):
                in_vertex_world.faults.http["count"] = {fault: 1.0}
                caplog.clear()
                n_before = n_counted(in_vertex_world)
                assert await count_texts(backend, drawn(requests), deadline_s=0.2) == TokenCounts(), fault
                lines = [item for item in caplog.records if item.name == "backends.service.counting"]
                assert len(lines) == 1, fault
                assert n_counted(in_vertex_world) - n_before <= (1 + len(PROMPTS)) * (2 if fault == "401" else 1), fault

    with caplog.at_level(logging.INFO, logger="backends"):
        asyncio.run(work())


def n_counted(world: VertexWorld) -> int:
    return sum(":countTokens" in line.path for line in world.requests)
