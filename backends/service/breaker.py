"""An end of the asking that holds for every call: the service refuses all, or what it answers cannot be kept.

A refusal now and then is of one context. Several in a row may still be: whether the service refuses every call is asked
of it, with one tiny request that holds nothing of the user's.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from backends.errors import BackendError, RetryableBackendError
from backends.service.retry import THROTTLED, StatusError, with_retries

logger = logging.getLogger(__name__)

NOT_ASKED = "not-asked"  # the reason of what is left then

UNAUTHORIZED, _UNPAID, FORBIDDEN = 401, 402, 403
# 429 is a refusal only where the credit is used up; what throttles is no `StatusError`.
_OF_THE_CALLER = frozenset({UNAUTHORIZED, _UNPAID, FORBIDDEN, THROTTLED})
_IN_A_ROW = 5  # refusals by rights, without an answer between
PATIENCE_S = 10.0  # credentials that are renewed just now are accepted within seconds
_FIRST_WAIT_S = 0.3
_ASKED_AGAIN = 3  # times for one call, where others pass and it alone is refused by its credentials


class AskingStoppedError(BackendError):
    """No more is asked in this run; the message says why."""


class Breaker:
    """What the refusals of one model say of all calls to it; used within one event loop.

    Parameters
    ----------
    what : str
        Who is asked, for the message.
    prove : callable
        Starts one tiny request; raises what a call raises.
    deadline_s : float
        How long a call may be repeated.
    """

    def __init__(self, what: str, prove: Callable[[], Awaitable[Any]], deadline_s: float) -> None:
        self._what = what
        self._prove = prove
        self._patience_s = min(PATIENCE_S, deadline_s)
        self._in_a_row = self._n_proofs = 0
        self._proving = asyncio.Lock()
        self._stopped: str | None = None

    async def passed(self) -> None:
        """Wait while it is found out whether any call is answered.

        Raises
        ------
        AskingStoppedError
            If none is.
        """
        if self._proving.locked():
            async with self._proving:
                pass
        if self._stopped is not None:
            raise AskingStoppedError(self._stopped)

    def answered(self) -> None:
        """Note a call that was answered."""
        self._in_a_row = 0

    async def repeated(self, call: Callable[[], Awaitable[Any]]) -> Any:
        """Await ``call()``, again where its credentials were refused and others are accepted now.

        Raises
        ------
        StatusError
            A refusal of this call.
        AskingStoppedError
            If the service refuses every call.
        """
        for again in range(_ASKED_AGAIN + 1):
            try:
                return await call()
            except StatusError as error:
                if error.status not in _OF_THE_CALLER:
                    raise
                await self._refused(error)
                if error.status != UNAUTHORIZED or again == _ASKED_AGAIN:
                    raise
        raise AssertionError("unreachable: the last call returns or raises")

    async def _refused(self, error: StatusError) -> None:
        self._in_a_row += 1
        if error.status != UNAUTHORIZED and self._in_a_row < _IN_A_ROW:
            return
        before = self._n_proofs
        async with self._proving:
            if self._stopped is None and self._n_proofs == before:  # else another one has just found it out
                await self._find_out(error)
        if self._stopped is not None:
            raise AskingStoppedError(self._stopped) from error

    async def _find_out(self, error: StatusError) -> None:
        async def attempt() -> None:
            try:
                await self._prove()
            except StatusError as refusal:
                if refusal.status == UNAUTHORIZED:
                    raise RetryableBackendError(str(refusal), status=refusal.status) from refusal
                raise

        try:
            await with_retries(
                attempt, what=f"find out whether {self._what} answers", deadline_s=self._patience_s,
                first_wait_s=_FIRST_WAIT_S,
            )  # fmt: skip
        except BackendError as refusal:
            # What may still succeed, such as a throttled proof, refuses nothing; but for credentials that stay refused.
            status = getattr(refusal, "status", None)
            if status == UNAUTHORIZED or (isinstance(refusal, StatusError) and status in _OF_THE_CALLER):
                self._stopped = (
                    f"{self._what} refuses every call ({error}), so that no more is asked in this run. Mend the "
                    "credentials or rights and run again: it asks for what is missing alone."
                )
                logger.error("%s", self._stopped)
        self._in_a_row = 0
        self._n_proofs += 1
