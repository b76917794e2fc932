"""Reads and checks what a file of responses says of the request: the prompt and the sampling settings."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, cast

from kl.input.problems import Notes, as_list, is_encodable, number, show
from kl.records import Prompt, Role, Sampling, Turn

_ROLES: dict[str, Role] = {"user": "user", "model": "model", "assistant": "model"}


class _RawTurn(NamedTuple):
    role: str
    content: str


def read_prompt(document: dict[str, object], notes: Notes) -> Prompt | None:
    """The prompt of a file with its system text; None where a defect was noted.

    ``prompt`` is a text, or a list of ``{role, content}`` turns. An empty system text counts as none.
    """
    raw = document.get("prompt")
    if raw is None:
        return notes.defect("no-prompt", "`prompt` is missing" if "prompt" not in document else "`prompt` is null")
    turns = [_RawTurn("user", raw)] if isinstance(raw, str) else _read_turns(raw, notes)
    if turns is None:
        return None
    return _build_prompt(turns, document.get("system"), notes)


def _read_turns(raw: object, notes: Notes) -> list[_RawTurn] | None:
    items = as_list(raw)
    if items is None:
        return notes.defect("bad-prompt", f"`prompt` is {show(raw)}")
    turns: list[_RawTurn] = []
    for index, item in enumerate(items):
        turn = _read_turn(item, index, notes)
        if turn is None:
            return None
        turns.append(turn)
    return turns


def _read_turn(item: object, index: int, notes: Notes) -> _RawTurn | None:
    name = f"turn {index} of the prompt"
    if isinstance(item, str):  # its text must not get into the message
        return notes.defect("bad-prompt", f"{name} is a string, not an object")
    turn = notes.as_object(item, "bad-prompt", name)
    if turn is None:
        return None
    role = turn.get("role")
    if role != "system" and not (isinstance(role, str) and role in _ROLES):
        return notes.defect("unknown-role", f"{name} has the role {show(role)}")
    if role == "system" and index > 0:
        return notes.defect("unknown-role", f"{name} has the role 'system', which only the first turn may have")
    content = _read_content(turn.get("content"), name, notes)
    return None if content is None else _RawTurn(str(role), content)


def _read_content(raw: object, name: str, notes: Notes) -> str | None:
    """A text, or a list of ``{"type": "text", "text": …}`` parts, joined."""
    if isinstance(raw, str):
        return raw
    parts = as_list(raw)
    if parts is None:
        return notes.defect("bad-prompt", f"the content of {name} is {show(raw)}")
    texts: list[str] = []
    for index, item in enumerate(parts):
        part_name = f"part {index} of the content of {name}"
        if isinstance(item, str):
            return notes.defect("bad-prompt", f"{part_name} is a string, not an object")
        part = notes.as_object(item, "bad-prompt", part_name)
        if part is None:
            return None
        text, kind = part.get("text"), part.get("type", "text")
        if kind != "text" or not isinstance(text, str):
            return notes.defect("bad-prompt", f"{part_name} is no text (type {show(kind)})")
        texts.append(text)
    return "".join(texts)


def _build_prompt(turns: list[_RawTurn], stated_system: object, notes: Notes) -> Prompt | None:
    system = turns[0].content if turns and turns[0].role == "system" else None
    spoken = turns if system is None else turns[1:]
    if stated_system is not None:
        if system is not None:
            return notes.defect("two-system-texts", "there is a `system` key and a system turn in the prompt")
        system = _read_content(stated_system, "`system`", notes)
        if system is None:
            return None
    if not spoken:
        return notes.defect(
            "empty-prompt", "the prompt has no turns" if system is None else "the prompt has no user turn"
        )
    if spoken[-1].role != "user":
        return notes.defect("prompt-end", f"the last turn of the prompt has the role {show(spoken[-1].role)}")
    if any(not turn.content for turn in spoken):
        return notes.defect("empty-prompt", "the prompt, or a turn of it, is empty")
    if not all(is_encodable(text) for text in [system or "", *(turn.content for turn in spoken)]):
        return notes.defect("lone-surrogate", "the prompt holds a lone surrogate")
    return Prompt(tuple(Turn(_ROLES[turn.role], turn.content) for turn in spoken), system or None)


def read_sampling(raw: dict[str, object], inherited: Sampling, notes: Notes) -> Sampling:
    """The settings that ``raw`` (a file or a response) states, else those ``inherited``.

    They stand under ``sampling`` or beside it. A value that makes no sense, or two that differ, count as not stated and
    are noted; they never fall back to what is inherited.
    """
    nested: dict[str, object] = {}
    stated = raw.get("sampling")
    if type(stated) is dict:
        nested = cast("dict[str, object]", stated)
    elif stated is not None:
        notes.repair("bad-sampling", f"`sampling` is {show(stated)}, not a plain object; taken as not stated")
        inherited = Sampling()
    read = {
        name: _setting(name, raw, nested, getattr(inherited, name), check, notes) for name, check in _CHECKS.items()
    }
    top_k = read.pop("top_k")
    biases = [place["logit_bias"] for place in (nested, raw) if place.get("logit_bias") is not None]
    has_bias = any(bias not in ({}, [], False) for bias in biases) if biases else inherited.logit_bias
    return Sampling(**read, top_k=None if top_k is None else int(top_k), logit_bias=has_bias)


def _setting(
    name: str,
    raw: dict[str, object],
    nested: dict[str, object],
    inherited: float | None,
    check: Callable[[float], bool],
    notes: Notes,
) -> float | None:
    stated = [place[name] for place in (nested, raw) if place.get(name) is not None]
    if not stated:
        return inherited
    numbers = [number(value) for value in stated]
    for value, read in zip(stated, numbers, strict=True):
        if read is None or not check(read):
            return notes.repair("bad-sampling", f"`{name}` is {show(value)}; taken as not stated")
    if len(set(numbers)) > 1:
        both = " and ".join(map(show, stated))
        return notes.repair("bad-sampling", f"`{name}` is stated as {both}; taken as not stated")
    return numbers[0]


def _temperature(value: float) -> bool:
    return math.isfinite(value) and value >= 0


def _top_p(value: float) -> bool:
    return 0 <= value <= 1


def _top_k(value: float) -> bool:
    return -1 <= value < 2**31 and value == int(value)  # 0 and -1 are how services say "off"


def _penalty(value: float) -> bool:
    return math.isfinite(value)


_CHECKS: dict[str, Callable[[float], bool]] = {
    "temperature": _temperature,
    "top_p": _top_p,
    "top_k": _top_k,
    "min_p": _top_p,
    "typical_p": _top_p,
    "repetition_penalty": _penalty,
    "presence_penalty": _penalty,
    "frequency_penalty": _penalty,
}
