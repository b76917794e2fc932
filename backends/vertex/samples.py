"""Responses that a Gemini model writes: the requests that ask for them, and what comes back.

A response is of use only if every token has its list: hidden thoughts, or fewer lists than tokens, would make each
later position one of another context. Such answers are refused, with the reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from backends.base import Sample, SampleRequest, SampleSettings
from backends.vertex import answers, wire
from kl.records import END_TOKENS, Candidate, Position, Response, Sampling, ScoreFailure

_SEEDS = 2**31  # the service takes an int32
_INVALID = frozenset({400, 3})  # INVALID_ARGUMENT as HTTP has it, and as google.rpc has it


def generation_config(model: str, settings: SampleSettings, index: int) -> dict[str, Any]:
    """The ``generationConfig`` of a request for response number ``index``.

    Raises
    ------
    ModelNotUsableError
        If the model cannot answer without hidden thinking.
    """
    config: dict[str, Any] = {
        "temperature": settings.temperature,
        "topP": settings.top_p,
        "maxOutputTokens": settings.max_tokens,
        "responseLogprobs": True,
        "logprobs": settings.top_logprobs,
        "seed": (settings.seed + index) % _SEEDS,
    }
    thinking = wire.thinking_config(model)
    return config if thinking is None else config | {"thinkingConfig": thinking}


def body(request: SampleRequest) -> bytes:
    """The body of the request for one response, as it is sent."""
    config = generation_config(request.model, request.settings, request.index)
    return wire.as_json(wire.request_body(request.prompt, request.prefix, config))


def read_sample(request: SampleRequest, content: bytes) -> Sample | ScoreFailure:
    """The answer to one call.

    Raises
    ------
    ValueError
        If it is not JSON.
    BackendError
        If it is no object.
    """
    return _read(request, answers.as_object(content))


def read_row(request: SampleRequest, row: dict[str, Any]) -> Sample | ScoreFailure:
    """One output row: the service's error if it has one, else its answer."""
    said = answers.row_error(row)
    if said is None:
        return _read(request, row.get("response"))
    failure = answers.row_failure(request.key, row, said)
    is_wrong = said.code in _INVALID and said.status in (None, "INVALID_ARGUMENT")
    return replace(failure, reason="refused", final=True) if is_wrong else failure


def _read(request: SampleRequest, response: dict[str, Any] | None) -> Sample | ScoreFailure:
    try:
        candidate = answers.first_candidate(request.key, response)
        if isinstance(candidate, ScoreFailure):
            return candidate
        return _read_candidate(request, response or {}, candidate)
    except wire.SHAPE_ERRORS as error:
        return _refused(request, "unexpected-shape", f"the answer has another shape than known: {error}")


def _refused(request: SampleRequest, reason: str, message: str) -> ScoreFailure:
    # Final: it is paid for, and with the same seed the next one would most likely be the same.
    return ScoreFailure(request.key, reason, message, final=True)


def _read_candidate(
    request: SampleRequest, response: dict[str, Any], candidate: dict[str, Any]
) -> Sample | ScoreFailure:
    finish = candidate.get("finishReason")
    if finish in answers.BLOCKING_REASONS:
        return _refused(request, "blocked", f"the service blocked the answer: {finish}.")
    parts = (candidate.get("content") or {}).get("parts") or []
    usage = response.get("usageMetadata") or {}
    if usage.get("thoughtsTokenCount") or any(part.get("thought") for part in parts):
        n = usage.get("thoughtsTokenCount", "some")
        return _refused(
            request, "hidden-thinking", f"the model thought for {n} tokens, which have no lists, before it answered."
        )
    result = candidate.get("logprobsResult") or {}
    chosen: list[dict[str, Any]] = result.get("chosenCandidates") or []
    lists = [step.get("candidates") or [] for step in result.get("topCandidates") or []]
    text = "".join(part.get("text", "") for part in parts)
    last = chosen[-1].get("token") if chosen else "?"
    has_stop = finish == "STOP" and (not last or (last in END_TOKENS and not text.endswith(last)))
    why = _what_lacks(len(chosen), len(lists), usage.get("candidatesTokenCount", 0), has_stop=has_stop)
    if why is not None:
        if not chosen:
            return ScoreFailure(request.key, "no-logprobs", f"{why} (finishReason {finish}).")
        return _refused(request, "lists-missing", f"{why} (finishReason {finish}).")
    settings = request.settings
    written = Response(
        source_file="",
        response_idx=request.index,
        prompt=request.prompt,
        model=request.model,
        text=text,
        positions=tuple(_position(item, top) for item, top in zip(chosen, lists, strict=True)),
        finish_reason=finish,
        sampling=Sampling(temperature=settings.temperature, top_p=settings.top_p),
        model_version=response.get("modelVersion"),
        has_stop=has_stop,
    )
    return Sample(request.key, written, usage.get("promptTokenCount"), usage.get("candidatesTokenCount", 0))


def _what_lacks(n_chosen: int, n_lists: int, n_tokens: int, *, has_stop: bool) -> str | None:
    """What the lists of an answer lack; None where every token has one.

    The end of the turn is no candidate token: a service that lists it has one list more than tokens.
    """
    if not n_chosen:
        return "the answer has no log-probabilities"
    if n_lists != n_chosen:
        return f"the answer has {n_lists} lists for {n_chosen} chosen candidates"
    if n_tokens not in ((n_chosen, n_chosen - 1) if has_stop else (n_chosen,)):
        return f"the answer has {n_chosen} chosen candidates for {n_tokens} tokens: they do not belong together"
    return None


def _position(chosen: dict[str, Any], listed: Sequence[dict[str, Any]]) -> Position:
    top = [parsed for item in listed if (parsed := answers.parse_token(item)) is not None]
    sampled = answers.parse_token(chosen)
    if sampled is None:  # its log-probability is none, and its text still is what later positions follow
        sampled = Candidate(str(chosen.get("token", "")), None, answers.token_id(chosen.get("tokenId")))
    top.sort(key=lambda item: -(item.logprob or 0.0))
    return Position(sampled, tuple(top), n_dropped=len(listed) - len(top))
