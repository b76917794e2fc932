"""Repeating calls to a service: one layer, honest about when it gives up.

The SDKs' own retries are off. A call is repeated after throttling, a 5xx or a broken connection, with exponential
backoff and jitter, not before the service's ``Retry-After``, until a deadline.
"""

from __future__ import annotations

import email.utils
import json
import logging
from collections.abc import Awaitable, Callable, Generator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from typing import Any, TypeVar

import aiohttp
import google.api_core.exceptions
import google.auth.exceptions
import httpx2
import requests.exceptions
import tenacity
from google.cloud.storage.exceptions import DataCorruption, InvalidResponse
from google.genai import errors as genai_errors

from backends.errors import BackendError, ConfigError, RetryableBackendError
from backends.vertex.status import ServiceError, read_error

T = TypeVar("T")
logger = logging.getLogger(__name__)

_THROTTLED = 429
_RETRYABLE_STATUS = frozenset({408, _THROTTLED, 500, 502, 503, 504})
_LONGEST_WAIT_S = 60.0
_TRANSPORT_ERRORS = (
    DataCorruption,
    aiohttp.ClientError,
    httpx2.RequestError,
    requests.exceptions.RequestException,
    ConnectionError,
    TimeoutError,
)


class DailyQuotaError(BackendError):
    """A daily limit of the service, such as that of requests with log-probabilities, is used up: final for today."""


async def with_retries(
    call: Callable[[], Awaitable[T]], *, what: str, deadline_s: float, first_wait_s: float = 1.0
) -> T:
    """Await ``call()`` until it succeeds, fails for good, or the deadline passes.

    Parameters
    ----------
    call : callable
        Starts one attempt.
    what : str
        For logs and errors: "create batch job tokenkl-…".
    deadline_s : float
        Seconds from the first attempt after which no further one starts; a wait that would last longer is not begun.
    first_wait_s : float
        The longest first wait in seconds; it doubles with each attempt, up to a minute.

    Raises
    ------
    BackendError
        A fault that repeating cannot mend, or the last one when the deadline passed.
    """
    attempts = tenacity.AsyncRetrying(
        retry=tenacity.retry_if_exception_type(RetryableBackendError),
        wait=_NotBefore(tenacity.wait_random_exponential(multiplier=first_wait_s, max=_LONGEST_WAIT_S)),
        stop=tenacity.stop_before_delay(deadline_s),
        before_sleep=lambda state: logger.log(_level(state), "%s: %s; trying again", what, _failure(state)),
        reraise=True,
    )
    async for attempt in attempts:
        with attempt, translated(what):
            return await call()
    raise AssertionError("unreachable: the last attempt returns or raises")


def _level(state: tenacity.RetryCallState) -> int:
    # A fault now and then is everyday life; one that stays for the third time is worth a line.
    return logging.INFO if state.attempt_number >= 3 else logging.DEBUG


def _failure(state: tenacity.RetryCallState) -> BaseException | None:
    return state.outcome.exception() if state.outcome else None


class _NotBefore(tenacity.wait.wait_base):
    """A backoff that is never shorter than what the service asked for."""

    def __init__(self, backoff: tenacity.wait.wait_base) -> None:
        self._backoff = backoff

    def __call__(self, retry_state: tenacity.RetryCallState) -> float:
        error = _failure(retry_state)
        asked = error.retry_after_s if isinstance(error, RetryableBackendError) and error.retry_after_s else 0.0
        return max(asked, self._backoff(retry_state))


@contextmanager
def translated(what: str) -> Generator[None]:
    """Turn the errors of the Google SDKs and their transports into ours."""
    try:
        yield
    except genai_errors.APIError as error:
        said = read_error(error.details, error.code)
        raise _from_fields(what, said, _text(error.status, error.message), error.response) from error
    except google.api_core.exceptions.GoogleAPICallError as error:
        said = read_error(_json_of(error.response) or _details_of(error), error.code)
        raise _from_fields(what, said, error.message, error.response) from error
    except google.api_core.exceptions.RetryError as error:
        raise RetryableBackendError(f"{what}: {_line(error)}") from error
    except InvalidResponse as error:  # resumable transfers speak to the service below the other error classes
        said = read_error(_json_of(error.response), error.response.status_code)
        raise _from_fields(what, said, _line(error), error.response) from error
    except google.auth.exceptions.DefaultCredentialsError as error:
        raise ConfigError(
            f"{what}: no Google credentials were found. Run 'gcloud auth application-default login', or set "
            "GOOGLE_APPLICATION_CREDENTIALS to a service-account file."
        ) from error
    except google.auth.exceptions.GoogleAuthError as error:
        if getattr(error, "retryable", False) or isinstance(error, google.auth.exceptions.TransportError):
            raise RetryableBackendError(f"{what}: the token service failed: {_line(error)}") from error
        raise ConfigError(f"{what}: Google refused the credentials: {_line(error)}") from error
    except (genai_errors.UnknownApiResponseError, json.JSONDecodeError) as error:
        raise RetryableBackendError(f"{what}: the answer is not JSON") from error
    except _TRANSPORT_ERRORS as error:
        raise RetryableBackendError(f"{what}: {type(error).__name__}: {_line(error)}") from error


def _from_fields(what: str, said: ServiceError, text: str | None, response: Any) -> BackendError:
    message = f"{what}: {said.code} {text}"
    if said.daily_quota:
        return DailyQuotaError(
            f"{message.rstrip('.')}. This limit is per day: run again tomorrow, or ask Google to raise it."
        )
    if said.rate_limited or said.code in _RETRYABLE_STATUS:
        asked = _retry_after(getattr(response, "headers", None))
        return RetryableBackendError(
            message,
            retry_after_s=said.retry_after_s if asked is None else asked,
            status=_THROTTLED if said.rate_limited else said.code,
        )
    return StatusError(message, status=said.code)


def _json_of(response: Any) -> Any:
    with suppress(Exception):  # gRPC has no such thing, and a proxy may answer with anything
        return response.json()
    return None


def _details_of(error: google.api_core.exceptions.GoogleAPICallError) -> dict[str, Any]:
    stated = {"reason": error.reason, "metadata": error.metadata}
    return {"message": error.message, "details": [*error.details, stated], "errors": error.errors}


class StatusError(BackendError):
    """A refusal of the service that repeating does not mend; ``status`` is the HTTP status."""

    def __init__(self, message: str, *, status: int | None, **where: str | None) -> None:
        super().__init__(message, **where)
        self.status = status


def _retry_after(headers: Any) -> float | None:
    value = headers.get("Retry-After") if headers is not None else None
    if value is None:
        return None
    with suppress(ValueError):
        return max(0.0, float(value))
    with suppress(ValueError, TypeError):  # a date without a zone, or no date at all, asks for nothing
        return max(0.0, (email.utils.parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds())
    return None


def _text(status: str | None, message: str | None) -> str:
    return _line(": ".join(part for part in (status, message) if part))


def _line(error: object) -> str:
    return " ".join(str(error).split())[:500]
