"""How many calls may be in flight: fewer while the service throttles, more again when it stops."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress

from backends.service.breaker import AskingStoppedError

# A few throttled calls in a hundred are repeated and that is all; a quarter of a window means too high a rate.
_TOO_MANY_THROTTLED = 0.25
_FEW_THROTTLED = 0.1
_SMALLEST_WINDOW = 50


class CallLimit:
    """A limit on calls in flight over everything that shares it, between 1 and ``most``.

    It is judged over windows of answers: with a quarter or more of them throttled it halves, with a tenth or fewer it
    grows by a tenth of ``most``.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.now = most
        self._in_flight = 0
        self._answers = 0
        self._throttled = 0
        self._stopped: str | None = None
        self._asleep: asyncio.AbstractEventLoop | None = None
        self._woken = asyncio.Event()
        self._waiting: deque[asyncio.Future[None]] = deque()

    @asynccontextmanager
    async def slot(self, *, first: bool = False, goes_on: bool = False) -> AsyncGenerator[None]:
        """Wait for a place among the calls in flight; ``first`` goes before all that wait.

        With ``goes_on`` the call completes an answer that is paid for, and is made though no further one may be.

        A call that is repeated belongs first: at the back it would come to its turn when little else is left to do, and
        the last calls of a run would be made one after the other.

        Raises
        ------
        AskingStoppedError
            If no further call may be made.
        """
        await self._take(first)
        try:
            if self._stopped is not None and not goes_on:
                raise AskingStoppedError(self._stopped)
            yield
        finally:
            self._in_flight -= 1
            self._hand_on()

    def stop(self, why: str) -> None:
        """Let no further call be made, from any thread; those in flight end as they end, and `sleep` ends at once."""
        self._stopped = why
        if self._asleep is not None:
            self._asleep.call_soon_threadsafe(self._woken.set)

    async def sleep(self, seconds: float) -> None:
        """Wait before a call is repeated, or until no further call may be made."""
        self._asleep = asyncio.get_running_loop()
        if self._stopped is None:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._woken.wait(), seconds)

    async def _take(self, first: bool) -> None:
        if self._in_flight < self.now and not self._waiting:
            self._in_flight += 1
            return
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        (self._waiting.appendleft if first else self._waiting.append)(place)
        try:
            await place  # who sets it has counted this call already, so that nobody can come in between
        except asyncio.CancelledError:
            if place.done() and not place.cancelled():
                self._in_flight -= 1
                self._hand_on()
            elif place in self._waiting:
                self._waiting.remove(place)
            raise

    def _hand_on(self) -> None:
        while self._waiting and self._in_flight < self.now:
            place = self._waiting.popleft()
            if not place.cancelled():  # else its task has not come to hear of it
                self._in_flight += 1
                place.set_result(None)

    def note(self, *, throttled: bool) -> None:
        """Count an answer."""
        self._answers += 1
        self._throttled += throttled
        if self._answers < max(_SMALLEST_WINDOW, self.now):
            return
        share = self._throttled / self._answers
        self._answers = self._throttled = 0
        if share >= _TOO_MANY_THROTTLED:
            self.now = max(1, self.now // 2)
        elif share <= _FEW_THROTTLED and self.now < self.most:
            self.now = min(self.most, self.now + max(1, self.most // 10))
            self._hand_on()
