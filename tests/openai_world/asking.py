"""Requests about a short response of the box's model, and a backend that is asked them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from backends.base import ScoreRequest
from backends.local.models import LocalModel, find_model, load_model
from backends.local.tokenizer import split_text
from backends.openai_compatible.backend import OpenAICompatibleBackend
from backends.openai_compatible.options import OpenAICompatibleOptions
from kl.records import Prompt, Score, ScoreFailure, Turn

BOX = "smollm2-135m"
PROMPT = Prompt((Turn("user", "Why is the sky blue?"),))
Results = list[Score | ScoreFailure]


def box() -> LocalModel:
    """The model of the numpy engine."""
    return load_model(find_model(BOX))


def request_of(text: str, *, ids: Sequence[int] | None = (), k: int = 5, model: str = "smol") -> ScoreRequest:
    """Every position of a response of the box's tokens; ``ids`` in place of these, None for none."""
    tokens = box().tokenizer.encode(text)
    pieces = split_text([box().tokenizer.token_bytes(index) for index in tokens])
    ends = [sum(map(len, pieces[:number])) for number in range(len(pieces))]
    given = None if ids is None else tuple(ids) or tuple(tokens)
    positions = tuple(range(len(tokens)))
    keys = tuple(f"{text}/{number}" for number in positions)
    return ScoreRequest(text, model, PROMPT, text, tuple(ends), given, positions, keys, k)


def asked(options: dict[str, Any], requests: Sequence[ScoreRequest], state: Path | None = None) -> tuple[Results, Any]:
    """(results in the order of the keys, the backend's report) of one backend that finds out whom it asks."""

    async def work() -> tuple[Results, Any]:
        async with OpenAICompatibleBackend(OpenAICompatibleOptions(**options), state_dir=state) as backend:
            found = {result.key: result async for result in backend.score(requests)}
            return [found[key] for request in requests for key in request.keys], backend.report()

    return asyncio.run(work())


def discovered(options: dict[str, Any], state: Path | None = None, model: str = "smol") -> OpenAICompatibleOptions:
    """The options with what was found out."""

    async def work() -> Any:
        async with OpenAICompatibleBackend(OpenAICompatibleOptions(**options), state_dir=state) as backend:
            return await backend.discover(model)

    return asyncio.run(work())


def reference(request: ScoreRequest, k: int = 5) -> list[list[float]]:
    """The best values of the numpy engine at each position of a request."""
    ids = [*box().template.encode(request.prompt), *(request.token_ids or box().tokenizer.encode(request.text))]
    first = len(ids) - len(request.prefix_ends)
    rows = [first - 1 + position for position in request.positions]
    values = [values for chunk in box().engine.logprobs(ids, rows) for _, values in chunk]
    return [sorted(map(float, each), reverse=True)[:k] for each in values]
