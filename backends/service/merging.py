"""Several async iterators as one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import TypeVar

T = TypeVar("T")

# Results are taken to disk as they come; a few waiting ones keep every iterator going meanwhile.
_WAITING = 1000


async def merged(iterators: Sequence[AsyncGenerator[T]]) -> AsyncGenerator[T]:
    """All items of all iterators as they come, each iterator running as a task of its own.

    The first error stops the others and is raised, after the items that came before it; closing the generator stops
    them all.
    """
    items: asyncio.Queue[tuple[T] | None] = asyncio.Queue(_WAITING)

    async def drain(iterator: AsyncGenerator[T]) -> None:
        async with aclosing(iterator):  # one that is stopped between two items would stay open
            async for item in iterator:
                await items.put((item,))

    async def drain_all() -> None:
        try:
            async with asyncio.TaskGroup() as group:
                for iterator in iterators:
                    group.create_task(drain(iterator))
        finally:
            await items.put(None)

    work = asyncio.create_task(drain_all())
    try:
        while (item := await items.get()) is not None:
            yield item[0]
        await _first_error(work)
    finally:
        work.cancel()
        while not work.done():
            _discard(items)
            await asyncio.wait([work], timeout=0.05)


async def _first_error(work: asyncio.Task[None]) -> None:
    try:
        await work
    except ExceptionGroup as group:
        raise group.exceptions[0] from group


def _discard(items: asyncio.Queue[tuple[T] | None]) -> None:
    # Room for what a stopping iterator still wants to put, so that it can end.
    while not items.empty():
        items.get_nowait()
