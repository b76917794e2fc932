"""Products of one BLAS thread each, threads of our own beside each other, and where a row may lie in a product.

BLAS rounds differently for different shapes and numbers of threads, and with the code for some processors also for
different places of a row. `find_period` proves for the BLAS at hand what a row's bits depend on; rows are placed by it.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np

from backends.local.gguf import FloatArray

CHUNK = 48  # rows of a block; a multiple of the tile heights 12, 16 and 24 of common BLAS kernels

T = TypeVar("T")
R = TypeVar("R")


def find_period(products: Iterable[tuple[FloatArray, int]]) -> int | None:
    """What a row's place in a product must be known up to, so that its bits are known.

    Parameters
    ----------
    products : iterable of (weight of shape (out, in), number of blocks)
        ``x @ weight.T`` is computed with up to so many blocks of `CHUNK` rows.

    Returns
    -------
    int or None
        The least divisor p of `CHUNK` such that a row has the bits that it has in a block of its own, at any place that
        is the same modulo p, in a product of several blocks, whatever its other rows are. None if there is none.
    """
    # Smallest first: most of what is not so is found there.
    by_size = sorted(products, key=lambda product: product[0].size)
    divisors = (period for period in range(1, CHUNK + 1) if CHUNK % period == 0)
    return next((period for period in divisors if all(_has_period(*each, period) for each in by_size)), None)


def _has_period(weight: FloatArray, n_blocks: int, period: int) -> bool:
    block = np.random.default_rng(0).standard_normal((CHUNK, weight.shape[1]), dtype=np.float32)
    # A turn by the period moves each place to the next of its kind, so that all of one kind are compared with each
    # other; different turns give each block other neighbours.
    turns = [period * (1 + at % 3) for at in range(n_blocks)]
    found = (np.concatenate([np.roll(block, turn, axis=0) for turn in turns]) @ weight.T).reshape(n_blocks, CHUNK, -1)
    alone = block @ weight.T
    return all(np.array_equal(rows, np.roll(alone, turn, axis=0)) for rows, turn in zip(found, turns, strict=True))


def places(positions: Sequence[int], period: int) -> list[int]:
    """Rising places of rows in a product, as close as may be, each the row's position modulo ``period``."""
    found: list[int] = []
    at = 0
    for position in positions:
        at += (position - at) % period
        found.append(at)
        at += 1
    return found


def spread(rows: FloatArray, at: Sequence[int]) -> FloatArray:
    """Rows, shape (n, width), put into whole blocks at some places, zeros elsewhere; shape (blocks * CHUNK, width)."""
    blocks = np.zeros((-(-(at[-1] + 1) // CHUNK) * CHUNK, rows.shape[1]), np.float32)
    blocks[at] = rows
    return blocks


def shares_of(items: Sequence[T], n: int) -> list[Sequence[T]]:
    """At most ``n`` nearly equal parts, each of items in a row and none empty."""
    n = min(n, len(items))
    return [items[len(items) * part // n : len(items) * (part + 1) // n] for part in range(n)]


def in_threads(work: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """``work`` for each item, each in a thread of its own; of several errors, one that is no broken barrier."""
    if len(items) < 2:
        return [work(item) for item in items]
    with ThreadPoolExecutor(len(items)) as pool:
        found = [pool.submit(work, item) for item in items]
    errors = sorted(
        (error for future in found if (error := future.exception()) is not None),
        key=lambda error: isinstance(error, threading.BrokenBarrierError),
    )
    if errors:
        raise errors[0]
    return [future.result() for future in found]


def blas_threads() -> int:
    """How many threads BLAS would use: what the user, or the number of processors, allows."""
    return max((library.num_threads for library in _blas_controller().lib_controllers), default=1)


@functools.cache
def _blas_controller() -> Any:
    import threadpoolctl  # pyright: ignore[reportMissingTypeStubs]

    controller: Any = threadpoolctl.ThreadpoolController()
    return controller.select(user_api="blas")


@contextmanager
def one_blas_thread() -> Generator[None, None, None]:
    """BLAS on one thread inside: how it divides a product among threads changes the rounding.

    Raises
    ------
    RuntimeError
        If BLAS does not obey.
    """
    controller = _blas_controller()
    for library in controller.lib_controllers:
        # The setting is the process's. Newer versions let only the thread that came first change it, and ignore any
        # other without a word; as long as the engine computes, it is the one that must have its way.
        if hasattr(library, "clear_controlling_thread"):
            library.clear_controlling_thread(force=True)
    with controller.limit(limits=1):
        refusing = [library.filepath for library in controller.lib_controllers if library.num_threads != 1]
        if refusing:
            raise RuntimeError(f"{refusing[0]} cannot be set to one thread; start with OPENBLAS_NUM_THREADS=1.")
        yield
