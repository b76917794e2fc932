"""The errors of Google's SDKs and their transports as ours, and calls that are repeated by them."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Generator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import aiohttp
import google.api_core.exceptions
import google.auth.exceptions
import httpx2
import requests.exceptions
from google.cloud.storage.exceptions import DataCorruption, InvalidResponse
from google.genai import errors as genai_errors

from backends.errors import BackendError, ConfigError, RetryableBackendError
from backends.service import retry as service_retry
from backends.service.retry import RETRYABLE_STATUS, THROTTLED, StatusError, one_line, retry_after
from backends.vertex.service.setup import credentials_problem
from backends.vertex.status import ServiceError, read_error

T = TypeVar("T")

_TRANSPORT_ERRORS = (
    DataCorruption,
    aiohttp.ClientError,
    httpx2.RequestError,
    requests.exceptions.RequestException,
    ConnectionError,
    TimeoutError,
)


# Credentials that are renewed just now, or a token service that lags, refuse for seconds; wrong ones do so for ever.
RENEWAL_S = 60.0
_UNAUTHORIZED = 401


class DailyQuotaError(BackendError):
    """A daily limit of the service, such as that of requests with log-probabilities, is used up: final for today."""


async def with_retries(
    call: Callable[[], Awaitable[T]],
    *,
    what: str,
    deadline_s: float,
    first_wait_s: float = 1.0,
    renewal_s: float = 0.0,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> T:
    """As `backends.service.retry.with_retries`, for calls that raise the errors of Google's SDKs.

    For ``renewal_s`` seconds it repeats a call whose credentials are refused, too.
    """
    began = time.monotonic()

    async def attempt() -> T:
        try:
            with translated(what):
                return await call()
        except StatusError as error:
            if error.status == _UNAUTHORIZED and time.monotonic() - began < renewal_s:
                raise RetryableBackendError(str(error), status=error.status) from error
            raise

    return await service_retry.with_retries(
        attempt, what=what, deadline_s=deadline_s, first_wait_s=first_wait_s, sleep=sleep
    )


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
        raise RetryableBackendError(f"{what}: {one_line(error)}") from error
    except InvalidResponse as error:  # resumable transfers speak to the service below the other error classes
        said = read_error(_json_of(error.response), error.response.status_code)
        raise _from_fields(what, said, one_line(error), error.response) from error
    except google.auth.exceptions.DefaultCredentialsError as error:
        raise ConfigError(f"{what}: {credentials_problem(error)}") from error
    except google.auth.exceptions.GoogleAuthError as error:
        if getattr(error, "retryable", False) or isinstance(error, google.auth.exceptions.TransportError):
            raise RetryableBackendError(f"{what}: the token service failed: {one_line(error)}") from error
        raise ConfigError(f"{what}: Google refused the credentials: {one_line(error)}") from error
    except (genai_errors.UnknownApiResponseError, json.JSONDecodeError) as error:
        raise RetryableBackendError(f"{what}: the answer is not JSON") from error
    except _TRANSPORT_ERRORS as error:
        raise RetryableBackendError(f"{what}: {type(error).__name__}: {one_line(error)}") from error


def _from_fields(what: str, said: ServiceError, text: str | None, response: Any) -> BackendError:
    message = f"{what}: {said.code} {text}"
    if said.daily_quota:
        return DailyQuotaError(
            f"{message.rstrip('.')}. This limit is per day: run again tomorrow, or ask Google to raise it."
        )
    if said.rate_limited or said.code in RETRYABLE_STATUS:
        asked = retry_after(getattr(response, "headers", None))
        return RetryableBackendError(
            message,
            retry_after_s=said.retry_after_s if asked is None else asked,
            status=THROTTLED if said.rate_limited else said.code,
        )
    return StatusError(message, status=said.code)


def _json_of(response: Any) -> Any:
    with suppress(Exception):  # gRPC has no such thing, and a proxy may answer with anything
        return response.json()
    return None


def _details_of(error: google.api_core.exceptions.GoogleAPICallError) -> dict[str, Any]:
    stated = {"reason": error.reason, "metadata": error.metadata}
    return {"message": error.message, "details": [*error.details, stated], "errors": error.errors}


def _text(status: str | None, message: str | None) -> str:
    return one_line(": ".join(part for part in (status, message) if part))
