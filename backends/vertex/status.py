"""Errors of Google's services by their fields: ``google.rpc.Status``, its details, and the older ``errors`` list.

A message is for people. It quotes names of projects, buckets and models, which may hold any word, so that nothing is
decided by its words. What decides are codes, and the names that the service itself gives to its limits: ``quota_limit``
of an ``ErrorInfo``, ``quotaId`` of a ``QuotaFailure``, and where no field says it, what the service's fixed sentence on
quotas quotes as the metric and the limit. See https://cloud.google.com/apis/design/errors.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import suppress
from itertools import chain
from typing import Any, NamedTuple

# HTTP 429 is RESOURCE_EXHAUSTED, whose number in google.rpc.Code is 8.
_EXHAUSTED_CODES = frozenset({429, 8})
_EXHAUSTED = "RESOURCE_EXHAUSTED"
# What the JSON interfaces that are older than google.rpc.Status call it, with 403 or 429.
_DAILY_REASONS = frozenset({"dailylimitexceeded", "dailylimitexceededunreg"})
_RATE_REASONS = frozenset({"ratelimitexceeded", "userratelimitexceeded"})
# In the name that a service gives to a limit: ``GenerateRequestsPerDayPerProject``, ``logprobs_requests_per_day``.
_PERIOD = re.compile(r"(?P<day>per[ _-]?day|daily)|per[ _-]?(?:second|minute|hour)", re.IGNORECASE)
_DAILY_UNIT = re.compile(r"\d*/(d|day)(/|$)")  # of a limit, such as ``1/d/{project}``
# "Quota exceeded for quota metric 'M' and limit 'L' of service 'S' for consumer 'project_number:N'.", and the older
# "Quota exceeded for S/M with base model: B.": up to what is the service's own.
_SENTENCE = re.compile(
    r"Quota exceeded for (?:quota (?:metric|group) '(?P<metric>[^']*)'(?: and limit '(?P<limit>[^']*)')? of service '"
    r"|[a-z]+\.googleapis\.com/(?P<path>\w+))"
)
# Free words on a limit; names of projects have no spaces in them.
_DAILY_WORDS = re.compile(r"\bdaily\s(?:\w+\s){0,3}(?:limit|quota)|per[ _]day\b|per_day_", re.IGNORECASE)
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
    limited = exhausted or not reasons.isdisjoint(_RATE_REASONS)
    return ServiceError(
        code=stated,
        status=name,
        message=_text(error.get("message")),
        daily_quota=(limited and _names_daily_limit(error)) or not reasons.isdisjoint(_DAILY_REASONS),
        rate_limited=limited,
        retry_after_s=_retry_delay(error),
    )


def error_in_text(text: str) -> Any:
    """The JSON object in a text such as ``Too Many Requests: {"error": …}``; None if there is none.

    Of several, for a text may quote what was asked, the first with an ``error``, else with the number of a ``code``.
    """
    found = list(_objects_in(text))
    with_error = (item for item in found if isinstance(item.get("error"), dict))
    with_code = (item for item in found if _int(item.get("code")) is not None)
    return next(chain(with_error, with_code, found), None)


def _objects_in(text: str) -> Iterator[dict[str, Any]]:
    """The outermost JSON objects in a text."""
    start = text.find("{")
    while start >= 0:
        end = start + 1
        with suppress(ValueError, RecursionError):
            found, end = json.JSONDecoder().raw_decode(text, start)
            yield found
        start = text.find("{", end)


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
    """By the fields that state the period of a limit, any of them; else by the service's sentence."""
    said: list[bool | None] = []
    for detail in _objects(error.get("details")):
        metadata = detail.get("metadata")
        said.append(_is_daily(metadata, "quota_limit") if isinstance(metadata, dict) else None)
        said += (_violates_daily(violation) for violation in _objects(detail.get("violations")))
    stated = [daily for daily in said if daily is not None]
    return any(stated) if stated else _sentence_is_daily(_text(error.get("message")) or "") is True


def _is_daily(fields: dict[str, Any], limit: str) -> bool | None:
    """By the unit of the limit, its name, the name of what it limits: the first that has a period; None if none has."""
    unit = _field(fields, "quota_unit")
    if unit:
        return _DAILY_UNIT.match(unit) is not None
    return _first_period(_field(fields, limit), _field(fields, "quota_metric"))


def _first_period(*names: str) -> bool | None:
    """Whether the first of the names that has a period is of a limit per day; None if none has."""
    found = next((match for name in names if (match := _PERIOD.search(name))), None)
    return None if found is None else found["day"] is not None


def _violates_daily(violation: dict[str, Any]) -> bool | None:
    stated = _is_daily(violation, "quota_id")
    if stated is not None:
        return stated
    subject, words = _field(violation, "subject"), _field(violation, "description")
    for name in (subject, re.split(r"[:/]", subject)[-1]):  # ``project:NAME``, of the caller
        words = words.replace(name, " ") if name else words
    by_sentence = _sentence_is_daily(words)
    return by_sentence if by_sentence is not None else _DAILY_WORDS.search(words) is not None or None


def _sentence_is_daily(text: str) -> bool | None:
    """What the fixed sentence on quotas says of the period, by the names of the limit and the metric alone."""
    found = _SENTENCE.search(text)
    return None if found is None else _first_period(found["limit"] or "", found["metric"] or found["path"] or "")


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
