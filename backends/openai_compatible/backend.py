"""Any server that speaks OpenAI's HTTP interface and gives log-probabilities: vLLM, llama.cpp, SGLang, hosted services.

What the server is, and how it can be asked, is found out and proven before anything is planned (`proofs`); it belongs
to the identity of every score.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any, ClassVar, Self

from backends.base import (
    Backend,
    BackendOptions,
    Capabilities,
    Sample,
    SampleRequest,
    ScoreRequest,
    WorkEstimate,
)
from backends.errors import ModelNotUsableError, RetryableBackendError
from backends.openai_compatible.client import Client
from backends.openai_compatible.found import Found, Record
from backends.openai_compatible.options import OpenAICompatibleOptions
from backends.openai_compatible.proofs import LONGEST, probe_again, prove
from backends.openai_compatible.sampling import write
from backends.openai_compatible.scoring import Scorer
from backends.service.bought import BoughtAnswers
from backends.service.limit import CallLimit
from backends.service.merging import merged
from backends.settings import SampleSettings
from kl.records import Prompt, Score, ScoreFailure

logger = logging.getLogger(__name__)

_LOOK_S, _LOOK_ON_RECORD_S = 60.0, 5.0


class OpenAICompatibleBackend(Backend):
    """Asks a server with OpenAI's interface: vLLM, llama.cpp, SGLang, or a hosted service that gives lists."""

    Options: ClassVar[type[BackendOptions]] = OpenAICompatibleOptions
    name = "openai_compatible"
    needs = ("a server (base_url) that gives log-probabilities and continues a prefill; hosted ones: a key",)
    capabilities: ClassVar[Capabilities] = Capabilities(
        max_top_logprobs=LONGEST, samples=True, token_ids=True, one_pass=True, discovers=True, wanted_tokens=True
    )
    options: OpenAICompatibleOptions

    def __init__(self, options: OpenAICompatibleOptions, state_dir: Path | None = None) -> None:
        super().__init__(options, state_dir)
        self._found: dict[str, Found] = {} if options.found is None else {options.found.model: options.found}
        self._scorers: dict[str, Scorer] = {}
        self._looking = asyncio.Lock()
        self._stopped: str | None = None
        self._calls: Counter[str] = Counter()
        self._bought = BoughtAnswers(state_dir)

    async def __aenter__(self) -> Self:
        options = self.options
        self._client = Client(options.address, options.credentials(), options.request_timeout_s)
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._client.aclose()

    @classmethod
    def identity(cls, options: BackendOptions, request: ScoreRequest) -> dict[str, Any]:
        """What the server is, how it is asked, and how long the list is.

        Raises
        ------
        ModelNotUsableError
            If the server does not have the model, or gives no lists of that length.
        """
        assert isinstance(options, OpenAICompatibleOptions)
        found = options.found
        if found is not None and found.served and request.model not in found.served:
            raise ModelNotUsableError(
                f"the server has no model {request.model!r}; it has {', '.join(sorted(found.served))}.",
                permanent=True, model=request.model,
            )  # fmt: skip
        if found is not None:
            _check_length(found, request)
        return _identity(options, request.model, request.top_logprobs)

    @classmethod
    def sampling_identity(cls, options: BackendOptions, model: str, settings: SampleSettings) -> dict[str, Any]:
        """The same of a model that writes, which may be asked with mode write."""
        assert isinstance(options, OpenAICompatibleOptions)
        return _identity(options, model, settings.top_logprobs)

    @classmethod
    def cost_usd(cls, options: BackendOptions, model: str, input_tokens: int, output_tokens: int) -> float | None:
        """By the prices that the options state; None where they state none."""
        assert isinstance(options, OpenAICompatibleOptions)
        if options.usd_per_million_input is None or options.usd_per_million_output is None:
            return None
        return (input_tokens * options.usd_per_million_input + output_tokens * options.usd_per_million_output) / 1e6

    @classmethod
    def estimate(cls, options: BackendOptions, request: ScoreRequest) -> WorkEstimate:
        """As for all; where one request asks all positions, a response's tokens are charged once."""
        assert isinstance(options, OpenAICompatibleOptions)
        work = super().estimate(options, request)
        if not request.positions or options.found is None or options.found.route != "prompt":
            return work
        alone = super().estimate(options, request.only({request.keys[-1]}))
        input_tokens = alone.input_tokens + 1
        cost = cls.cost_usd(options, request.model, input_tokens, 1)
        return WorkEstimate(work.requests, alone.request_bytes, input_tokens, 1, cost, alone.prompt_tokens)

    def parallel_groups(self) -> int:
        """As many as may be in flight, some at least."""
        return max(4, min(self.options.max_concurrent, 50))

    def in_flight(self) -> Mapping[str, str]:
        """The responses whose answers an earlier run has on disk."""
        return dict.fromkeys(self._bought.recall(), "an answer on disk")

    def report(self) -> dict[str, Any]:
        """What each model was found to be, how it was asked, the noise, and the calls."""
        return {
            "calls": dict(sorted(self._calls.items())),
            "servers": {model: described(found, self.options) for model, found in sorted(self._found.items())},
        }

    def check(self, model: str) -> None:
        """The address, and the variables that hold credentials."""
        _ = self.options.address, self.options.credentials()

    # Finding out.

    def _record(self, model: str) -> Record:
        options = self.options
        return Record(
            self.state_dir, options.address, model, options.mode, options.preset, options.template, options.cache,
            options.body,
        )  # fmt: skip

    async def discover(self, model: str, *, call: bool = True) -> BackendOptions:
        """Find out and prove what the server is; what is on record serves where the server is the same, or away."""
        record = self._record(model)
        known = record.all()
        if not call:
            return self._with(known[-1]) if known else self.options
        try:
            found = await self._looked_up(model, known)
        except RetryableBackendError as error:
            if not known:
                raise ModelNotUsableError(
                    f"the server at {self.options.address} does not answer: {error}. Start it, or set base_url.",
                    model=model,
                ) from error
            logger.warning("the server does not answer (%s); what is on record serves", error)
            found = known[-1]
        record.keep(found)
        self._found[model] = found
        return self._with(found)

    async def _looked_up(self, model: str, known: Sequence[Found]) -> Found:
        deadline_s = min(self.options.retry_deadline_s, _LOOK_ON_RECORD_S if known else _LOOK_S)
        for found in reversed(known):
            now = await probe_again(self._client, self.options, found, deadline_s=deadline_s)
            if now is not None:
                return now
        return await prove(self._client, self.options, model, deadline_s=deadline_s)

    def _with(self, found: Found) -> OpenAICompatibleOptions:
        return self.options.model_copy(update={"found": found})

    async def preflight(self, model: str) -> str | None:
        """Prove everything again; the server must be what it was when the work was planned.

        Raises
        ------
        ModelNotUsableError
            In one line, with what the server cannot do, or in what it changed.
        """
        try:
            now = await prove(self._client, self.options, model, deadline_s=min(self.options.retry_deadline_s, _LOOK_S))
        except RetryableBackendError as error:
            raise ModelNotUsableError(
                f"{model}: the server at {self.options.address} does not answer: {error}. Start it.", model=model
            ) from error
        before = self._found.get(model)
        if before is None and self.options.found is not None:
            before = self.options.found  # another model of the server, asked by the same rules
            _check_same(before, now, model, of_probe=False)
        elif before is not None:
            _check_same(before, now, model, of_probe=True)
            now = now.model_copy(update={"probe": before.probe, "probe_id": before.probe_id})
        self._found[model] = now
        if self.options.found is None:  # nobody planned by what was found: responses are to be written
            self._record(model).keep(now)
        logger.info("%s", "; ".join(f"{name}: {value}" for name, value in described(now, self.options).items()))
        return version_of(now)

    async def _scorer(self, model: str) -> Scorer:
        async with self._looking:
            if model not in self._found:
                await self.discover(model)
            if model not in self._scorers:
                found = self._found[model]
                limit = CallLimit(in_flight(found, self.options))
                if self._stopped is not None:
                    limit.stop(self._stopped)
                version = version_of(found)
                made = Scorer(self._client, self.options, found, limit, self._calls, version, self._bought)
                self._scorers[model] = await made.prepare()
            return self._scorers[model]

    def stop_asking(self, why: str) -> bool:
        """Make no further call; those in flight are answered."""
        self._stopped = why
        for scorer in list(self._scorers.values()):  # from another thread than the one that adds
            scorer.limit.stop(why)
        return True

    async def rendered_prompt(self, prompt: Prompt, model: str) -> str | None:
        """What the model is given for a prompt, where the server lends its tokenizer.

        Raises
        ------
        PromptRefusedError
            If the server cannot write the prompt.
        """
        return await (await self._scorer(model)).rendered(prompt)

    async def count_prompt_tokens(self, model: str, prompts: Sequence[Prompt]) -> list[int | None] | None:
        """Where the server lends its tokenizer."""
        vocabulary = (await self._scorer(model)).vocabulary
        return None if vocabulary is None else await vocabulary.counts(prompts)

    # Asking.

    async def score(self, requests: Sequence[ScoreRequest]) -> AsyncIterator[Score | ScoreFailure]:
        """Yield one result for each key asked."""
        waiting = iter([request.only(set(request.keys)) for request in requests if request.keys])

        async def work() -> AsyncGenerator[Score | ScoreFailure]:
            for request in waiting:
                scorer = await self._scorer(request.model)
                _check_length(scorer.found, request)
                async with aclosing(scorer.score(request)) as results:
                    async for result in results:
                        yield result

        workers = min(self.options.max_concurrent, len(requests)) or 1
        async with aclosing(merged([work() for _ in range(workers)])) as results:
            async for result in results:
                yield result

    async def sample(self, requests: Sequence[SampleRequest]) -> AsyncIterator[Sample | ScoreFailure]:
        """Write responses, a request each; answers of an earlier process that nobody read are read now."""
        waiting = iter(requests)
        self._bought.recall()

        async def work() -> AsyncGenerator[Sample | ScoreFailure]:
            for request in waiting:
                scorer = await self._scorer(request.model)
                yield await write(scorer, request)

        workers = min(self.options.max_concurrent, len(requests)) or 1
        async with aclosing(merged([work() for _ in range(workers)])) as results:
            async for result in results:
                yield result
                if isinstance(result, Sample) or result.final:
                    await self._bought.drop(result.key)


