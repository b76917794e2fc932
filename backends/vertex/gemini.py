"""What is the same however a Gemini model is asked: the requests, their identity and price, the proof of an answer."""

from __future__ import annotations

import asyncio
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

from backends.base import Backend, BackendOptions, SampleSettings, ScoreRequest
from backends.errors import ConfigError
from backends.scores.raw_log import RawLog
from backends.service.retry import StatusError
from backends.vertex import answers, wire
from backends.vertex.options import GeminiOptions
from backends.vertex.prices import price_of, token_cost
from backends.vertex.service.calls import prove_usable, prove_writes
from backends.vertex.service.model_calls import ModelCalls
from backends.vertex.service.retry import DailyQuotaError, translated
from backends.vertex.service.setup import check_credentials, check_model_name
from kl.records import Prompt, Score, ScoreFailure

_BAD_REQUEST = 400


class GeminiBackend(Backend):
    """A backend whose model is asked by ``generateContent`` requests; subclasses say where and send them."""

    price_share: ClassVar[float] = 1.0  # of the list price
    template_tokens: ClassVar[int] = 0  # the service counts texts alone

    _models: ModelCalls  # while it is entered
    _wants_credentials = True  # of Google; an API key is none

    def __init__(self, options: GeminiOptions, state_dir: Path | None = None) -> None:
        super().__init__(options, state_dir)
        if options.keep_raw and state_dir is None:
            raise ConfigError("keep_raw needs a folder to keep the rows in.")
        self._retry_deadline_s = options.retry_deadline_s
        # Base model → how the service said that its daily quota is used up: no more is asked of it in this run.
        self._quota_used: dict[str, str] = {}
        self._raw = RawLog(state_dir / "raw") if options.keep_raw and state_dir is not None else None

    async def __aexit__(self, *exc: object) -> None:
        await self._models.aclose()
        if self._raw is not None:
            self._raw.close()

    @classmethod
    def identity(cls, options: BackendOptions, request: ScoreRequest) -> dict[str, Any]:
        """The generation settings; online and batch requests share their scores."""
        return wire.request_identity(request)

    @classmethod
    def cost_usd(cls, options: BackendOptions, model: str, input_tokens: int, output_tokens: int) -> float | None:
        """The list price, or the share of it that is charged; caches that the service applies would lower it."""
        assert isinstance(options, GeminiOptions)
        return token_cost(price_of(model, options.prices), input_tokens, output_tokens, cls.price_share)

    @classmethod
    def request_bytes(cls, request: ScoreRequest) -> int:
        """The size of the requests as JSON lines."""
        return sum(wire.RequestBodies(request).line_lengths())

    @classmethod
    def parse_raw(cls, key: str, row: dict[str, Any]) -> Score | ScoreFailure:
        """Read a row that was kept."""
        return answers.read_row(key, row)

    def check(self, model: str) -> None:
        """The name of the model, and the credentials."""
        check_model_name(model)
        wire.thinking_config(model)  # of a model that cannot do without
        if self._wants_credentials:
            check_credentials()

    async def preflight(self, model: str) -> str | None:
        """One tiny online request with a prefill."""
        with self._noting_quota(model):
            return await prove_usable(self._models, model, self._retry_deadline_s)

    async def preflight_sampling(self, model: str, settings: SampleSettings) -> str | None:
        """One tiny online request for a response."""
        with self._noting_quota(model):
            return await prove_writes(self._models, model, settings, self._retry_deadline_s)

    async def count_prompt_tokens(self, model: str, prompts: Sequence[Prompt]) -> list[int | None]:
        """By ``countTokens``, a call for each prompt; none is repeated."""
        counted = await asyncio.gather(*(self._count(model, prompt) for prompt in prompts), return_exceptions=True)
        for count in counted:
            if isinstance(count, BaseException):
                raise count
        return [count for count in counted if not isinstance(count, BaseException)]

    async def _count(self, model: str, prompt: Prompt) -> int | None:
        body = wire.as_json(wire.count_body(prompt, system_field=self._wants_credentials))
        try:
            with translated("count tokens"):
                total = answers.as_object(await self._models.count(model, body)).get("totalTokens")
        except StatusError as error:
            if error.status == _BAD_REQUEST:
                return None  # of this prompt alone
            raise
        return total if isinstance(total, int) else None

    @contextmanager
    def _noting_quota(self, model: str) -> Generator[None]:
        try:
            yield
        except DailyQuotaError as error:
            self._quota_used[wire.model_id(model)] = str(error)
            raise
