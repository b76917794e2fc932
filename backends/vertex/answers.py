"""Gemini's answers: log-probabilities in.

An answer of the usual shape is read straight into typed fields, without what it carries beside them: the echo of its
request is most of a batch row. Any other is read as plain JSON, which knows every shape and names what is wrong with
it. What the first reads, the second reads the same.
"""

from __future__ import annotations

import json
import math
from operator import itemgetter
from typing import Annotated, Any, Literal

import msgspec

from backends.errors import BackendError
from backends.vertex.status import ServiceError, error_in_text, read_error
from backends.vertex.wire import SHAPE_ERRORS
from kl.records import Candidate, Score, ScoreFailure

# Masked tokens are reported as float32 -2**100; a real log-probability is never near this.
_SENTINEL_BELOW = -1e20
# Answers that end for one of these reasons were refused, and would be again.
BLOCKING_REASONS = frozenset(
    {"SAFETY", "RECITATION", "LANGUAGE", "BLOCKLIST", "PROHIBITED_CONTENT", "SPII", "MODEL_ARMOR"}
)


class _Message(msgspec.Struct, rename="camel", gc=False, frozen=True):
    """Messages of the wire, with the fields that are read; others are passed over."""


class _Token(_Message, gc=False, frozen=True, kw_only=True):
    """As a `Candidate`, in its order."""

    token: str = ""
    log_probability: float
    token_id: Annotated[int, msgspec.Meta(ge=0)] | None = None
    token_bytes: None = None  # of no field that the service has


class _Step(_Message, gc=False, frozen=True):
    candidates: Annotated[list[_Token], msgspec.Meta(min_length=1)]


class _Logprobs(_Message, gc=False, frozen=True):
    top_candidates: Annotated[list[_Step], msgspec.Meta(min_length=1, max_length=1)]
    chosen_candidates: list[_Token] = []


class _Candidate(_Message, gc=False, frozen=True):
    logprobs_result: _Logprobs
    finish_reason: str | None = None


class _Usage(_Message, gc=False, frozen=True):
    prompt_token_count: int | None = None
    candidates_token_count: int | None = None


class _Response(_Message, gc=False, frozen=True):
    candidates: Annotated[list[_Candidate], msgspec.Meta(min_length=1)]
    usage_metadata: _Usage = _Usage()
    model_version: str | None = None
    prompt_feedback: None = None


class _Row(_Message, gc=False, frozen=True):
    key: str
    response: _Response
    status: Literal[""] | None = None


_as_row = msgspec.json.Decoder(_Row).decode
_as_response = msgspec.json.Decoder(_Response).decode
_logprob = itemgetter(1)
_new = tuple.__new__  # a named tuple's own constructor takes twice as long, and there are twenty to a score


def usual_row(line: bytes) -> Score | None:
    """The score in a batch row that has the usual shape and carries its key; None for any other row."""
    try:
        row = _as_row(line)
    except (msgspec.MsgspecError, ValueError):
        return None
    return _usual_score(row.key, row.response)


def read_answer(key: str, content: bytes) -> Score | ScoreFailure:
    """The answer to one call.

    Raises
    ------
    ValueError
        If it is not JSON.
    BackendError
        If it is no object.
    """
    try:
        score = _usual_score(key, _as_response(content))
    except (msgspec.MsgspecError, ValueError):
        score = None
    return score or read_row(key, {"response": as_object(content)})


def as_object(content: bytes) -> dict[str, Any]:
    """The plain JSON of an answer; raises as `read_answer` does."""
    parsed = json.loads(content.decode("utf-8", "replace") or "{}")
    if not isinstance(parsed, dict):
        raise BackendError(f"the service answered with {type(parsed).__name__} instead of an object.")
    return parsed


def _usual_score(key: str, response: _Response) -> Score | None:
    candidate = response.candidates[0]
    chosen = candidate.logprobs_result.chosen_candidates
    items = candidate.logprobs_result.top_candidates[0].candidates
    top = [_new(Candidate, values) for values in map(msgspec.structs.astuple, items)]
    top.sort(key=_logprob, reverse=True)
    sampled = Candidate(*msgspec.structs.astuple(chosen[0])) if chosen else None
    if _logprob(top[-1]) < _SENTINEL_BELOW or (sampled is not None and _logprob(sampled) < _SENTINEL_BELOW):
        return None
    usage = response.usage_metadata
    return Score(
        key, tuple(top), sampled, response.model_version, candidate.finish_reason, usage.prompt_token_count,
        usage.candidates_token_count,
    )  # fmt: skip