def _identity(options: OpenAICompatibleOptions, model: str, top_logprobs: int) -> dict[str, Any]:
    found = options.found
    asked = {
        "wire": "openai",
        "template": options.template,
        "cache": options.cache,
        "body": options.body,
        "top_logprobs": top_logprobs,
    }
    if found is None:
        return asked | {"address": options.base_url, "preset": options.preset, "mode": options.mode}
    return asked | found.identity(model)


def in_flight(found: Found, options: OpenAICompatibleOptions) -> int:
    """How many calls may be made at once: llama.cpp answers otherwise when it works on several."""
    if found.kind != "llama_cpp":
        return options.max_concurrent
    return 1 if options.cache == "off" else min(options.max_concurrent, found.slots)


def version_of(found: Found) -> str:
    """What reports call the model: its name, what runs it, and how it is rounded."""
    said = [found.fingerprint or found.server.get("version"), found.server.get("ftype")]
    words = ", ".join(str(word) for word in (found.kind, *said) if word)
    return f"{found.answers_as or found.model} ({words}, probe {found.probe_id[:8]})"


def described(found: Found, options: OpenAICompatibleOptions) -> dict[str, Any]:
    """What a report says of a server, as JSON types."""
    fast = found.kind == "llama_cpp" and options.cache == "fast"
    return {
        "server": found.kind,
        "facts": found.server,
        "mode": ("echo" if found.echo else "prompt_logprobs") if found.route == "prompt" else found.route,
        "prompt_form": found.form,
        "prefill": found.prefill,
        "longest_list": found.longest,
        "context_tokens": found.context,
        "noise_nats": found.noise_nats,
        "cache": "fast: answers depend on what was asked before, 0.0025 nats a token" if fast else "off",
        "after_sampling": found.after_sampling,
        "calls_at_once": in_flight(found, options),
        "fingerprint": found.fingerprint,
    }


def _check_length(found: Found, request: ScoreRequest) -> None:
    if found.route == "write":
        raise ModelNotUsableError(
            f"{request.model} is asked with mode write and cannot be Q: that it continues a beginning is unproven. "
            "Set backend.mode to auto.", permanent=True, model=request.model,
        )  # fmt: skip
    if request.top_logprobs > found.longest:
        how = " Start vLLM with --max-logprobs." if found.kind == "vllm" else ""
        raise ModelNotUsableError(
            f"top_logprobs is {request.top_logprobs}, and the server gives lists of {found.longest}.{how} "
            f"Set top_logprobs to {found.longest} or less.", model=request.model,
        )  # fmt: skip


def _check_same(before: Found, now: Found, model: str, *, of_probe: bool) -> None:
    one, two = before.identity(model), now.identity(model)
    changed = sorted(name for name in one.keys() & two.keys() - {"probe"} if one[name] != two[name])
    if of_probe and not before.same_weights(now):
        changed.append("weights (it answers a fixed question otherwise)")
    if changed:
        raise ModelNotUsableError(
            f"{model}: the server is not what it was when the work was planned; changed: "
            f"{', '.join(changed)}. Run again.",
            model=model,
        )
