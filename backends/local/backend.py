"""A real small language model in this process: nothing to sign up for, and exact full-vocabulary log-probabilities.

One forward pass gives every position of a response. All work is given out by one thread of its own, step by step, so
that the event loop stays free; the requests of several tasks go through the model together.
"""

from __future__ import annotations

import asyncio
import functools
import os
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar, TypeVar

from backends.base import Backend, BackendOptions, Capabilities, Sample, SampleRequest, ScoreRequest
from backends.local.contexts import caught, contexts_of, lengths, together
from backends.local.engine import ENGINE
from backends.local.gguf import BACKEND, find_packages
from backends.local.models import LocalModel, check_model, find_file, find_model, load_model, template_of
from backends.local.sampling import sample_steps
from backends.local.units import Prepared
from backends.local.work import steps
from kl.records import Prompt, Score, ScoreFailure

_ENGINE = "local engine"
T = TypeVar("T")


class LocalBackend(Backend):
    """Runs llama-architecture GGUF files with numpy, float32, on as many cores as BLAS is allowed."""

    Options: ClassVar[type[BackendOptions]] = BackendOptions
    name = BACKEND
    needs = ("the extra local (uv sync --extra local), or a llama-architecture GGUF file named by its path",)
    capabilities: ClassVar[Capabilities] = Capabilities(
        max_top_logprobs=1000,
        full_vocabulary=True,
        samples=True,
        token_ids=True,
        remote=False,
        exact_pairs=True,
        wanted_tokens=True,
    )

    @classmethod
    def identity(cls, options: BackendOptions, request: ScoreRequest) -> dict[str, Any]:
        """The engine, the content of the model file, its rounding, and what is reported.

        Raises
        ------
        ModelNotUsableError, MissingDependencyError
            If there is no such model file.
        """
        source = find_model(request.model)
        return {
            "engine": ENGINE,
            "weights_sha256": source.sha256,
            "rounding": source.rule,
            "top_logprobs": request.top_logprobs,
            "full": request.full_vocabulary,
        }

    def check(self, model: str) -> None:
        """The packages, and that there is such a model file; its content is looked at later.

        Raises
        ------
        ModelNotUsableError, MissingDependencyError
            In one line.
        """
        find_packages()
        find_file(model)

    async def preflight(self, model: str) -> str:
        """Check the model's header, its vocabulary and its chat template; returns file name and content hash.

        Raises
        ------
        ModelNotUsableError, MissingDependencyError
            In one line, with what was found and what to do.
        """

        def check() -> str:
            source = find_model(model)
            check_model(source)
            return source.version

        return await _in_worker(check)

    async def rendered_prompt(self, prompt: Prompt, model: str) -> str:
        """The conversation as the chat template in the model file writes it.

        Raises
        ------
        PromptRefusedError
            If the model has no form for the prompt.
        """
        return await _in_worker(lambda: template_of(find_model(model)).text(prompt))

    async def count_prompt_tokens(self, model: str, prompts: Sequence[Prompt]) -> list[int | None]:
        """By the tokenizer and the template in the model file, whose weights are not read."""
        return await _in_worker(lambda: lengths(template_of(find_model(model)), prompts))

    def parallel_groups(self) -> int:
        """More than one, so that short responses, too, fill the matrices that go through the model."""
        return 8

    async def score(self, requests: Sequence[ScoreRequest]) -> AsyncIterator[Score | ScoreFailure]:
        """Yield one result for each key asked; results of a response come as its chunks are done."""
        results = _score_steps(requests)
        while (some := await _in_worker(functools.partial(next, results, None))) is not None:
            for result in some:
                yield result

    async def sample(self, requests: Sequence[SampleRequest]) -> AsyncIterator[Sample | ScoreFailure]:
        """Write responses. Their lists come from the same pass that `score` makes, so P against itself gives 0.

        Raises
        ------
        ModelNotUsableError, MissingDependencyError
            If a model cannot be used.
        """
        steps = sample_steps(requests)
        while (result := await _in_worker(functools.partial(next, steps, None))) is not None:
            yield result


@functools.cache
def _worker(process_id: int) -> ThreadPoolExecutor:
    # One thread: the engine is one at a time, and waiting for it must not fill the event loop's own pool. By process,
    # because a forked child inherits the object but not its thread.
    return ThreadPoolExecutor(max_workers=1, thread_name_prefix="local-model")


async def _in_worker(work: Callable[[], T]) -> T:
    return await asyncio.get_running_loop().run_in_executor(_worker(os.getpid()), work)


# Scoring: from a request to sequences of ids, from these to scores.


def _score_steps(requests: Sequence[ScoreRequest]) -> Iterator[list[Score | ScoreFailure]]:
    """Results step by step."""
    groups: list[list[Prepared[LocalModel]]] = []
    for group in together(requests):
        prepared: list[Prepared[LocalModel]] = []
        groups.append(prepared)
        for request in group:
            yield from caught(request.name, request.keys, _prepare(request, prepared), _ENGINE)
    for prepared, results in zip(groups, steps(groups), strict=True):
        yield []  # so that of calls made at once all are known before the first is computed
        keys = [asked.key for each in prepared for asked in each.asked]
        yield from caught(prepared[0].request.name if prepared else "", keys, results, _ENGINE)


def _prepare(request: ScoreRequest, prepared: list[Prepared[LocalModel]]) -> Iterator[list[ScoreFailure]]:
    """Find what is computed; gives the positions that cannot be."""
    model = load_model(find_model(request.model))
    contexts, refused = contexts_of(request, model.tokenizer, model.template, model.engine.config.context_length)
    yield refused
    prepared.append(Prepared(request, model, contexts))
