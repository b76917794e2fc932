"""Errors of Google's services, as they and others write them: what their fields say, whatever their words are."""

from __future__ import annotations

import json
from typing import Any

import pytest

from backends.vertex import wire
from backends.vertex.status import error_in_text, read_error
from kl.records import ScoreFailure
from tests.vertex_world.wire import quota_details

NAMES = ["daily-evals", "per-day-quota", "requests-per-day", "PerDay"]
INFO = "type.googleapis.com/google.rpc.ErrorInfo"


def error(code: int = 429, status: str = "RESOURCE_EXHAUSTED", message: str = "no", **fields: Any) -> dict[str, Any]:
    return {"error": {"code": code, "status": status, "message": message, **fields}}


def of_limit(limit: str, **metadata: str) -> list[dict[str, Any]]:
    return [{"@type": INFO, "reason": "RATE_LIMIT_EXCEEDED", "metadata": {"quota_limit": limit, **metadata}}]


def of_violation(**fields: str) -> list[dict[str, Any]]:
    return [{"@type": "type.googleapis.com/google.rpc.QuotaFailure", "violations": [fields]}]


DAILY: list[tuple[str, Any]] = [
    ("name of the limit", error(details=of_limit("GenerateRequestsPerDayPerProject"))),
    ("name in another style", error(details=of_limit("logprobs-requests-per-day"))),
    ("unit of the limit", error(details=of_limit("LogprobsRequests", quota_unit="1/d/{project}"))),
    ("metric alone", error(details=[{"metadata": {"quota_metric": "aiplatform.googleapis.com/logprobs_per_day"}}])),
    (
        "violation of the Gemini API",
        error(details=of_violation(quotaId="GenerateRequestsPerDayPerProject-Free")),
    ),
    ("violation in snake_case", error(details=of_violation(quota_id="RequestsPerDay"))),
    ("one of two violations", error(details=[*of_limit("RequestsPerMinute"), *of_violation(quotaId="RequestsPerDay")])),
    ("as google.rpc.Status", {"code": 8, "message": "no", "details": of_limit("RequestsPerDay")}),
    ("status alone", {"error": {"status": "RESOURCE_EXHAUSTED", "details": of_limit("RequestsPerDay")}}),
    ("a list of one", [error(details=of_limit("RequestsPerDay"))]),
    ("older interfaces", error(403, "PERMISSION_DENIED", errors=[{"reason": "dailyLimitExceeded"}])),
    ("by the stand-in", error(details=quota_details("LogprobsRequestsPerDay", "1/d/{project}", "evals"))),
]


@pytest.mark.parametrize("body", [body for _, body in DAILY], ids=[name for name, _ in DAILY])
def test_a_daily_limit_is_known_by_its_fields(body: Any) -> None:
    assert read_error(body).daily_quota
    row = wire.read_row("k", {"status": f"Too Many Requests: {json.dumps(body)}"})
    assert isinstance(row, ScoreFailure)
    if isinstance(body, dict):
        assert row.reason == "daily-quota"


def quoting(name: str) -> list[tuple[str, Any]]:
    """Errors that are no daily quota, with a name in all the places where services quote names."""
    per_minute = quota_details("RequestsPerMinutePerProject", "1/min/{project}", name)
    words = f"Quota exceeded for quota metric 'Requests' of projects/{name} with gs://{name}/daily/per day"
    consumer = {"consumer": f"projects/{name}", "service": "aiplatform.googleapis.com"}
    denied = [{"@type": INFO, "reason": "IAM_PERMISSION_DENIED", "metadata": consumer}]
    resource = {"@type": "type.googleapis.com/google.rpc.ResourceInfo", "resourceName": name, "owner": name}
    return [
        ("a rate", error(message=words, details=per_minute)),
        ("a rate without details", error(message=words)),
        ("a rate whose dimensions quote", error(details=[{"violations": [{"quotaDimensions": {"model": name}}]}])),
        ("a unit that outweighs a name", error(details=of_limit(name, quota_unit="1/min/{project}/{model}"))),
        ("a name that outweighs a metric", error(details=of_limit("PerMinute", quota_metric=f"custom/{name}"))),
        ("a bad request", error(400, "FAILED_PRECONDITION", words, details=of_limit("RequestsPerDay"))),
        ("a refusal", error(403, "PERMISSION_DENIED", words, details=denied)),
        ("not found", error(404, "NOT_FOUND", words, details=[resource])),
        ("a fault", error(500, "INTERNAL", words)),
        ("a text", words),
        ("a list of texts", [words, name]),
        ("nothing", None),
    ]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", range(len(quoting(""))), ids=[case for case, _ in quoting("")])
def test_a_name_is_no_daily_limit(case: int, name: str) -> None:
    body = quoting(name)[case][1]
    assert not read_error(body).daily_quota
    for status in (body, f"429 {json.dumps(body)}", f"projects/{name} {{daily}}: {json.dumps(body)}"):
        result = wire.read_row("k", {"status": status, "response": None})
        assert isinstance(result, ScoreFailure)
        assert result.reason == ("row-error" if status else "empty-answer")


def test_the_code_of_http_outweighs_what_the_body_says() -> None:
    body = error(details=of_limit("RequestsPerDay"))
    assert read_error(body, 429).daily_quota
    assert not read_error(body, 503).daily_quota
    assert read_error(body, 503).code == 503


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (error(), True),
        (error(403, "PERMISSION_DENIED", errors=[{"reason": "userRateLimitExceeded"}]), True),
        (error(403, "PERMISSION_DENIED", errors=[{"reason": "forbidden"}]), False),
        (error(403, "PERMISSION_DENIED", "Rate Limit Exceeded"), False),
        (error(400, "INVALID_ARGUMENT", errors=[{"reason": "rateLimitExceeded"}]), False),
    ],
)
def test_too_many_calls_are_known_by_their_fields(body: Any, expected: bool) -> None:
    assert read_error(body).rate_limited is expected


@pytest.mark.parametrize(("delay", "expected"), [("34.07s", 34.07), ("0s", 0.0), ("soon", None), (3, None)])
def test_the_wait_that_is_asked_for_is_read_from_the_details(delay: Any, expected: float | None) -> None:
    details = [{"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": delay}]
    assert read_error(error(details=details)).retry_after_s == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('Bad Request: {"error": {"code": 400}}', {"error": {"code": 400}}),
        ('of {project}: {"code": 8} (trailing)', {"code": 8}),
        ("no JSON {at all", None),
        ("{" * 5000, None),
        ("", None),
    ],
)
def test_the_object_in_a_text_is_found(text: str, expected: Any) -> None:
    assert error_in_text(text) == expected
