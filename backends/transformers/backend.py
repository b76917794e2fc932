"""Checkpoints of Hugging Face as P and Q: every position of many responses in a forward pass.

Two models that are compared run side by side; their whole vocabularies become exact divergences and two lists on the
device that has them. All work is done by one thread, step by step, so that the event loop stays free, and the requests
of several tasks go through the models together.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar, TypeVar, cast

from backends.base import Backend, BackendOptions, Capabilities, Sample, SampleRequest, ScoreRequest
from backends.local.contexts import caught, contexts_of, lengths, together
from backends.local.units import Prepared
from backends.transformers.checkpoints import BACKEND, find_checkpoint, installed_versions
from backends.transformers.loading import LoadedModel, Models, words_of
from backends.transformers.options import TransformersOptions
from backends.transformers.passes import Passes
from backends.transformers.sampling import sample_steps
from backends.transformers.work import Scorer
from kl.records import Prompt, Score, ScoreFailure

_ENGINE = "transformers engine"
T = TypeVar("T")


class TransformersBackend(Backend):
    """Runs two checkpoints (folders, hub ids, GGUF files, adapters) with transformers, on a GPU or a processor."""

    Options: ClassVar[type[BackendOptions]] = TransformersOptions
    name = BACKEND
    needs = ("the extra hf and a build of torch for this machine (docs/transformers.md)",)
    capabilities: ClassVar[Capabilities] = Capabilities(
        max_top_logprobs=1000,
        full_vocabulary=True,
        samples=True,
        token_ids=True,
        remote=False,
        exact_pairs=True,
        one_pass=True,
        wanted_tokens=True,
    )

    def __init__(self, options: BackendOptions, state_dir: Path | None = None) -> None:
        super().__init__(options, state_dir)
        self._options = cast(TransformersOptions, options)
        self._models = Models()
        self._passes = Passes(self._options.tokens_per_pass, compiled=self._options.compile)
        self._scorer = Scorer(self._passes)
        self._worker: ThreadPoolExecutor | None = None

    async def __aexit__(self, *exc: object) -> None:
        """Give the models' memory back."""
        if self._worker is not None:
            await self._in_worker(self._models.release)
            self._worker.shutdown(wait=False)
            self._worker = None

    @classmethod
    def identity(cls, options: BackendOptions, request: ScoreRequest) -> dict[str, Any]:
        """The engine and its packages, the content of model and adapter, how they are loaded, and what is reported.

        Raises
        ------
        ModelNotUsableError, MissingDependencyError
            If there is no such model, or a package is missing.
        """
        made = find_checkpoint(request.model, cast(TransformersOptions, options)).identity()
        return made | {"top_logprobs": request.top_logprobs, "full": request.full_vocabulary}

    def check(self, model: str) -> None:
        """The packages."""
        installed_versions()

    async def preflight(self, model: str) -> str:
        """Load the model and prove that its head gives its logits; returns its name and content.

        Raises
        ------
        ModelNotUsableError, MissingDependencyError
            In one line, with what was found and what to do.
        """
        return await self._in_worker(lambda: self._load(model).checkpoint.version)

    async def rendered_prompt(self, prompt: Prompt, model: str) -> str:
        """The conversation as the checkpoint's chat template writes it.

        Raises
        ------
        PromptRefusedError
            If the model has no form for the prompt.
        """
        return await self._in_worker(lambda: self._load(model).template.text(prompt))

    async def count_prompt_tokens(self, model: str, prompts: Sequence[Prompt]) -> list[int | None]:
        """By the checkpoint's tokenizer and template; its weights are not loaded."""
        return await self._in_worker(lambda: lengths(words_of(find_checkpoint(model, self._options))[1], prompts))

    def parallel_groups(self) -> int:
        """More than one, so that short responses, too, fill a pass."""
        return 8

    async def score(self, requests: Sequence[ScoreRequest]) -> AsyncIterator[Score | ScoreFailure]:
        """Yield one result for each key asked, as the passes are done."""
        results = self._score_steps(requests)
        while (some := await self._in_worker(functools.partial(next, results, None))) is not None:
            for result in some:
                yield result

    async def sample(self, requests: Sequence[SampleRequest]) -> AsyncIterator[Sample | ScoreFailure]:
        """Write responses. Their lists come from the same pass that `score` makes, so P against itself gives 0.

        Raises
        ------
        ModelNotUsableError, MissingDependencyError
            If a model cannot be used.
        """
        steps = sample_steps(requests, self._load, self._passes)
        while (some := await self._in_worker(functools.partial(next, steps, None))) is not None:
            for result in some:
                yield result

    async def _in_worker(self, work: Callable[[], T]) -> T:
        if self._worker is None:
            self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="transformers")
        return await asyncio.get_running_loop().run_in_executor(self._worker, work)

    def _load(self, name: str) -> LoadedModel:
        return self._models.load(find_checkpoint(name, self._options))

    def _score_steps(self, requests: Sequence[ScoreRequest]) -> Iterator[list[Score | ScoreFailure]]:
        """Results step by step."""
        groups: list[list[Prepared[LoadedModel]]] = []
        for group in together(requests):
            prepared: list[Prepared[LoadedModel]] = []
            groups.append(prepared)
            for request in group:
                yield from caught(request.name, request.keys, self._prepare(request, prepared), _ENGINE)
        for prepared, steps in zip(groups, self._scorer.steps(groups), strict=True):
            keys = [asked.key for each in prepared for asked in each.asked]
            yield from caught(prepared[0].request.name if prepared else "", keys, steps, _ENGINE)

    def _prepare(self, request: ScoreRequest, prepared: list[Prepared[LoadedModel]]) -> Iterator[list[ScoreFailure]]:
        """Find what is computed; gives the positions that cannot be."""
        model = self._load(request.model)
        contexts, refused = contexts_of(request, model.tokenizer, model.template, model.limit)
        yield refused
        prepared.append(Prepared(request, model, contexts))
