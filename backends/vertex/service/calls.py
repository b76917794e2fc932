"""The proof that a model can be used."""

from __future__ import annotations

import logging

from backends.base import Sample, SampleRequest, SampleSettings
from backends.errors import BackendError, ModelNotUsableError
from backends.service.retry import StatusError
from backends.vertex import answers, samples, wire
from backends.vertex.service.model_calls import ModelCalls
from backends.vertex.service.retry import with_retries
from kl.records import Prompt, Score, ScoreFailure, Turn

logger = logging.getLogger(__name__)

_USABLE = "Known to work: gemini-2.5-flash and gemini-2.5-flash-lite, in projects that used them before."
_PROBE = Prompt((Turn("user", "Continue the row: one, two, three"),))
# A blank after a letter is a token of its own in every tokenizer known; after a comma it need not be.
_PROBE_PREFIX, _WHITE_SPACE = "one, two", " "
# An empty answer now and then says nothing of the model.
_PROBES = 3
_SHORT = {"max_tokens": 8}


async def prove_usable(calls: ModelCalls, model: str, deadline_s: float) -> str | None:
    """Two tiny requests with a prefill: the model exists, gives log-probabilities and continues a model turn.

    The second one ends in white space. A service that trims it can be used all the same, for only positions after white
    space are asked wrongly, and the token counts tell which: that is said in one line and refuses nothing. Returns the
    version that the service reports.

    Raises
    ------
    ModelNotUsableError
        With what the model cannot do and which models can.
    """
    proof = _Proof(calls, model, deadline_s)
    for attempt in range(_PROBES):
        try:
            result = await proof.ask(_PROBE_PREFIX)
        except StatusError as error:
            why, permanent = await proof.why_not(error)
            raise ModelNotUsableError(why, permanent=permanent, model=model) from error
        if isinstance(result, Score):
            await proof.check_white_space(result.input_tokens)
            return result.model_version
        if result.final or attempt == _PROBES - 1:
            raise ModelNotUsableError(f"{proof.name} cannot be scored: {result.message} {_USABLE}", model=model)
    raise AssertionError("unreachable: the last probe returns or raises")


async def prove_writes(calls: ModelCalls, model: str, settings: SampleSettings, deadline_s: float) -> str | None:
    """One tiny request without a prefill: the model exists and writes a response with a list for every token.

    Returns the version that the service reports.

    Raises
    ------
    ModelNotUsableError
        With what the model cannot do and which models can.
    """
    name = wire.model_id(model)
    request = SampleRequest("preflight", "preflight", model, _PROBE, settings.model_copy(update=_SHORT))
    body = samples.body(request)

    async def attempt() -> Sample | ScoreFailure:
        return samples.read_sample(request, await calls.generate(model, body))

    for number in range(_PROBES):
        try:
            result = await with_retries(attempt, what=f"preflight of {name}", deadline_s=deadline_s)
        except StatusError as error:
            why, permanent = await _Proof(calls, model, deadline_s).why_not(error)
            raise ModelNotUsableError(why, permanent=permanent, model=model) from error
        if isinstance(result, Sample):
            return result.response.model_version
        if result.final or number == _PROBES - 1:
            raise ModelNotUsableError(f"{name} cannot be sampled: {result.message} {_USABLE}", model=model)
    raise AssertionError("unreachable: the last probe returns or raises")


async def ask_once(calls: ModelCalls, model: str, deadline_s: float) -> None:
    """One tiny request with a prefill, whatever it is answered.

    Raises
    ------
    StatusError
        If it is refused.
    """
    await _Proof(calls, model, deadline_s).ask(_PROBE_PREFIX)


class _Proof:
    """The tiny requests that prove what a model can do, by what it answers and not by how it refuses."""

    def __init__(self, calls: ModelCalls, model: str, deadline_s: float) -> None:
        self.name = wire.model_id(model)
        self._calls, self._model, self._deadline_s = calls, model, deadline_s

    async def ask(self, prefix: str, *, logprobs: bool = True) -> Score | ScoreFailure:
        """The answer to one request, with or without a prefill and log-probabilities."""
        config = wire.generation_config(self._model, wire.MAX_TOP_LOGPROBS)
        if not logprobs:
            config = {name: value for name, value in config.items() if name not in ("responseLogprobs", "logprobs")}
        body = wire.as_json(wire.request_body(_PROBE, prefix, config))

        async def attempt() -> Score | ScoreFailure:
            return answers.read_answer("preflight", await self._calls.generate(self._model, body))

        return await with_retries(attempt, what=f"preflight of {self.name}", deadline_s=self._deadline_s)

    async def check_white_space(self, n_before: int | None) -> None:
        """Warn if a prefill that ends in white space is refused, or counts no more than without it."""
        try:
            result = await self.ask(_PROBE_PREFIX + _WHITE_SPACE)
        except StatusError as error:
            logger.warning(
                "%s refuses a prefill that ends in white space, and so will such positions: %s", self.name, error
            )
            return
        except BackendError as error:
            logger.info("whether %s trims a prefill that ends in white space is not known: %s", self.name, error)
            return
        n_after = result.input_tokens if isinstance(result, Score) else None
        if n_before is not None and n_after is not None and n_after <= n_before:
            logger.warning(
                "%s does not count the white space at the end of a prefill (%d tokens with it, %d without), as if it "
                "trimmed it. Positions after white space are then told by their counts and left out (retokenised).",
                self.name, n_after, n_before,
            )  # fmt: skip

    async def why_not(self, error: StatusError) -> tuple[str, bool]:
        """What a model that refused the first request cannot do, and whether that is proven."""
        if error.status == 404:
            return f"the model {self.name} was not found at this location, or is shut down: {error}. {_USABLE}", True
        if error.status in (401, 403):
            return f"{error}. Enable the Vertex AI API and grant roles/aiplatform.user.", False
        lacks = await self._lacks() if error.status == 400 else ""
        return f"{self.name} {lacks or 'cannot be used'}: {error}. {_USABLE}", bool(lacks)

    async def _lacks(self) -> str:
        """Which of the two things asked is refused; empty where it is neither, or cannot be learnt."""
        logprobs, prefill = "gives no log-probabilities", "does not continue a model turn (prefill)"
        try:
            with_prefill = await self._accepts(_PROBE_PREFIX, logprobs=False)
            with_logprobs = await self._accepts("", logprobs=True)
            if with_prefill != with_logprobs:
                return logprobs if with_prefill else prefill
            lacks_both = not with_prefill and await self._accepts("", logprobs=False)
        except BackendError:
            return ""
        return f"{logprobs} and {prefill}" if lacks_both else ""

    async def _accepts(self, prefix: str, *, logprobs: bool) -> bool:
        try:
            await self.ask(prefix, logprobs=logprobs)
        except StatusError:
            return False
        return True
