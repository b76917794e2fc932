"""Several async generators as one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest

from backends.service.merging import merged


async def numbers(start: int, stop: int, closed: list[int], pause: float = 0.0) -> AsyncGenerator[int]:
    try:
        for number in range(start, stop):
            yield number
            await asyncio.sleep(pause)
    finally:
        closed.append(start)


def test_every_item_of_all_comes_once_and_more_than_fit_in_the_queue() -> None:
    async def work() -> list[int]:
        return [item async for item in merged([numbers(start, start + 2500, []) for start in (0, 2500, 5000)])]

    assert sorted(asyncio.run(work())) == list(range(7500))


def test_nothing_merges_to_nothing() -> None:
    async def work() -> list[int]:
        return [item async for item in merged([])]

    assert asyncio.run(work()) == []


def test_the_first_error_comes_after_the_items_before_it_and_closes_the_others() -> None:
    closed: list[int] = []

    async def failing() -> AsyncGenerator[int]:
        yield -1
        await asyncio.sleep(0.05)
        raise OSError("no")

    async def work() -> list[int]:
        found: list[int] = []

        async def take() -> None:
            async for item in merged([failing(), numbers(0, 10**9, closed, 0.01), numbers(5, 10**9, closed)]):
                found.append(item)

        with pytest.raises(OSError, match="no"):
            await take()
        assert sorted(closed) == [0, 5]
        return found

    assert -1 in asyncio.run(asyncio.wait_for(work(), 20))


def test_closing_it_early_closes_all_at_once_though_its_queue_is_full() -> None:
    closed: list[int] = []

    async def work() -> None:
        items = merged([numbers(start, 10**9, closed) for start in range(3)])
        await anext(items)
        await asyncio.sleep(0.1)
        await items.aclose()
        assert sorted(closed) == [0, 1, 2]

    asyncio.run(asyncio.wait_for(work(), 20))
