"""Repeating calls to a service: one layer, honest about when it gives up.

The clients' own retries are off. A call is repeated after throttling, a 5xx or a broken connection, with exponential
backoff and jitter, not before the service's ``Retry-After``, until a deadline.
"""

from __future__ import annotations

import asyncio
import email.utils
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any, TypeVar

import tenacity

from backends.errors import BackendError, RetryableBackendError

T = TypeVar("T")
logger = logging.getLogger(__name__)

THROTTLED = 429
RETRYABLE_STATUS = frozenset({408, THROTTLED, 500, 502, 503, 504})
_LONGEST_WAIT_S = 60.0
_LONGEST_LINE = 500


class StatusError(BackendError):
    """A refusal of the service that repeating does not mend; ``status`` is the HTTP status."""

    def __init__(self, message: str, *, status: int | None, **where: str | None) -> None:
        super().__init__(message, **where)
        self.status = status


async def with_retries(
    call: Callable[[], Awaitable[T]],
    *,
    what: str,
    deadline_s: float,
    first_wait_s: float = 1.0,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> T:
    """Await ``call()`` until it succeeds, fails for good, or the deadline passes.

    Parameters
    ----------
    call : callable
        Starts one attempt; what may be repeated it raises as `RetryableBackendError`.
    what : str
        For logs: "create batch job tokenkl-…".
    deadline_s : float
        Seconds from the first attempt after which no further one starts; a wait that would last longer is not begun.
    first_wait_s : float
        The longest first wait in seconds; it doubles with each attempt, up to a minute.

    sleep : callable
        Waits between two attempts; one that comes back early has the next attempt made.

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
        sleep=sleep,
    )
    async for attempt in attempts:
        with attempt:
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


def retry_after(headers: Any) -> float | None:
    """The seconds that an answer asks to wait, in either form that HTTP has; None where it asks for nothing."""
    value = headers.get("Retry-After") if headers is not None else None
    if value is None:
        return None
    with suppress(ValueError):
        return max(0.0, float(value))
    with suppress(ValueError, TypeError):  # a date without a zone, or no date at all, asks for nothing
        return max(0.0, (email.utils.parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds())
    return None


def one_line(error: object) -> str:
    """The text of an error in one line of bounded length."""
    return " ".join(str(error).split())[:_LONGEST_LINE]
