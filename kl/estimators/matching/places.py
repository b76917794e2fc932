"""Where the keys of one padded table of numbers stand in the same row of another."""

from __future__ import annotations

import numpy as np

from kl.columns import BoolArray, IntArray
from kl.estimators.matching.codes import Codes

LARGEST_OF_TABLE = 1 << 24  # numbers below are told apart by a table of all
_MOST_COMPARED = 64 * 64  # of a row; above, sorting is quicker than comparing all with all


def places_in(keys: Codes, others: Codes) -> IntArray:
    """The column of each key in its row of ``others``, -1 where it is not there.

    Parameters
    ----------
    keys, others : int32, shapes (T, K) and (T, M)
        Of a key that a row of ``others`` has twice it is any column; numbers below 0 that are not in both are padding.

    Returns
    -------
    int64, shape (T, K)
        Held column by column.
    """
    if keys.shape[1] * others.shape[1] > _MOST_COMPARED:
        return _by_sorting(keys, others)
    # Held column by column, a column is compared with all at once; arithmetic is quicker than setting what is equal.
    mine, theirs = np.ascontiguousarray(keys.T), np.ascontiguousarray(others.T)
    places = np.zeros(mine.shape, dtype=np.int8 if len(theirs) < 128 else np.int16)
    same = np.empty_like(places)
    for column, other in enumerate(theirs, start=1):
        np.equal(mine, other, out=same, casting="unsafe")
        same *= column
        np.maximum(places, same, out=places)
    return places.astype(np.int64).T - 1


def _by_sorting(keys: Codes, others: Codes) -> IntArray:
    row = np.arange(len(keys), dtype=np.int64)[:, None] << 32
    flat = (row + others).ravel()
    order = np.argsort(flat, kind="stable")
    wanted = row + keys
    at = np.minimum(np.searchsorted(flat[order], wanted), max(flat.size - 1, 0))
    return np.asfortranarray(np.where(flat[order[at]] == wanted, order[at] % others.shape[1], -1))


def inverse(places: IntArray, width: int) -> IntArray:
    """Where each column of a row is among the places of this row, -1 where it is not; shapes (T, K) to (T, width)."""
    flat, n = places.T.ravel(), len(places)
    at = np.flatnonzero(flat >= 0)
    column, row = np.divmod(at, n) if n else (at, at)
    found = np.full(width * n, -1, dtype=np.int64)
    found[flat[at] * n + row] = column
    return found.reshape(width, n).T


def repeats(keys: Codes) -> BoolArray:
    """Whether a row has a key of at least 0 twice, shape (T,)."""
    rising = np.sort(keys, axis=1)
    same = (rising[:, 1:] == rising[:, :-1]) & (rising[:, 1:] >= 0)
    return same.any(axis=1) if same.any() else np.zeros(len(keys), dtype=np.bool_)


def distinct(numbers: Codes) -> IntArray:
    """Each number of at least 0 once, rising."""
    if numbers.max(initial=-1) >= LARGEST_OF_TABLE:
        rising = np.sort(numbers, axis=None)
        return rising[(rising >= 0) & (np.diff(rising, prepend=-1) != 0)].astype(np.int64)
    is_there = np.zeros(int(numbers.max(initial=-1)) + 2, dtype=np.bool_)
    is_there[np.maximum(numbers, -1)] = True  # the last one is for all below 0
    return np.flatnonzero(is_there[:-1])
