"""When a call is repeated, how long it is waited, and what it is called when it fails."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import google.api_core.exceptions
import google.auth.exceptions
import httpx2
import pytest
import requests
from google.cloud.storage.exceptions import InvalidResponse
from google.genai import errors

from backends.errors import ConfigError, RetryableBackendError
from backends.service.retry import StatusError
from backends.vertex.service.retry import DailyQuotaError, translated, with_retries
from tests.vertex_world.wire import quota_details


def api_error(code: int, message: str = "no", headers: dict[str, str] | None = None, **fields: Any) -> errors.APIError:
    response = httpx2.Response(code, headers=headers or {}, request=httpx2.Request("GET", "http://localhost"))
    return errors.APIError(code, {"error": {"code": code, "message": message, "status": "S", **fields}}, response)


def storage_error(code: int, error: dict[str, Any]) -> InvalidResponse:
    """What a resumable transfer raises."""
    response = requests.Response()
    response.status_code = code
    response._content = json.dumps({"error": error}).encode()
    return InvalidResponse(response, "Request failed with status code", code)


def failing(*faults: Exception | None) -> tuple[Callable[[], Awaitable[str]], list[float]]:
    """A call that fails in turn; and when it was made."""
    left, times = list(faults), []

    async def call() -> str:
        times.append(time.monotonic())
        fault = left.pop(0) if left else None
        if fault is not None:
            raise fault
        return "done"

    return call, times


def run(call: Callable[[], Awaitable[str]], deadline_s: float = 10.0, first_wait_s: float = 0.01) -> str:
    return asyncio.run(with_retries(call, what="ask", deadline_s=deadline_s, first_wait_s=first_wait_s))


PASSING: list[Exception] = [
    *(api_error(code) for code in (408, 429, 500, 502, 503, 504)),
    httpx2.ConnectError("refused"),
    httpx2.ReadTimeout("slow"),
    httpx2.DecodingError("bad gzip"),
    requests.exceptions.ConnectionError("reset"),
    requests.exceptions.ChunkedEncodingError("cut"),
    ConnectionResetError("reset"),
    TimeoutError(),
    errors.UnknownApiResponseError("half a JSON"),
    google.api_core.exceptions.ServiceUnavailable("no"),
    google.api_core.exceptions.RetryError("timeout", ConnectionError("reset")),
    google.auth.exceptions.TransportError("reset"),
    google.auth.exceptions.RefreshError("503", retryable=True),
]


@pytest.mark.parametrize("fault", PASSING, ids=lambda fault: f"{type(fault).__name__} {getattr(fault, 'code', '')}")
def test_what_may_pass_is_repeated(fault: Exception) -> None:
    call, times = failing(fault, fault)
    assert run(call) == "done"
    assert len(times) == 3


LASTING: list[tuple[Exception, type[Exception]]] = [
    *((api_error(code), StatusError) for code in (400, 401, 403, 404, 409, 501)),
    (google.api_core.exceptions.Forbidden("no"), StatusError),
    (google.auth.exceptions.DefaultCredentialsError("none"), ConfigError),
    (google.auth.exceptions.RefreshError("invalid_grant"), ConfigError),
    (api_error(429, details=[{"violations": [{"quotaId": "GenerateRequestsPerDayPerProject"}]}]), DailyQuotaError),
    (api_error(429, details=quota_details("LogprobsRequestsPerDay", "1/d/{project}", "evals")), DailyQuotaError),
    (google.api_core.exceptions.TooManyRequests("no", errors=[{"reason": "dailyLimitExceeded"}]), DailyQuotaError),
    (storage_error(403, {"errors": [{"reason": "dailyLimitExceeded"}]}), DailyQuotaError),
    (google.api_core.exceptions.Forbidden("no", errors=[{"reason": "forbidden"}]), StatusError),
]


@pytest.mark.parametrize(("fault", "expected"), LASTING, ids=lambda item: str(item)[:60])
def test_what_will_not_pass_is_not_repeated(fault: Exception, expected: type[Exception]) -> None:
    call, times = failing(fault)
    with pytest.raises(expected, match="ask"):
        run(call)
    assert len(times) == 1


QUOTING: list[Exception] = [
    api_error(429, "Quota exceeded for limit 'Requests per minute' of projects/daily-evals; see /docs/daily-use"),
    api_error(429, "Resource exhausted: the daily limit of logprobs requests has been reached."),
    api_error(429, details=quota_details("RequestsPerMinute", "1/min/{project}", "per-day-quota")),
    google.api_core.exceptions.TooManyRequests("the bucket per-day-quota", errors=[{"reason": "rateLimitExceeded"}]),
    google.api_core.exceptions.Forbidden("of daily-evals", errors=[{"reason": "userRateLimitExceeded"}]),
    storage_error(429, {"message": "too many writes to gs://daily-evals per day", "errors": []}),
]


@pytest.mark.parametrize("fault", QUOTING, ids=lambda fault: str(fault)[:60])
def test_what_a_message_quotes_is_no_daily_limit(fault: Exception) -> None:
    with pytest.raises(RetryableBackendError) as caught, translated("ask"):
        raise fault
    assert caught.value.status == 429


def test_it_waits_as_long_as_the_details_ask_where_no_header_does() -> None:
    details = [{"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "1.5s"}]
    for headers, expected in ({}, 1.5), ({"Retry-After": "3"}, 3.0):
        with pytest.raises(RetryableBackendError) as caught, translated("ask"):
            raise api_error(429, headers=headers, details=details)
        assert caught.value.retry_after_s == expected


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_it_waits_as_long_as_the_service_asks(form: str) -> None:
    value = "1" if form == "seconds" else format_datetime(datetime.now(UTC) + timedelta(seconds=2), usegmt=True)
    call, times = failing(api_error(429, headers={"Retry-After": value}))
    assert run(call) == "done"
    assert 0.9 <= times[1] - times[0] <= 2.1


@pytest.mark.parametrize("value", ["", "soon", "-5", "Mon, 01 Jan 2001 00:00:00 GMT", "2030-01-01"])
def test_a_demand_that_says_nothing_is_ignored(value: str) -> None:
    call, times = failing(api_error(503, headers={"Retry-After": value}))
    assert run(call) == "done"
    assert times[1] - times[0] < 1


def test_a_wait_that_would_outlast_the_deadline_is_not_begun() -> None:
    call, times = failing(*[api_error(429, headers={"Retry-After": "86400"})] * 3)
    began = time.monotonic()
    with pytest.raises(RetryableBackendError, match="429"):
        run(call, deadline_s=5.0)
    assert time.monotonic() - began < 1
    assert len(times) == 1


def test_faults_that_do_not_end_are_given_up_at_the_deadline() -> None:
    call, times = failing(*[api_error(503)] * 1000)
    began = time.monotonic()
    with pytest.raises(RetryableBackendError):
        run(call, deadline_s=0.5)
    assert time.monotonic() - began <= 0.6
    assert len(times) > 2