def parse_response(key: str, response: dict[str, Any] | None) -> Score | ScoreFailure:
    """Read one ``GenerateContentResponse`` as plain JSON.

    Absent ``token`` is the empty token (proto JSON drops empty strings); a candidate without ``logProbability`` or with
    the sentinel of a masked token is dropped and counted; ``content`` without ``parts`` is no error by itself.
    """
    found = first_candidate(key, response)
    return found if isinstance(found, ScoreFailure) else _parse_candidate(key, response or {}, found)


def first_candidate(key: str, response: dict[str, Any] | None) -> dict[str, Any] | ScoreFailure:
    """What the model wrote, or why there is nothing."""
    if not response:
        return ScoreFailure(key, "empty-answer", "the service answered this request with nothing; it is asked again.")
    blocked = (response.get("promptFeedback") or {}).get("blockReason")
    if blocked:
        return ScoreFailure(key, "blocked", f"the service blocked the prompt: {blocked}.", final=True)
    candidates = response.get("candidates") or []
    if not candidates:
        return ScoreFailure(key, "empty-answer", "the answer has no candidates and gives no reason.")
    return candidates[0]


def _parse_candidate(key: str, response: dict[str, Any], candidate: dict[str, Any]) -> Score | ScoreFailure:
    finish = candidate.get("finishReason")
    logprobs = candidate.get("logprobsResult") or {}
    steps = [step.get("candidates") or [] for step in logprobs.get("topCandidates") or []]
    if not steps or not steps[0]:
        if finish in BLOCKING_REASONS:
            return ScoreFailure(key, "blocked", f"the service blocked the answer: {finish}.", final=True)
        return ScoreFailure(key, "no-logprobs", f"the answer has no log-probabilities (finishReason {finish}).")
    if len(steps) > 1:
        return ScoreFailure(
            key, "unexpected-shape", f"the answer has {len(steps)} steps of log-probabilities where one was asked."
        )
    top = [parsed for item in steps[0] if (parsed := parse_token(item)) is not None]
    if not top:
        return ScoreFailure(key, "no-logprobs", f"none of the {len(steps[0])} candidates has a log-probability.")
    usage = response.get("usageMetadata") or {}
    chosen = (logprobs.get("chosenCandidates") or [None])[0]
    return Score(
        key=key,
        top=tuple(sorted(top, key=lambda item: -(item.logprob or 0.0))),
        sampled=parse_token(chosen) if chosen else None,
        model_version=response.get("modelVersion"),
        finish_reason=finish,
        input_tokens=usage.get("promptTokenCount"),
        output_tokens=usage.get("candidatesTokenCount"),
        n_dropped=len(steps[0]) - len(top),
    )


def parse_token(item: dict[str, Any]) -> Candidate | None:
    """A token as it stands: an absent or empty text, or an absent id, says nothing of which token it is."""
    logprob = item.get("logProbability")
    if isinstance(logprob, bool) or not isinstance(logprob, int | float):
        return None
    if not math.isfinite(logprob) or logprob < _SENTINEL_BELOW:
        return None
    text = item.get("token")
    return Candidate(text if isinstance(text, str) else "", float(logprob), token_id(item.get("tokenId")))


def token_id(value: Any) -> int | None:
    """A token's number; None where none is stated."""
    # Some writers of JSON know floats only.
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value // 1 or value < 0:
        return None
    return int(value)


def row_error(row: dict[str, Any]) -> ServiceError | None:
    """What the service says of a row that it did not answer; None of one that it did."""
    status = row.get("status")
    return read_error(error_in_text(status) if isinstance(status, str) else status) if status else None


def row_failure(key: str, row: dict[str, Any], said: ServiceError) -> ScoreFailure:
    """The failure of a row with an error."""
    status = row.get("status")
    text = status if isinstance(status, str) else json.dumps(status)
    reason = "daily-quota" if said.daily_quota else "row-error"
    return ScoreFailure(key, reason, f"the service answered this row with an error: {' '.join(text.split())[:300]}")


def read_row(key: str, row: dict[str, Any]) -> Score | ScoreFailure:
    """One output row: the service's error if it has one, else its answer."""
    said = row_error(row)
    if said is not None:
        return row_failure(key, row, said)
    try:
        return parse_response(key, row.get("response"))
    except SHAPE_ERRORS as error:
        return ScoreFailure(key, "unexpected-shape", f"the answer to this row has another shape than known: {error}")
