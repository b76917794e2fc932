"""The Gemini wire: request body out, log-probabilities in. Shared by the Vertex backends.

The service facts behind the choices: temperature 1 and topP 1 are pinned because whether they reshape the reported
values is not documented; a tool, a topK or a response schema could mask tokens, so none is sent; thinking tokens would
count against the one token that is asked for.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from typing import Any

from backends.base import ScoreRequest
from backends.errors import ModelNotUsableError
from backends.vertex.status import error_in_text, read_error
from kl.records import Candidate, Prompt, Score, ScoreFailure

MAX_TOP_LOGPROBS = 20
# Masked tokens are reported as float32 -2**100; a real log-probability is never near this.
_SENTINEL_BELOW = -1e20
# What reading a JSON value of an unforeseen shape raises.
SHAPE_ERRORS = (AttributeError, KeyError, IndexError, TypeError)
_DECISIVE_FIELDS = frozenset({"contents", "systemInstruction", "generationConfig"})
# Answers that end for one of these reasons were refused, and would be again.
_BLOCKING_REASONS = frozenset(
    {"SAFETY", "RECITATION", "LANGUAGE", "BLOCKLIST", "PROHIBITED_CONTENT", "SPII", "MODEL_ARMOR"}
)


def model_id(model: str) -> str:
    """The bare model name: ``publishers/google/models/gemini-2.5-flash`` → ``gemini-2.5-flash``."""
    return model.rsplit("/", 1)[-1]


def thinking_config(model: str) -> dict[str, Any] | None:
    """How thinking is switched off for a model; None where there is nothing to switch off.

    Raises
    ------
    ModelNotUsableError
        If the model cannot answer without thinking (2.5 Pro thinks for at least 128 tokens).
    """
    name = model_id(model)
    if re.match(r"gemini-2\.5-pro\b", name):
        raise ModelNotUsableError(
            f"{name} always thinks (128 tokens or more), so one output token never reaches its answer. "
            "Use gemini-2.5-flash or gemini-2.5-flash-lite.",
            model=model,
        )
    return {"thinkingBudget": 0} if re.match(r"gemini-2\.5-flash", name) else None


def generation_config(model: str, top_logprobs: int) -> dict[str, Any]:
    """The ``generationConfig`` of a scoring request: one token, its list of candidates, nothing that reshapes them."""
    config: dict[str, Any] = {
        "temperature": 1.0,
        "topP": 1.0,
        "maxOutputTokens": 1,
        "responseLogprobs": True,
        "logprobs": top_logprobs,
    }
    thinking = thinking_config(model)
    return config if thinking is None else config | {"thinkingConfig": thinking}


def request_identity(request: ScoreRequest) -> dict[str, Any]:
    """What decides the answer beside model, prompt and prefix; the same for batch and online."""
    return {"wire": "generateContent", "generationConfig": generation_config(request.model, request.top_logprobs)}


def request_body(prompt: Prompt, prefix: str, config: dict[str, Any]) -> dict[str, Any]:
    """The body of one request: the prompt's turns, then a model turn with the prefix (none when it is empty)."""
    contents = [{"role": turn.role, "parts": [{"text": turn.content}]} for turn in prompt.turns]
    if prefix:
        contents.append({"role": "model", "parts": [{"text": prefix}]})
    body: dict[str, Any] = {"contents": contents, "generationConfig": config}
    if prompt.system:
        body["systemInstruction"] = {"parts": [{"text": prompt.system}]}
    return body


class BatchRows:
    """The batch input lines of one response: ``{"key": …, "request": …}`` and a new line, one per position asked.

    The text is escaped once and cut for each row, so that a row costs a copy and not a new encoding.
    """

    def __init__(self, request: ScoreRequest) -> None:
        self._request = request
        body = request_body(request.prompt, "", generation_config(request.model, request.top_logprobs))
        self._bare = _dumps(body)
        # The model turn is cut in before the bracket that closes the contents, which come first.
        split = len('{"contents":') + len(_dumps(body["contents"])) - 1
        self._head = self._bare[:split] + ',{"role":"model","parts":[{"text":"'
        self._tail = '"}]}' + self._bare[split:]
        self._escaped, self._ends = _escape_once(request)

    def __iter__(self) -> Iterator[bytes]:
        for position, key in zip(self._request.positions, self._request.keys, strict=True):
            prefix = self._escaped[: self._ends[position]]
            body = f"{self._head}{prefix}{self._tail}" if prefix else self._bare
            yield f'{{"key":"{key}","request":{body}}}\n'.encode("ascii")

    def sizes(self) -> Iterator[int]:
        """The length of each line in bytes, without making it."""
        frame = len('{"key":"","request":}\n')
        for position, key in zip(self._request.positions, self._request.keys, strict=True):
            end = self._ends[position]
            body = len(self._head) + end + len(self._tail) if end else len(self._bare)
            yield frame + len(key) + body


def _escape_once(request: ScoreRequest) -> tuple[str, list[int]]:
    pieces: list[str] = []
    ends: list[int] = []
    length = start = 0
    for end in request.prefix_ends:
        piece = _dumps(request.text[start:end])[1:-1]
        pieces.append(piece)
        length += len(piece)
        ends.append(length)
        start = end
    return "".join(pieces), ends


