"""Requests as the flow makes them, and a backend used as the flow uses it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from backends.base import Backend, BackendOptions, ScoreRequest
from backends.keys import context_keys
from kl.input.responses import read_responses
from kl.records import Response, Score, ScoreFailure
from tests.vertex_world.fixtures import in_vertex_world, make_vertex_world, vertex_world
from tests.vertex_world.world import VertexWorld

__all__ = ["in_vertex_world", "make_vertex_world", "vertex_world"]

P, Q = "gemini-2.5-flash-lite", "gemini-2.5-flash"
Results = dict[str, Score | ScoreFailure]


def request_for(response: Response, backend: type[Backend], options: BackendOptions, model: str = Q) -> ScoreRequest:
    """All contexts of a response, asked of ``model`` by text."""
    bare = ScoreRequest(
        name=response.name,
        model=model,
        prompt=response.prompt,
        text=response.text,
        prefix_ends=tuple(response.prefix_ends().tolist()),
        token_ids=None,
        positions=(),
        keys=(),
        top_logprobs=20,
    )
    tokens = [position.sampled.token for position in response.positions]
    keys = tuple(context_keys(model, response.prompt, backend.identity(options, bare), tokens))
    return replace(bare, positions=tuple(range(len(keys))), keys=keys)


@pytest.fixture
def responses(in_vertex_world: VertexWorld, tmp_path: Path) -> Callable[..., list[Response]]:
    """Responses that model P of the world wrote."""

    def write(prompts: int = 4, n: int = 2, max_tokens: int = 20, seed: int = 1) -> list[Response]:
        texts = [f"Question {index}?" for index in range(prompts)]
        paths = in_vertex_world.write_responses(tmp_path / "in", P, texts, n=n, max_tokens=max_tokens, seed=seed)
        files = [read_responses(path, path.name) for path in paths]
        assert not any(file.problems for file in files)
        return [response for file in files for response in file.responses]

    return write


def distinct(requests: Sequence[ScoreRequest]) -> list[ScoreRequest]:
    """The requests with every context asked once over all of them, as the flow plans them."""
    seen: set[str] = set()
    planned: list[ScoreRequest] = []
    for request in requests:
        left = request.only(set(request.keys) - seen)
        seen.update(left.keys)
        if left.keys:
            planned.append(left)
    return planned


def score_all(backend: Backend, groups: Sequence[Sequence[ScoreRequest]]) -> Results:
    """Every group scored at the same time, in one process, as a run does; each key answered exactly once."""

    async def work() -> Results:
        async with backend:
            found = await asyncio.gather(*(_score(backend, group) for group in groups))
        return {result.key: result for results in found for result in results}

    return asyncio.run(work())


async def _score(backend: Backend, group: Sequence[ScoreRequest]) -> list[Score | ScoreFailure]:
    results = [result async for result in backend.score(group)]
    asked = {key for request in group for key in request.keys}
    assert sorted(result.key for result in results) == sorted(asked)
    return results
