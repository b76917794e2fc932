"""One side of many positions as rectangles: keys and logarithms of its lists."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kl.columns import BoolArray, FloatArray, IntArray, TopLists
from kl.estimators.matching.codes import NO_KEY, Codes


@dataclass(frozen=True, slots=True)
class Padded:
    """One side of T rows: keys and logarithms of the tokens that have a key, shape (T, K), and of the open ones.

    ``all_keys``, shape (T, L), are those of all entries. ``open_ties``, shape (T,): two open entries have one value.
    ``n_wanted``, shape (T,): how many of the last tokens with a key are not of the k best. Those without a key that are
    not are left out: ``open_wanted``, shape (T,), is their mass.
    """

    keys: Codes
    logs: FloatArray
    open_logs: FloatArray
    all_keys: Codes
    open_ties: BoolArray
    n_wanted: IntArray
    open_wanted: FloatArray

    @classmethod
    def of(cls, lists: TopLists, keys: Codes, n_best: IntArray | None = None) -> Padded:
        """Of lists with the keys of their entries; ``n_best``, shape (T,), of each are its k best, default all."""
        all_keys = lists.padded(keys, NO_KEY)
        logs = lists.entries.logprobs
        is_open = keys < 0
        n_wanted = lists.lengths - (lists.lengths if n_best is None else n_best)
        if not is_open.any():
            nothing, none = np.full((len(lists), 1), -np.inf), np.zeros(len(lists), dtype=np.bool_)
            return cls(all_keys, lists.padded(logs, -np.inf), nothing, all_keys, none, n_wanted, np.zeros(len(lists)))
        open_wanted = np.zeros(len(lists))
        named, is_kept_open = lists.kept(~is_open), is_open
        if n_wanted.any():
            rows = lists.rows
            is_wanted = np.arange(len(rows)) >= (lists.offsets[1:] - n_wanted)[rows]
            left_out = is_wanted & is_open
            n_wanted = n_wanted - np.bincount(rows[left_out], minlength=len(lists))
            open_wanted = np.bincount(rows[left_out], np.exp(logs[left_out]), len(lists)).astype(np.float64)
            is_kept_open = is_open & ~is_wanted
        others = lists.kept(is_kept_open)
        open_logs = others.padded(logs[is_kept_open], -np.inf)
        ties = (open_logs[:, 1:] == open_logs[:, :-1]) & np.isfinite(open_logs[:, 1:])  # they fall
        return cls(
            named.padded(keys[~is_open], NO_KEY),
            named.padded(logs[~is_open], -np.inf),
            open_logs,
            all_keys,
            ties.any(axis=1),
            n_wanted,
            open_wanted,
        )

    def best_keys(self) -> Codes:
        """The keys of the k best, shape (T, K)."""
        if not self.n_wanted.any():
            return self.keys
        n_best = np.count_nonzero(self.keys >= 0, axis=1) - self.n_wanted
        columns = np.arange(self.keys.shape[1], dtype=np.int64)
        return np.where(columns < n_best[:, None], self.keys, NO_KEY).astype(np.int32)

    @property
    def top_open(self) -> BoolArray:
        """Whether an open entry is as probable as any with a key; shape (T,)."""
        largest = self.open_logs[:, 0]
        return np.isfinite(largest) & (largest >= self.logs[:, 0])

    def value_of(self, keys: Codes, otherwise: FloatArray) -> FloatArray:
        """The value of one key a row, shape (T,)."""
        same = (self.keys == keys[:, None]) & (keys >= 0)[:, None]
        at = same.argmax(axis=1)
        return np.where(same.any(axis=1), self.logs[np.arange(len(at)), at], otherwise)
