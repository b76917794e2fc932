"""What a pass keeps of each row: of responses that are written, and of contexts that begin alike."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from backends.local.blas import CHUNK
from backends.local.config import LlamaConfig
from backends.local.gguf import FloatArray

_KEPT_BYTES = 400_000_000  # of rows that later contexts may begin with

S = TypeVar("S", np.float32, np.int64)


class Chunk(NamedTuple):
    """The rows of a context from ``start`` on, a multiple of `CHUNK`; ``end`` is before the next, or the context's."""

    ids: Sequence[int]
    start: int

    @property
    def end(self) -> int:
        """One more than the last row."""
        return min(self.start + CHUNK, len(self.ids))


class Run(NamedTuple):
    """Rows of one chunk of a context, in a row, that are to be computed: the last of ``path``, from ``start`` on.

    ``path`` are the numbers in `Rows` of all rows of the context up to there, ``ids`` those of the run's own.
    """

    path: NDArray[np.int64]
    start: int
    ids: Sequence[int]

    @property
    def own(self) -> NDArray[np.int64]:
        """The numbers of the run's own rows."""
        return self.path[self.start :]

    @property
    def positions(self) -> range:
        """Their places in the context."""
        return range(self.start, len(self.path))


class Rows:
    """Keys, values and outputs of rows. A row is what some ids lead to: contexts share those they have in common."""

    def __init__(self, config: LlamaConfig) -> None:
        self._next: dict[tuple[int, int], int] = {}  # (row before, id) → row; 0 before the first, and its numbers are 0
        self._pass = 0
        self._last_pass = np.zeros(1, np.int64)  # in which a row was used
        self._outputs = np.zeros((1, config.width), np.float32)
        self._layers = [
            np.zeros((1, 2, config.n_kv_heads, config.head_dim), np.float32) for _ in range(config.n_layers)
        ]
        self._most = _KEPT_BYTES // sum(rows.nbytes for rows in (self._outputs, *self._layers))

    def of(self, chunks: Iterable[Chunk]) -> tuple[list[NDArray[np.int64]], list[Run]]:
        """The numbers of each chunk's rows, and what is lacking of them and of those before, earlier ones first."""
        self._pass += 1
        paths: list[NDArray[np.int64]] = []
        runs: list[Run] = []
        used: list[NDArray[np.int64]] = []
        for chunk in chunks:
            ids = chunk.ids[: chunk.end]
            n_known = len(self._next)
            path = self._path(ids)
            first = int(np.searchsorted(path, n_known, "right"))  # a row has a higher number than those before it
            ends = [first, *range(first // CHUNK * CHUNK + CHUNK, len(ids), CHUNK), len(ids)]
            runs += [Run(path[:end], start, ids[start:end]) for start, end in pairwise(ends) if start < end]
            paths.append(path[chunk.start :])
            used.append(path)
        self._reserve(len(self._next) + 1)
        for path in used:
            self._last_pass[path] = self._pass
        return paths, runs

    def _path(self, ids: Iterable[int]) -> NDArray[np.int64]:
        found: list[int] = []
        row = 0
        for token in ids:
            row = self._next.setdefault((row, token), len(self._next) + 1)
            found.append(row)
        return np.array(found, dtype=np.int64)

    def store(self, layer: int, rows: NDArray[np.int64], keys: FloatArray, values: FloatArray) -> None:
        """Put what a layer gives for some rows, shape (n, kv heads, head_dim)."""
        self._layers[layer][rows, 0] = keys
        self._layers[layer][rows, 1] = values

    def keys_values(self, layer: int, path: NDArray[np.int64]) -> tuple[FloatArray, FloatArray]:
        """Of some rows, and zeros up to the end of the last one's chunk, shape (kv heads, m, head_dim) each."""
        filled = np.zeros(-(-len(path) // CHUNK) * CHUNK, np.int64)
        filled[: len(path)] = path
        keys, values = self._layers[layer][filled].transpose(1, 2, 0, 3)
        return keys, values

    def store_outputs(self, rows: NDArray[np.int64], outputs: FloatArray) -> None:
        """Put what the last layer gives for some rows, shape (n, width)."""
        self._outputs[rows] = outputs

    def outputs(self, rows: NDArray[np.int64]) -> FloatArray:
        """A copy, shape (n, width)."""
        return self._outputs[rows]

    def _reserve(self, n: int) -> None:
        capacity = len(self._last_pass)
        if capacity < n:
            more = max(n, capacity * 3 // 2) - capacity
            self._last_pass = _grown(self._last_pass, more)
            self._outputs = _grown(self._outputs, more)
            for layer, rows in enumerate(self._layers):
                self._layers[layer] = _grown(rows, more)

    def forget(self) -> None:
        """Of too many rows let go of those that were not used for the longest; those of the last pass stay."""
        n = len(self._next)
        if n <= self._most:
            return
        last_pass = self._last_pass[: n + 1]
        # A quarter more than must be, as those that stay are copied. Whenever a row is used those before it are, too.
        oldest = np.sort(last_pass)[n - self._most * 3 // 4]
        stays = last_pass >= min(oldest + 1, self._pass)
        stays[0] = True
        number: list[int] = (np.cumsum(stays) - 1).tolist()
        self._next = {(number[before], token): number[row] for (before, token), row in self._next.items() if stays[row]}
        self._last_pass, self._outputs = last_pass[stays], self._outputs[: n + 1][stays]
        for layer, rows in enumerate(self._layers):
            self._layers[layer] = rows[: n + 1][stays]


def _grown(rows: NDArray[S], more: int) -> NDArray[S]:
    return np.concatenate([rows, np.zeros((more, *rows.shape[1:]), rows.dtype)])


def packs_of(runs: Sequence[Run], n: int) -> list[list[Run]]:
    """At most ``n`` parts of nearly equal numbers of rows, each of runs in order and none empty."""
    packs: list[list[Run]] = [[] for _ in range(n)]
    total, before = sum(len(run.ids) for run in runs), 0
    for run in runs:
        middle = before + len(run.ids) / 2
        packs[int(middle * n / total)].append(run)
        before += len(run.ids)
    return [pack for pack in packs if pack]


class Cache:
    """Ids, keys and values of the rows seen so far; one buffer per layer, shape (2, kv heads, capacity, head_dim)."""

    def __init__(self, config: LlamaConfig) -> None:
        self.ids: list[int] = []
        self._buffers = [
            np.zeros((2, config.n_kv_heads, 0, config.head_dim), np.float32) for _ in range(config.n_layers)
        ]

    def reserve(self, rows: int) -> None:
        """Make room for that many rows, and more than before by half, so that growing row by row copies little."""
        for index, buffer in enumerate(self._buffers):
            if buffer.shape[2] < rows:
                # Zeros, not empty: a row that is masked out is multiplied by 0, and 0 times a stray NaN is NaN.
                capacity = max(rows, buffer.shape[2] * 3 // 2)
                grown = np.zeros((*buffer.shape[:2], capacity, buffer.shape[3]), np.float32)
                grown[:, :, : buffer.shape[2]] = buffer
                self._buffers[index] = grown

    def store(self, layer: int, start: int, keys: FloatArray, values: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Put the rows of one layer, shape (kv heads, n, head_dim), at ``start``; returns all rows up to their end."""
        buffer, end = self._buffers[layer], start + keys.shape[1]
        buffer[0, :, start:end] = keys
        buffer[1, :, start:end] = values
        return buffer[0, :, :end], buffer[1, :, :end]
