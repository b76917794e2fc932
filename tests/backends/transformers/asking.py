"""Requests of responses on disk or of texts, and backends asked about them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from backends.base import Backend, Sample, SampleRequest, ScoreRequest
from backends.transformers.backend import TransformersBackend
from kl.records import Prompt, Score, ScoreFailure, Turn
from tests import ROOT

Results = dict[str, Score | ScoreFailure]


def request(model: str, texts: Sequence[str], ids: Sequence[int] | None = None, **changes: Any) -> ScoreRequest:
    """All positions of a response of these tokens."""
    ends = np.cumsum([0, *map(len, texts[:-1])]).tolist()
    positions = tuple(range(len(texts)))
    made = ScoreRequest(
        name="a",
        model=model,
        prompt=Prompt((Turn("user", "What is 17 + 25? <|im_end|>"),)),
        text="".join(texts),
        prefix_ends=tuple(ends),
        token_ids=None if ids is None else tuple(ids),
        positions=positions,
        keys=tuple(f"{model} {position}" for position in positions),
        top_logprobs=20,
    )
    return replace(made, **changes)


def example(model: str, number: int, n: int, **changes: Any) -> ScoreRequest:
    """The first tokens of a response of the example files."""
    document = json.loads(sorted((ROOT / "examples/responses").glob("*.json"))[number].read_text(encoding="utf-8"))
    content = document["responses"][0]["logprobs"]["content"][:n]
    made = request(model, [entry["token"] for entry in content], [entry["token_id"] for entry in content], **changes)
    keys = tuple(f"{model} {number} {position}" for position in made.positions)
    return replace(made, name=str(number), prompt=Prompt((Turn("user", document["prompt"]),)), keys=keys)


def paired(one: ScoreRequest, other: ScoreRequest) -> list[ScoreRequest]:
    """Both, compared with each other position by position."""
    return [
        replace(one, counterparts=other.keys, full_vocabulary=True),
        replace(other, counterparts=one.keys, full_vocabulary=True),
    ]


def ask(requests: Sequence[ScoreRequest], kind: type[Backend] = TransformersBackend, **options: Any) -> Results:
    """What a fresh backend answers to one call."""

    async def collect() -> list[Score | ScoreFailure]:
        async with kind(kind.Options.model_validate(options)) as backend:
            return [result async for result in backend.score(requests)]

    results = asyncio.run(collect())
    assert len(results) == sum(len(request.keys) for request in requests)
    return {result.key: result for result in results}


def scores(requests: Sequence[ScoreRequest], **options: Any) -> list[Score]:
    """The scores of all contexts, in the order of the requests."""
    found = ask(requests, **options)
    results = [found[key] for request in requests for key in request.keys]
    assert all(isinstance(result, Score) for result in results), results
    return [result for result in results if isinstance(result, Score)]


def sample(
    requests: Sequence[SampleRequest], kind: type[Backend] = TransformersBackend, **options: Any
) -> list[Sample]:
    """Responses that a fresh backend writes."""

    async def collect() -> list[Sample | ScoreFailure]:
        async with kind(kind.Options.model_validate(options)) as backend:
            return [result async for result in backend.sample(requests)]

    results = asyncio.run(collect())
    assert all(isinstance(result, Sample) for result in results), results
    return [result for result in results if isinstance(result, Sample)]
