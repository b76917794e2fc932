"""Where the keys of one padded table of numbers stand in the same row of another."""

from __future__ import annotations

import numpy as np

from kl.columns import BoolArray, IntArray
from kl.estimators.matching.codes import Codes

_MOST_COMPARED = 64 * 64  # of a row; above, sorting is quicker than comparing all with all


def places_in(keys: Codes, others: Codes) -> IntArray:
    """The column of each key in its row of ``others``, -1 where it is not there.

    Parameters
    ----------
    keys, others : int32, shapes (T, K) and (T, M)
        No row of ``others`` has a key twice; numbers below 0 that are not in both are padding.

    Returns
    -------
    int64, shape (T, K)
    """
    if keys.shape[1] * others.shape[1] > _MOST_COMPARED:
        return _by_sorting(keys, others)
    places = np.full(keys.shape, -1, dtype=np.int8 if others.shape[1] < 128 else np.int16)
    for column in range(others.shape[1]):
        np.copyto(places, column, where=keys == others[:, column : column + 1])
    return places.astype(np.int64)


def _by_sorting(keys: Codes, others: Codes) -> IntArray:
    row = np.arange(len(keys), dtype=np.int64)[:, None] << 32
    flat = (row + others).ravel()
    order = np.argsort(flat, kind="stable")
    wanted = row + keys
    at = np.minimum(np.searchsorted(flat[order], wanted), max(flat.size - 1, 0))
    return np.where(flat[order[at]] == wanted, order[at] % others.shape[1], -1)


def repeats(keys: Codes) -> BoolArray:
    """Whether a row has a key of at least 0 twice, shape (T,)."""
    rising = np.sort(keys, axis=1)
    return ((rising[:, 1:] == rising[:, :-1]) & (rising[:, 1:] >= 0)).any(axis=1)


def distinct(numbers: Codes) -> Codes:
    """Each number once, rising; quicker than `numpy.unique`, which makes a table of them."""
    rising = np.sort(numbers, axis=None)
    return rising[np.flatnonzero(np.diff(rising, prepend=rising[:1] - 1))] if rising.size else rising
