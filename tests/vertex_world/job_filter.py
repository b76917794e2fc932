"""The filter of batchPredictionJobs.list, as AIP-160 has it: OR binds tighter than AND."""

from __future__ import annotations

import fnmatch
import operator
import re
from collections.abc import Callable
from datetime import datetime
from typing import Any

from tests.vertex_world.wire import ApiError, malformed

Predicate = Callable[[dict[str, Any]], bool]

_TOKEN = re.compile(r'\s*(?:(\()|(\))|(AND|OR)\b|([\w.]+)\s*(<=|>=|!=|=|<|>|:)\s*("(?:[^"\\]|\\.)*"|[^\s()]+))')
_COMPARE = {
    "=": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    ">": operator.gt,
    "<=": operator.le,
    ">=": operator.ge,
}
_TEXT_FIELDS = {"displayName": "displayName", "display_name": "displayName", "modelDisplayName": "modelDisplayName"}
_TIME_FIELDS = {"createTime": "createTime", "create_time": "createTime"}


def parse_filter(text: str) -> Predicate:
    """A predicate over jobs in their JSON form; a filter that cannot be read is a 400."""
    tokens = _tokens(text)
    predicate = _conjunction(tokens, text)
    if tokens:
        raise _invalid(text)
    return predicate


def _tokens(text: str) -> list[tuple[str, ...]]:
    tokens: list[tuple[str, ...]] = []
    position = 0
    while text[position:].strip():
        match = _TOKEN.match(text, position)
        if not match:
            raise _invalid(text)
        tokens.append(tuple(group for group in match.groups() if group))
        position = match.end()
    return tokens


def _conjunction(tokens: list[tuple[str, ...]], text: str) -> Predicate:
    terms = [_disjunction(tokens, text)]
    while tokens and tokens[0] == ("AND",):
        tokens.pop(0)
        terms.append(_disjunction(tokens, text))
    return lambda job: all(term(job) for term in terms)


def _disjunction(tokens: list[tuple[str, ...]], text: str) -> Predicate:
    terms = [_term(tokens, text)]
    while tokens and tokens[0] == ("OR",):
        tokens.pop(0)
        terms.append(_term(tokens, text))
    return lambda job: any(term(job) for term in terms)


def _term(tokens: list[tuple[str, ...]], text: str) -> Predicate:
    token = tokens.pop(0) if tokens else ()
    if token == ("(",):
        inner = _conjunction(tokens, text)
        if not tokens or tokens.pop(0) != (")",):
            raise _invalid(text)
        return inner
    if len(token) != 3:
        raise _invalid(text)
    name, comparison, value = token
    return _comparison(name, comparison, _unquoted(value), text)


def _comparison(name: str, comparison: str, value: str, text: str) -> Predicate:
    if name in _TEXT_FIELDS:
        return _text_comparison(_TEXT_FIELDS[name], comparison, value, text)
    if name == "state" and comparison in {"=", "!="}:
        return lambda job: _COMPARE[comparison](job["state"], value)
    if name in _TIME_FIELDS and comparison != ":":
        moment = _time(value, text)
        return lambda job: _COMPARE[comparison](_time(job[_TIME_FIELDS[name]], text), moment)
    if name.startswith("labels."):
        key = name.removeprefix("labels.")
        if (comparison, value) == (":", "*"):
            return lambda job: key in job.get("labels", {})
        if comparison == "=":
            return lambda job: job.get("labels", {}).get(key) == value
    raise _invalid(text)


def _text_comparison(name: str, comparison: str, value: str, text: str) -> Predicate:
    if comparison in {"=", "!="}:
        return lambda job: _COMPARE[comparison](job.get(name, ""), value)
    if comparison == ":":
        pattern = "*".join(part.replace("[", "[[]").replace("?", "[?]") for part in value.split("*"))
        return lambda job: fnmatch.fnmatchcase(job.get(name, ""), pattern if "*" in value else f"*{pattern}*")
    raise _invalid(text)


def _unquoted(value: str) -> str:
    return re.sub(r"\\(.)", r"\1", value[1:-1]) if value.startswith('"') else value


def _time(value: str, text: str) -> datetime:
    try:
        return datetime.fromisoformat(value)
    except ValueError as error:
        raise _invalid(text) from error


def _invalid(text: str) -> ApiError:
    return malformed(f"Invalid filter: {text!r}.")
