"""What the refusals of calls say of all calls."""

from __future__ import annotations

import asyncio

import pytest

from backends.errors import BackendError, RetryableBackendError
from backends.service.breaker import AskingStoppedError, Breaker
from backends.service.retry import StatusError

MANY = 12


@pytest.mark.parametrize(
    ("proof", "stops"),
    [
        (StatusError("403 no rights", status=403), True),
        (StatusError("429 no credit", status=429), True),
        (RetryableBackendError("429 slow down", status=429), False),
        (RetryableBackendError("503 away", status=503), False),
        (StatusError("400 bad", status=400), False),
        (None, False),
    ],
    ids=str,
)
def test_refusals_in_a_row_stop_all_only_where_a_tiny_request_is_refused_for_good(
    proof: BackendError | None, stops: bool
) -> None:
    async def prove() -> None:
        if proof is not None:
            raise proof

    async def refused() -> None:
        raise StatusError("403 this one", status=403)

    async def work() -> list[BaseException]:
        breaker = Breaker("q", prove, deadline_s=0.01)
        return [(await asyncio.gather(breaker.repeated(refused), return_exceptions=True))[0] for _ in range(MANY)]

    found = asyncio.run(work())
    assert any(isinstance(error, AskingStoppedError) for error in found) == stops
