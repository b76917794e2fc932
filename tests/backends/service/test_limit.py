"""The limit on calls in flight."""

from __future__ import annotations

import asyncio

import pytest

from backends.service.limit import CallLimit


async def hold(limit: CallLimit, name: str, order: list[str], *, first: bool = False) -> None:
    async with limit.slot(first=first):
        order.append(name)
        await asyncio.sleep(0.01)


def test_never_more_than_allowed_and_none_is_forgotten() -> None:
    limit, now, most = CallLimit(3), 0, 0

    async def call() -> None:
        nonlocal now, most
        async with limit.slot():
            now += 1
            most = max(most, now)
            await asyncio.sleep(0.001)
            now -= 1

    async def work() -> None:
        await asyncio.gather(*(call() for _ in range(50)))

    asyncio.run(asyncio.wait_for(work(), 10))
    assert most == 3


def test_a_repeated_call_goes_before_those_that_wait() -> None:
    order: list[str] = []

    async def work() -> None:
        limit = CallLimit(1)
        calls = [asyncio.create_task(hold(limit, name, order)) for name in ("a", "b", "c")]
        await asyncio.sleep(0)
        calls.append(asyncio.create_task(hold(limit, "again", order, first=True)))
        await asyncio.gather(*calls)

    asyncio.run(work())
    assert order == ["a", "again", "b", "c"]


def test_calls_cancelled_together_leave_their_places_to_the_next() -> None:
    order: list[str] = []

    async def work() -> None:
        limit = CallLimit(1)
        first, second, third = (asyncio.create_task(hold(limit, name, order)) for name in ("a", "b", "c"))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        first.cancel()  # hands its place on before the second has left the queue
        second.cancel()
        ended = await asyncio.gather(first, second, return_exceptions=True)
        assert [type(error) for error in ended] == [asyncio.CancelledError] * 2
        await asyncio.wait_for(third, 5)

    asyncio.run(work())
    assert order == ["a", "c"]


@pytest.mark.parametrize("when", ["waiting", "just handed a place", "at work"])
def test_a_cancelled_call_leaves_its_place_to_the_next(when: str) -> None:
    order: list[str] = []

    async def work() -> None:
        limit = CallLimit(1)
        first, second, third = (asyncio.create_task(hold(limit, name, order)) for name in ("a", "b", "c"))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        if when == "waiting":
            second.cancel()
        elif when == "at work":
            first.cancel()
        else:
            while not first.done():
                await asyncio.sleep(0)
            second.cancel()
        await asyncio.wait_for(asyncio.wait([first, second, third]), 5)
        await asyncio.wait_for(hold(limit, "d", order), 5)

    asyncio.run(work())
    assert order[-2:] == ["c", "d"]


def test_it_halves_under_throttling_and_comes_back() -> None:
    limit = CallLimit(20)
    for index in range(50):
        limit.note(throttled=index % 3 == 0)
    assert limit.now == 10
    for _ in range(49):
        limit.note(throttled=False)
    assert limit.now == 10
    limit.note(throttled=False)
    assert limit.now == 12
    for index in range(400):
        limit.note(throttled=index % 6 == 0)
    assert limit.now == 12
    for _ in range(1000):
        limit.note(throttled=True)
    assert limit.now == 1


def test_a_limit_that_grows_lets_waiting_calls_in() -> None:
    async def work() -> None:
        limit = CallLimit(20)
        for _ in range(200):
            limit.note(throttled=True)
        assert limit.now == 1
        order: list[str] = []
        async with limit.slot():
            waiting = asyncio.create_task(hold(limit, "a", order))
            await asyncio.sleep(0)
            assert order == []
            for _ in range(50):
                limit.note(throttled=False)
            await asyncio.wait_for(waiting, 5)

    asyncio.run(work())


def test_who_waits_to_repeat_a_call_is_woken_when_no_more_may_be_made() -> None:
    async def work() -> None:
        limit = CallLimit(1)
        asleep = asyncio.create_task(limit.sleep(60))
        await asyncio.sleep(0)
        await asyncio.to_thread(limit.stop, "the disk takes no more")
        await asleep
        await limit.sleep(60)

    asyncio.run(asyncio.wait_for(work(), 10))
