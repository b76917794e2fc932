"""The Gemini wire: request bodies, shared by the Vertex backends; `answers` reads what comes back.

The service facts behind the choices: temperature 1 and topP 1 are pinned because whether they reshape the reported
values is not documented; a tool, a topK or a response schema could mask tokens, so none is sent; thinking tokens would
count against the one token that is asked for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from json.encoder import encode_basestring_ascii
from typing import Any, NamedTuple

from backends.base import ScoreRequest
from backends.errors import ModelNotUsableError
from kl.records import Prompt

MAX_TOP_LOGPROBS = 20
# What reading a JSON value of an unforeseen shape raises.
SHAPE_ERRORS = (AttributeError, KeyError, IndexError, TypeError)
_DECISIVE_FIELDS = frozenset({"contents", "systemInstruction", "generationConfig"})


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
            f"{name} always thinks (128 tokens or more): one output token never reaches its answer, and a longer one "
            "follows from thoughts without lists. "
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


def count_body(prompt: Prompt, *, system_field: bool) -> dict[str, Any]:
    """The body that has a prompt counted; a service without a field for the system text gets it as a turn."""
    body = request_body(prompt, "", {})
    del body["generationConfig"]
    if not system_field and (system := body.pop("systemInstruction", None)):
        body["contents"] = [{"role": "user", **system}, *body["contents"]]
    return body


class RequestBodies:
    """The bodies of a response's contexts as JSON, in ASCII: that of `request_body`, one per position asked.

    The text is escaped once and cut for each body, and what stands around it is made once for all responses to a
    prompt, so that a body costs a copy and not a new encoding.
    """

    def __init__(self, request: ScoreRequest) -> None:
        self._request = request
        self._frame = _frame(request.prompt, request.model, request.top_logprobs)
        self._escaped, self._ends = _escape_once(request.text, request.prefix_ends)

    def __iter__(self) -> Iterator[tuple[str, bytes]]:
        """(key, body) of each position asked."""
        for key, end in self._asked():
            yield key, self._body(end)

    def lines(self) -> Iterator[bytes]:
        """The input lines of a batch job: ``{"key": …, "request": …}`` and a new line."""
        before, escaped = b'","request":' + self._frame.head, self._escaped
        after, bare = self._frame.tail + b"}\n", b'","request":' + self._frame.bare + b"}\n"
        for key, end in self._asked():
            name = key.encode("ascii")
            yield b"".join((b'{"key":"', name, before, escaped[:end], after) if end else (b'{"key":"', name, bare))

    def line_lengths(self) -> Iterator[int]:
        """The length of each line in bytes, without making it."""
        frame = len('{"key":"","request":}\n')
        bare, around = len(self._frame.bare), len(self._frame.head) + len(self._frame.tail)
        for key, end in self._asked():
            yield frame + len(key) + (around + end if end else bare)

    def _asked(self) -> Iterator[tuple[str, int]]:
        """(key, end of the escaped prefix) of each position asked."""
        ends = self._ends
        for position, key in zip(self._request.positions, self._request.keys, strict=True):
            yield key, ends[position]

    def _body(self, end: int) -> bytes:
        return b"".join((self._frame.head, self._escaped[:end], self._frame.tail)) if end else self._frame.bare


class _Frame(NamedTuple):
    """A body without a prefix, and what stands before and after the prefix in one that has it."""

    bare: bytes
    head: bytes
    tail: bytes


@lru_cache(maxsize=256)
def _frame(prompt: Prompt, model: str, top_logprobs: int) -> _Frame:
    body = request_body(prompt, "", generation_config(model, top_logprobs))
    bare = _dumps(body)
    # The model turn is cut in before the bracket that closes the contents, which come first.
    split = len('{"contents":') + len(_dumps(body["contents"])) - 1
    head = bare[:split] + ',{"role":"model","parts":[{"text":"'
    tail = '"}]}' + bare[split:]
    return _Frame(bare.encode("ascii"), head.encode("ascii"), tail.encode("ascii"))


def _escape_once(text: str, prefix_ends: Sequence[int]) -> tuple[memoryview, Sequence[int]]:
    """A text as it stands in JSON, and where each prefix ends in it."""
    whole = encode_basestring_ascii(text)
    escaped = memoryview(whole.encode("ascii"))[1:-1]
    if len(escaped) == len(text):
        return escaped, prefix_ends
    ends: list[int] = []
    length = start = 0
    for end in prefix_ends:
        length += len(encode_basestring_ascii(text[start:end])) - 2
        ends.append(length)
        start = end
    return escaped, ends


def as_json(body: dict[str, Any]) -> bytes:
    """A body as it is sent."""
    return _dumps(body).encode("ascii")


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
