"""How many calls may be in flight: fewer while the service throttles, more again when it stops."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

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
        self._free = asyncio.Condition()

    @asynccontextmanager
    async def slot(self) -> AsyncGenerator[None]:
        """Wait for a place among the calls in flight."""
        async with self._free:
            await self._free.wait_for(lambda: self._in_flight < self.now)
            self._in_flight += 1
        try:
            yield
        finally:
            async with self._free:
                self._in_flight -= 1
                self._free.notify()

    async def note(self, *, throttled: bool) -> None:
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
            async with self._free:
                self._free.notify_all()