def _dumps(value: Any) -> str:
    # ASCII escapes: U+2028 and friends cannot break a line reader on the other side.
    return json.dumps(value, ensure_ascii=True, separators=(",", ":"))


def canonical_request(body: dict[str, Any]) -> str:
    """A request body in one canonical form: no nulls, no empty maps, sorted keys, camelCase, numbers as floats.

    Two spellings of a request that the service treats alike (it echoes requests with injected nulls, reordered keys or
    in snake_case) have one canonical form.
    """
    kept = {name: value for name, value in _canonical(body).items() if name in _DECISIVE_FIELDS}
    kept["contents"] = [
        {"role": turn.get("role", "user"), "text": "".join(part.get("text", "") for part in turn.get("parts", []))}
        for turn in kept.get("contents", [])
    ]
    system = kept.pop("systemInstruction", None) or {}
    kept["system"] = "".join(part.get("text", "") for part in system.get("parts", []))
    return json.dumps(kept, sort_keys=True, ensure_ascii=True, separators=(",", ":"))


def _canonical(value: Any) -> Any:
    if isinstance(value, dict):
        items = ((_camel(name), _canonical(item)) for name, item in value.items())
        return {name: item for name, item in items if item is not None and item != {}}
    if isinstance(value, list):
        return [_canonical(item) for item in value]
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    return value


def _camel(name: str) -> str:
    first, *rest = name.split("_")
    return first + "".join(word.capitalize() for word in rest)


def parse_response(key: str, response: dict[str, Any] | None) -> Score | ScoreFailure:
    """Read one ``GenerateContentResponse`` as plain JSON.

    Absent ``token`` is the empty token (proto JSON drops empty strings); a candidate without ``logProbability`` or with
    the sentinel of a masked token is dropped and counted; ``content`` without ``parts`` is no error by itself.
    """
    if not response:
        return ScoreFailure(key, "empty-answer", "the service answered this request with nothing; it is asked again.")
    blocked = (response.get("promptFeedback") or {}).get("blockReason")
    if blocked:
        return ScoreFailure(key, "blocked", f"the service blocked the prompt: {blocked}.", final=True)
    candidates = response.get("candidates") or []
    if not candidates:
        return ScoreFailure(key, "empty-answer", "the answer has no candidates and gives no reason.")
    return _parse_candidate(key, response, candidates[0])


def _parse_candidate(key: str, response: dict[str, Any], candidate: dict[str, Any]) -> Score | ScoreFailure:
    finish = candidate.get("finishReason")
    logprobs = candidate.get("logprobsResult") or {}
    steps = [step.get("candidates") or [] for step in logprobs.get("topCandidates") or []]
    if not steps or not steps[0]:
        if finish in _BLOCKING_REASONS:
            return ScoreFailure(key, "blocked", f"the service blocked the answer: {finish}.", final=True)
        return ScoreFailure(key, "no-logprobs", f"the answer has no log-probabilities (finishReason {finish}).")
    if len(steps) > 1:
        return ScoreFailure(
            key, "unexpected-shape", f"the answer has {len(steps)} steps of log-probabilities where one was asked."
        )
    top = [parsed for item in steps[0] if (parsed := _parse_token(item)) is not None]
    if not top:
        return ScoreFailure(key, "no-logprobs", f"none of the {len(steps[0])} candidates has a log-probability.")
    usage = response.get("usageMetadata") or {}
    chosen = (logprobs.get("chosenCandidates") or [None])[0]
    return Score(
        key=key,
        top=tuple(sorted(top, key=lambda item: -(item.logprob or 0.0))),
        sampled=_parse_token(chosen) if chosen else None,
        model_version=response.get("modelVersion"),
        finish_reason=finish,
        input_tokens=usage.get("promptTokenCount"),
        output_tokens=usage.get("candidatesTokenCount"),
        n_dropped=len(steps[0]) - len(top),
    )


def _parse_token(item: dict[str, Any]) -> Candidate | None:
    """A token as it stands: an absent or empty text, or an absent id, says nothing of which token it is."""
    logprob = item.get("logProbability")
    if isinstance(logprob, bool) or not isinstance(logprob, int | float):
        return None
    if not math.isfinite(logprob) or logprob < _SENTINEL_BELOW:
        return None
    text = item.get("token")
    return Candidate(text if isinstance(text, str) else "", float(logprob), _token_id(item.get("tokenId")))


def _token_id(value: Any) -> int | None:
    # Some writers of JSON know floats only.
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value // 1 or value < 0:
        return None
    return int(value)


def read_row(key: str, row: dict[str, Any]) -> Score | ScoreFailure:
    """One output row: the service's error if it has one, else its answer."""
    status = row.get("status")
    if status:
        said = read_error(error_in_text(status) if isinstance(status, str) else status)
        text = status if isinstance(status, str) else json.dumps(status)
        reason = "daily-quota" if said.daily_quota else "row-error"
        return ScoreFailure(key, reason, f"the service answered this row with an error: {' '.join(text.split())[:300]}")
    try:
        return parse_response(key, row.get("response"))
    except SHAPE_ERRORS as error:
        return ScoreFailure(key, "unexpected-shape", f"the answer to this row has another shape than known: {error}")
