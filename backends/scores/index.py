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
from backends.scores.rows import SCORES
from backends.storage import StoredFile

MOST_KEYS = 500_000  # of prompts whose keys are kept while all files are looked through: those to one follow each other
Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


def first_scored(rows: pl.DataFrame) -> pl.DataFrame:
    """Of rows with one key, the one that was scored first: whatever their files are called, or wherever they lie."""
    if not rows["key"].is_duplicated().any():
        return rows  # what is said once need not be copied
    return rows.sort("scored_at", maintain_order=True).unique("key", keep="first", maintain_order=True)


class PromptIndex:
    """The rows of all parts of a prompt, by the hash of their keys.

    Parameters
    ----------
    opened : iterable of (StoredFile, Part)
        What they hold is read again where it is asked for.

    Attributes
    ----------
    n_bytes : int
        What it holds in memory.
    """

    def __init__(self, opened: Iterable[tuple[StoredFile, Part]]) -> None:
        self._parts: list[Part] = []
        keys = [pl.DataFrame(schema={"key": pl.String, "scored_at": SCORES["scored_at"]})]
        for file, part in opened:
            keys.append(part.rows(["key", "scored_at"]))
            part.let_go(file)
            self._parts.append(part)
        self._starts = np.cumsum([len(of_part) for of_part in keys])
        joined = pl.concat(keys)
        first = np.sort(joined.with_row_index().pipe(first_scored)["index"].to_numpy())
        hashes = joined["key"].hash().to_numpy()[first]
        order = np.argsort(hashes)
        self._hashes, self._rows = hashes[order], first[order]
        self.n_bytes = self._hashes.nbytes + self._rows.nbytes + sum(part.n_bytes for part in self._parts)

    def rows(self, keys: pl.Series, columns: Sequence[str]) -> Iterator[pl.DataFrame]:
        """The row of each of some keys that was scored first, and others near it.

        They come as they stand, a table for each run of them.

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
        How much of it a value is; each counts for one more.
    """

    def __init__(self, most: int, size: Callable[[Value], int]) -> None:
        self._most, self._size = most, size
        self._made: OrderedDict[Key, tuple[Value, int]] = OrderedDict()
        self._total = 0
        self._lock = threading.Lock()
        self._making: dict[Key, threading.Lock] = {}

    def of(self, key: Key, make: Callable[[], Value]) -> Value:
        """What there is for a key, made now if there is nothing; while it is made, others are given theirs."""
        with self._lock:
            making = self._making.setdefault(key, threading.Lock())
        with making:
            with self._lock:
                if key in self._made:
                    self._made.move_to_end(key)
                    self._making.pop(key, None)
                    return self._made[key][0]
            value = make()
            with self._lock:
                self._making.pop(key, None)
                self._keep(key, value)
            return value

    def _keep(self, key: Key, value: Value) -> None:
        size = self._size(value) + 1
        self._total += size - self._made.pop(key, (value, 0))[1]
        self._made[key] = value, size
        while len(self._made) > 1 and self._total > self._most:
            self._total -= self._made.popitem(last=False)[1][1]

    def forget(self, key: Key) -> None:
        """Have it made anew."""
        with self._lock:
            self._total -= self._made.pop(key, (None, 0))[1]
