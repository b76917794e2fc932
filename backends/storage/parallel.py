"""Work on many files at once, in threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

S = TypeVar("S")
T = TypeVar("T")

PARALLEL = 16


def in_order(pool: ThreadPoolExecutor, function: Callable[[int, S], T], items: Iterable[S]) -> Generator[tuple[S, T]]:
    """What a function of index and item gives, in the order of the items, worked out a bounded number ahead."""
    ahead: deque[tuple[S, Future[T]]] = deque()
    try:
        for index, item in enumerate(items):
            ahead.append((item, pool.submit(function, index, item)))
            if len(ahead) > PARALLEL:
                first, result = ahead.popleft()
                yield first, result.result()
        while ahead:
            first, result = ahead.popleft()
            yield first, result.result()
    finally:
        for _, result in ahead:
            result.cancel()


def in_parallel(function: Callable[[Path], None], paths: Sequence[Path]) -> None:
    """Call a function for each path, several at a time; the first error is raised when all have ended."""
    if len(paths) < 2:
        for path in paths:
            function(path)
        return
    with ThreadPoolExecutor(PARALLEL) as pool:
        for done in [pool.submit(function, path) for path in paths]:
            done.result()
