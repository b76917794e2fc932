"""Work ahead of who asks for it."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from backends.storage import (
    in_order,
)


def test_work_ahead_is_bounded_and_in_order() -> None:
    begun: list[int] = []

    def numbers() -> Iterator[int]:
        for number in range(1000):
            begun.append(number)
            yield number

    with ThreadPoolExecutor(4) as pool:
        results = in_order(pool, lambda index, number: index * number, numbers())
        assert [next(results) for _ in range(10)] == [(n, n * n) for n in range(10)]
        assert len(begun) < 100
        results.close()
