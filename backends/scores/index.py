"""Where the scores of a prompt stand on disk: of many, those that are asked for are read, and few others.

A data set may have a million answers to one prompt. It is measured some thousand positions at a time, and each time
all parts of the prompt would be read.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Generic, TypeVar

import numpy as np
import polars as pl

from backends.scores.parts import ROWS_TOGETHER, Part
from backends.storage import StoredFile

MOST_KEYS = 500_000  # of prompts whose keys are kept while all files are looked through: those to one follow each other
Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class PromptIndex:
    """The rows of all parts of a prompt, by the hash of their keys.

    Parameters
    ----------
    opened : iterable of (StoredFile, Part)
        What they hold is read again where it is asked for.
    """

    def __init__(self, opened: Iterable[tuple[StoredFile, Part]]) -> None:
        self._parts: list[Part] = []
        keys = [pl.Series("key", dtype=pl.String)]
        for file, part in opened:
            keys.append(part.rows(["key"])["key"])
            part.let_go(file)
            self._parts.append(part)
        self._starts = np.cumsum([len(of_part) for of_part in keys])
        joined = pl.concat(keys)
        first = np.flatnonzero(joined.is_first_distinct().to_numpy())
        hashes = joined.hash().to_numpy()[first]
        order = np.argsort(hashes)
        self._hashes, self._rows = hashes[order], first[order]

    def __len__(self) -> int:
        return len(self._hashes)

    def rows(self, keys: pl.Series, columns: Sequence[str]) -> Iterator[pl.DataFrame]:
        """The first row of each of some keys, and others near it: a table for each run of them, as they stand.

        Raises
        ------
        FileNotFoundError
            If a part was replaced.
        OSError
            If one cannot be read.
        """
        wanted = keys.hash().to_numpy()
        first, last = (np.searchsorted(self._hashes, wanted, side) for side in ("left", "right"))
        n = last - first
        at = np.sort(self._rows[np.arange(n.sum()) + np.repeat(first - (np.cumsum(n) - n), n)])
        of_part = np.searchsorted(self._starts, at, "right") - 1
        begins = (np.diff(of_part, prepend=-1) != 0) | (np.diff(at, prepend=-1) > ROWS_TOGETHER)
        starts = np.flatnonzero(begins)
        for run, stop in zip(starts, np.append(starts, len(at))[1:], strict=True):
            number = int(of_part[run])
            begin, end = (int(at[place] - self._starts[number]) for place in (run, stop - 1))
            yield self._parts[number].rows(columns, begin, end + 1 - begin)


class UsedLast(Generic[Key, Value]):
    """What was made for the keys that were used last; more than ``most`` in all only for the very last one.

    Parameters
    ----------
    most : int
    size : callable
        How much of it a value is.
    """

    def __init__(self, most: int, size: Callable[[Value], int]) -> None:
        self._most, self._size = most, size
        self._made: OrderedDict[Key, Value] = OrderedDict()
        self._lock = threading.Lock()

    def of(self, key: Key, make: Callable[[], Value]) -> Value:
        """What there is for a key, made now if there is nothing."""
        with self._lock:
            value = self._made.pop(key) if key in self._made else make()
            self._made[key] = value
            while len(self._made) > 1 and sum(map(self._size, self._made.values())) > self._most:
                self._made.popitem(last=False)
            return value

    def forget(self, key: Key) -> None:
        """Have it made anew."""
        with self._lock:
            self._made.pop(key, None)
