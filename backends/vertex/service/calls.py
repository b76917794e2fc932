"""One ``generateContent`` call as plain JSON, and the proof that a model can be used."""

from __future__ import annotations

import json
from typing import Any

from google import genai
from google.genai import types

from backends.errors import BackendError, ModelNotUsableError
from backends.vertex import wire
from backends.vertex.service.retry import StatusError, with_retries
from kl.records import Prompt, ScoreFailure, Turn

_USABLE = "Known to work: gemini-2.5-flash and gemini-2.5-flash-lite, in projects that used them before."
_PROBE = Prompt((Turn("user", "Continue the row: one, two, three"),))
_PROBE_PREFIX = "one, two,"
# An empty answer now and then says nothing of the model.
_PROBES = 3


async def generate(client: genai.Client, model: str, body: dict[str, Any]) -> dict[str, Any]:
    """Send one request body; the answer is the JSON as the service wrote it.

    The SDK's own reading is left out: its models refuse fields that the service does send. What it raises for the call
    itself is left to the caller.
    """
    settings = dict(body["generationConfig"])
    config = types.GenerateContentConfig.model_validate(
        settings
        | {
            "systemInstruction": body.get("systemInstruction"),
            "automaticContinuation": False,
            "shouldReturnHttpResponse": True,
        }
    )
    answer = await client.aio.models.generate_content(model=model, contents=body["contents"], config=config)
    raw = answer.sdk_http_response
    parsed = json.loads((raw.body if raw else None) or "{}")
    if not isinstance(parsed, dict):
        raise BackendError(f"the service answered with {type(parsed).__name__} instead of an object.", model=model)
    return parsed


async def prove_usable(client: genai.Client, model: str, deadline_s: float) -> str | None:
    """One tiny request with a prefill: the model exists, gives log-probabilities and continues a model turn.

    Returns the version that the service reports.

    Raises
    ------
    ModelNotUsableError
        With what the model cannot do and which models can.
    """
    name = wire.model_id(model)
    body = wire.request_body(_PROBE, _PROBE_PREFIX, wire.generation_config(model, wire.MAX_TOP_LOGPROBS))
    for attempt in range(_PROBES):
        try:
            answer = await with_retries(
                lambda: generate(client, model, body), what=f"preflight of {name}", deadline_s=deadline_s
            )
        except StatusError as error:
            raise ModelNotUsableError(_why_not(name, error), model=model) from error
        result = wire.parse_response("preflight", answer)
        if not isinstance(result, ScoreFailure):
            return result.model_version
        if result.final or attempt == _PROBES - 1:
            raise ModelNotUsableError(f"{name} cannot be scored: {result.message} {_USABLE}", model=model)
    raise AssertionError("unreachable: the last probe returns or raises")


def _why_not(name: str, error: StatusError) -> str:
    text = str(error).lower()
    if error.status == 404:
        return f"the model {name} was not found at this location, or is shut down: {error}. {_USABLE}"
    if "logprob" in text:
        return f"{name} gives no log-probabilities: {error}. {_USABLE}"
    if "model turn" in text or "prefill" in text:
        return f"{name} does not continue a model turn (prefill): {error}. {_USABLE}"
    if error.status in (401, 403):
        return f"{error}. Enable the Vertex AI API and grant roles/aiplatform.user."
    return f"{name} cannot be used: {error}. {_USABLE}"
