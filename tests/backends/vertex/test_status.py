"""Errors of Google's services, as they and others write them: what their fields say, whatever their words are."""

from __future__ import annotations

import json
from typing import Any

import pytest

from backends.vertex import answers
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


def sentence(metric: str, limit: str, consumer: str = "project_number:123456789") -> str:
    """How the service says in words that a quota is used up."""
    where = f"of service 'aiplatform.googleapis.com' for consumer '{consumer}'."
    return f"Quota exceeded for quota metric '{metric}' and limit '{limit}' {where}"


DAILY: list[tuple[str, Any]] = [
    ("sentence, limit", error(message=sentence("Logprobs requests", "Logprobs requests per day"))),
    ("sentence, metric", error(message=sentence("aiplatform.googleapis.com/x_requests_per_day_per_project", "Calls"))),
    ("sentence of a rate code", error(403, "X", sentence("Q", "Q per day"), errors=[{"reason": "rateLimitExceeded"}])),
    ("sentence and a name", error(message=f"429: {sentence('Q', 'Q per day', 'projects/per-minute')}", details=[])),
    (
        "older sentence",
        error(message="Quota exceeded for aiplatform.googleapis.com/calls_per_day_per_project with base model: m."),
    ),
    ("sentence in a violation", error(details=of_violation(description=sentence("Q", "Q per day")))),
    ("words in a violation", error(details=of_violation(subject="project:x", description="Daily Limit exceeded"))),
    (
        "a limit without a period",
        error(details=of_limit("Calls", quota_metric="aiplatform.googleapis.com/calls_per_day")),
    ),
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
    row = answers.read_row("k", {"status": f"Too Many Requests: {json.dumps(body)}"})
    assert isinstance(row, ScoreFailure)
    if isinstance(body, dict):
        assert row.reason == "daily-quota"


def quoting(name: str) -> list[tuple[str, Any]]:
    """Errors that are no daily quota, with a name in all the places where services quote names."""
    per_minute = quota_details("RequestsPerMinutePerProject", "1/min/{project}", name)
    words = f"Quota exceeded for quota metric 'Requests' of projects/{name} with gs://{name}/daily/per day"
    consumer = {"consumer": f"projects/{name}", "service": "aiplatform.googleapis.com"}
    denied = [{"@type": INFO, "reason": "IAM_PERMISSION_DENIED", "metadata": consumer}]
    other = sentence("Calls per minute", "Calls", consumer=f"project:{name}")
    nobody = sentence("Calls", "Calls", consumer=f"projects/{name}")
    base = f"Quota exceeded for aiplatform.googleapis.com/online_requests_per_base_model with base model: {name}."
    about = f"Quota exceeded for project {name}, bucket {name}."
    resource = {"@type": "type.googleapis.com/google.rpc.ResourceInfo", "resourceName": name, "owner": name}
    return [
        ("a rate", error(message=words, details=per_minute)),
        ("a rate without details", error(message=words)),
        ("a sentence on a rate", error(message=other)),
        ("a sentence on a limit without a period", error(message=nobody)),
        ("a sentence on a base model", error(message=base)),
        ("a sentence that details outweigh", error(message=sentence("Q", "Q per day"), details=per_minute)),
        ("a violation", error(details=of_violation(subject=f"project:{name}", description=about))),
        ("a violation by sentence", error(details=of_violation(subject=f"project:{name}", description=nobody))),
        (
            "a violation whose name outweighs",
            error(details=of_violation(quotaId="PerMinute", description="Daily limit")),
        ),
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
        result = answers.read_row("k", {"status": status, "response": None})
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
        ('Request {"a": 1} failed: {"error": {"code": 429}}', {"error": {"code": 429}}),
        ('{"a": {"error": {"code": 1}, "code": 1}} failed: {"code": 8}', {"code": 8}),
        ('{"code": 3, "x": 1} or {"code": "x"}: {"error": {}} {"error": {"code": 8}}', {"error": {}}),
        ('{"status": "RESOURCE_EXHAUSTED"}', {"status": "RESOURCE_EXHAUSTED"}),
        ("no JSON {at all", None),
        ("{" * 5000, None),
        ("", None),
    ],
)
def test_the_object_in_a_text_is_found(text: str, expected: Any) -> None:
    assert error_in_text(text) == expected
