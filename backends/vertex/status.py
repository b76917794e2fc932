"""Errors of Google's services by their fields: ``google.rpc.Status``, its details, and the older ``errors`` list.

A message is for people. It quotes names of projects, buckets and models, which may hold any word, so that nothing is
decided by it. What decides are codes, and the names that the service itself gives to its limits (``quota_limit`` of an
``ErrorInfo``, ``quotaId`` of a ``QuotaFailure``). See https://cloud.google.com/apis/design/errors.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, NamedTuple

# HTTP 429 is RESOURCE_EXHAUSTED, whose number in google.rpc.Code is 8.
_EXHAUSTED_CODES = frozenset({429, 8})
_EXHAUSTED = "RESOURCE_EXHAUSTED"
# What the JSON interfaces that are older than google.rpc.Status call it, with 403 or 429.
_DAILY_REASONS = frozenset({"dailylimitexceeded", "dailylimitexceededunreg"})
_RATE_REASONS = frozenset({"ratelimitexceeded", "userratelimitexceeded"})
# The name that a service gives to a limit: ``GenerateRequestsPerDayPerProject``, ``logprobs_requests_per_day``.
_DAILY_LIMIT = re.compile(r"per[ _-]?day|daily", re.IGNORECASE)
_DAILY_UNIT = re.compile(r"\d*/(d|day)(/|$)")  # of a limit, such as ``1/d/{project}``
_DURATION = re.compile(r"(\d+(?:\.\d+)?)s")


class ServiceError(NamedTuple):
    """What the fields of an error say.

    ``code`` is that of HTTP, or of google.rpc in jobs and rows. ``daily_quota``: a limit per day is used up.
    ``rate_limited``: too many calls just now, whatever the code. ``retry_after_s`` is the wait that was asked for.
    """

    code: int | None
    status: str | None
    message: str | None
    daily_quota: bool
    rate_limited: bool
    retry_after_s: float | None


def read_error(body: Any, code: int | None = None) -> ServiceError:
    """Read an error as JSON: a Status, alone or as the field ``error``; ``code`` is that of HTTP, if there was one.

    Anything else, a plain text say, is an error that says nothing beyond the code.
    """
    error = _status_of(body)
    stated = _int(error.get("code")) if code is None else code
    name = _text(error.get("status"))
    exhausted = stated in _EXHAUSTED_CODES if stated is not None else name == _EXHAUSTED
    may_limit = stated is None or stated == 403 or stated in _EXHAUSTED_CODES
    reasons = {reason.replace("_", "").lower() for reason in _reasons(error)} if may_limit else set[str]()
    return ServiceError(
        code=stated,
        status=name,
        message=_text(error.get("message")),
        daily_quota=(exhausted and _names_daily_limit(error)) or not reasons.isdisjoint(_DAILY_REASONS),
        rate_limited=exhausted or not reasons.isdisjoint(_RATE_REASONS),
        retry_after_s=_retry_delay(error),
    )


def error_in_text(text: str) -> Any:
    """The JSON object in a text such as ``Too Many Requests: {"error": …}``; None if there is none."""
    for match in re.finditer(r"\{", text):
        with suppress(ValueError, RecursionError):
            return json.JSONDecoder().raw_decode(text, match.start())[0]
    return None


def _status_of(body: Any) -> dict[str, Any]:
    if isinstance(body, list) and len(body) == 1:
        body = body[0]
    inner = body.get("error") if isinstance(body, dict) else None
    found = inner if isinstance(inner, dict) else body
    return found if isinstance(found, dict) else {}


def _reasons(error: dict[str, Any]) -> Iterator[str]:
    """The reasons that an ``ErrorInfo`` and the older list of errors state."""
    for item in (*_objects(error.get("details")), *_objects(error.get("errors"))):
        if isinstance(reason := item.get("reason"), str):
            yield reason


def _names_daily_limit(error: dict[str, Any]) -> bool:
    for detail in _objects(error.get("details")):
        metadata = detail.get("metadata")
        if isinstance(metadata, dict) and _is_daily(metadata, "quota_limit"):
            return True
        if any(_is_daily(violation, "quota_id") for violation in _objects(detail.get("violations"))):
            return True
    return False


def _is_daily(fields: dict[str, Any], limit: str) -> bool:
    """By the unit of the limit, else its name, else the name of what it limits: the first that is stated decides."""
    unit = _field(fields, "quota_unit")
    if unit:
        return _DAILY_UNIT.match(unit) is not None
    return _DAILY_LIMIT.search(_field(fields, limit) or _field(fields, "quota_metric")) is not None


def _field(fields: dict[str, Any], name: str) -> str:
    first, *rest = name.split("_")  # proto JSON has fields in either spelling
    value = fields.get(name, fields.get(first + "".join(map(str.capitalize, rest))))
    return value if isinstance(value, str) else ""


def _retry_delay(error: dict[str, Any]) -> float | None:
    for detail in _objects(error.get("details")):
        found = _DURATION.fullmatch(_field(detail, "retry_delay"))
        if found:
            return float(found[1])
    return None


def _objects(value: Any) -> list[dict[str, Any]]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list | tuple) else []


def _int(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None
