"""Vertex AI online prediction, and the Gemini Developer API where only an API key is set: the same requests, singly."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import aclosing
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Generic, NamedTuple, Self, TypeVar

from backends.base import BackendOptions, Capabilities, Sample, SampleRequest, ScoreRequest
from backends.errors import BackendError, RetryableBackendError
from backends.service.breaker import NOT_ASKED, PATIENCE_S, AskingStoppedError, Breaker
from backends.service.limit import CallLimit
from backends.service.merging import merged
from backends.service.retry import StatusError
from backends.vertex import answers, samples, wire
from backends.vertex.gemini import GeminiBackend
from backends.vertex.options import NEEDS, VertexOnlineOptions
from backends.vertex.service.calls import ask_once
from backends.vertex.service.client import check_location, developer_calls, model_calls, require_project
from backends.vertex.service.model_calls import ModelCalls
from backends.vertex.service.retry import DailyQuotaError, translated, with_retries
from backends.vertex.service.setup import INSTEAD
from kl.output.room import refusal_of
from kl.records import Score, ScoreFailure

A = TypeVar("A", bound=Score | Sample)
logger = logging.getLogger(__name__)

_FIRST_WAIT_S = 0.1
_FEWEST_GROUPS = 8
_MOST_GROUPS = 50


class _Call(NamedTuple, Generic[A]):
    """One call, and how its answer is read."""

    model: str
    key: str
    body: bytes
    read: Callable[[bytes], A | ScoreFailure]


class VertexOnlineBackend(GeminiBackend):
    """Scores and samples through ``generateContent``, one call a context or response."""

    Options: ClassVar[type[BackendOptions]] = VertexOnlineOptions
    name = "vertex_online"
    needs = (f"{NEEDS}; or GOOGLE_API_KEY, for the Gemini Developer API",)
    capabilities: ClassVar[Capabilities] = Capabilities(max_top_logprobs=wire.MAX_TOP_LOGPROBS, samples=True)
    options: VertexOnlineOptions

    def __init__(self, options: VertexOnlineOptions, state_dir: Path | None = None) -> None:
        super().__init__(options, state_dir)
        self._api_key = os.environ.get("GOOGLE_API_KEY") or os.environ.get("GEMINI_API_KEY")
        self._wants_credentials = bool(options.project_id or not self._api_key)
        if self._wants_credentials:
            self._project = require_project(options.project_id, INSTEAD)
            self._location = check_location(options.location)
        self._calls: Counter[str] = Counter()
        self._breakers: dict[str, Breaker] = {}
        self._raw_refusal: OSError | None = None

    async def __aenter__(self) -> Self:
        self._limit = CallLimit(self.options.max_concurrent)
        self._models = self._model_calls()
        return self

    def _model_calls(self) -> ModelCalls:
        timeout_s, most = self.options.request_timeout_s, self.options.max_concurrent
        if self._wants_credentials:
            return model_calls(self._project, self._location, timeout_s, most)
        assert self._api_key is not None, "else credentials are wanted"
        return developer_calls(self._api_key, timeout_s, most)

    def parallel_groups(self) -> int:
        """Enough groups to keep every place among the calls in flight taken.

        Each group fills the places by itself when it has that many positions. More groups at once only begin more work
        at the same moment, which keeps the processor from the calls.
        """
        most = self.options.max_concurrent
        return min(most, max(_FEWEST_GROUPS, most // 4), _MOST_GROUPS)

    def report(self) -> dict[str, Any]:
        """How many calls were made, repeated ones included, by outcome."""
        return {"calls": dict(sorted(self._calls.items()))}

    async def score(self, requests: Sequence[ScoreRequest]) -> AsyncIterator[Score | ScoreFailure]:
        """Ask for every context; as many calls are prepared as may be in flight."""
        n_contexts = sum(len(request.keys) for request in requests)
        async with aclosing(self._answers(_contexts(requests), n_contexts)) as results:
            async for result in results:
                yield result

    async def sample(self, requests: Sequence[SampleRequest]) -> AsyncIterator[Sample | ScoreFailure]:
        """Ask for every response, as many at once as calls may be in flight."""
        async with aclosing(self._answers(map(_sample_call, requests), len(requests))) as results:
            async for result in results:
                yield result

    async def _answers(self, calls: Iterator[_Call[A]], n_calls: int) -> AsyncGenerator[A | ScoreFailure]:
        async def work() -> AsyncGenerator[A | ScoreFailure]:
            for call in calls:
                yield await self._ask(call)

        workers = min(self.options.max_concurrent, n_calls)
        async with aclosing(merged([work() for _ in range(workers)])) as results:
            async for result in results:
                yield result
        if self._raw_refusal is not None:
            raise self._raw_refusal

    async def _ask(self, call: _Call[A]) -> A | ScoreFailure:
        base, key = wire.model_id(call.model), call.key
        if base in self._quota_used:
            return ScoreFailure(key, "daily-quota", self._quota_used[base])
        try:
            return await with_retries(
                self._attempts(call),
                what=f"ask {base}",
                deadline_s=self.options.retry_deadline_s,
                first_wait_s=_FIRST_WAIT_S,
                sleep=self._limit.sleep,
            )
        except DailyQuotaError as error:
            if base not in self._quota_used:
                logger.error("%s", error)
            self._quota_used[base] = str(error)
            return ScoreFailure(key, "daily-quota", str(error))
        except AskingStoppedError as error:
            return ScoreFailure(key, NOT_ASKED, str(error))
        except RetryableBackendError as error:
            return ScoreFailure(key, "deadline", f"{error}; given up after {self.options.retry_deadline_s:g} s.")
        except StatusError as error:
            return ScoreFailure(key, "refused", str(error))
        except BackendError as error:
            return ScoreFailure(key, "unexpected-shape", str(error))

    def _attempts(self, call: _Call[A]) -> Callable[[], Awaitable[A | ScoreFailure]]:
        """Each call starts an attempt; all but the first go before what waits."""
        again, breaker = False, self._breaker(call.model)

        async def once() -> A | ScoreFailure:
            nonlocal again
            before, again = again, True
            return await self._call(call, breaker, again=before)

        return partial(breaker.repeated, once)

    def _breaker(self, model: str) -> Breaker:
        base, deadline_s = wire.model_id(model), self.options.retry_deadline_s
        if base not in self._breakers:
            self._breakers[base] = Breaker(
                base, partial(ask_once, self._models, model, min(PATIENCE_S, deadline_s)), deadline_s
            )
        return self._breakers[base]

    def stop_asking(self, why: str) -> bool:
        """Make no further call; those in flight are answered."""
        self._limit.stop(why)
        return True

    def _keep_raw(self, key: str, content: bytes) -> None:
        """Keep an answer as it came; where the disk refuses that, no more is asked, and the answer is used."""
        if self._raw is None:
            return
        try:
            self._raw.add(key, {"response": answers.as_object(content)})
        except OSError as error:
            if refusal_of(error) is None:
                raise
            self._raw_refusal = self._raw_refusal or error
            self.stop_asking(f"the disk takes no more: {error}")

    async def _call(self, call: _Call[A], breaker: Breaker, *, again: bool) -> A | ScoreFailure:
        async with self._limit.slot(first=again):
            await breaker.passed()
            if (used := self._quota_used.get(wire.model_id(call.model))) is not None:
                raise DailyQuotaError(used)
            try:
                with translated("call"):
                    content = await self._models.generate(call.model, call.body)
                    self._keep_raw(call.key, content)  # before it is read, as it is paid for
                    result = call.read(content)
            except RetryableBackendError as error:
                self._calls["throttled" if error.status == 429 else "fault"] += 1
                self._limit.note(throttled=error.status == 429)
                raise
            except BackendError:
                self._calls["refused"] += 1
                raise
        self._calls["answered"] += 1
        self._limit.note(throttled=False)
        breaker.answered()
        return result


def _contexts(requests: Sequence[ScoreRequest]) -> Iterator[_Call[Score]]:
    """A call for each distinct context; bodies are built when they are due."""
    seen: set[str] = set()
    for request in requests:
        for key, body in wire.RequestBodies(request):
            if key not in seen:
                seen.add(key)
                yield _Call(request.model, key, body, partial(answers.read_answer, key))


def _sample_call(request: SampleRequest) -> _Call[Sample]:
    return _Call(request.model, request.key, samples.body(request), partial(samples.read_sample, request))
