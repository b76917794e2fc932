"""Arrays of T rows, one a position, and K columns, its list entries and padding; held column by column.

What comes out of a row is the same to the last bit whatever stands in the other rows and however wide the padding is.
The sums of numpy are not: the order in which it adds depends on the shape. Here columns are added one after the other,
to which a column of zeros adds nothing.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]


def row_sums(values: FloatArray) -> FloatArray:
    """The sum of each row; shape (T, K) to (T,)."""
    total = np.zeros(len(values))
    for column in values.T:
        total += column
    return total


def row_counts(flags: BoolArray) -> IntArray:
    """How many of each row; shape (T, K) to (T,)."""
    total = np.zeros(len(flags), dtype=np.int64)
    for column in flags.T:
        total += column
    return total


def n_responses(response: IntArray) -> int:
    """How many responses rows are of, counted to that of the last one; their numbers never fall."""
    return int(response[-1]) + 1 if len(response) else 0


class Entries(NamedTuple):
    """Some of the entries of T rows, column by column and by row in each.

    ``at``, shape (N,), is where each stands in an array held so: column · T + row. ``row`` is its row, shape (N,).
    """

    at: IntArray
    row: IntArray
    n_rows: int

    @classmethod
    def of(cls, flags: BoolArray) -> Entries:
        """Where they are true; shape (T, K)."""
        n_rows, n_columns = flags.shape
        at = np.flatnonzero(flags.T)
        return cls(at, np.tile(np.arange(n_rows, dtype=np.int64), n_columns).take(at), n_rows)

    def of_array(self, values: FloatArray) -> FloatArray:
        """Their values in an array of shape (T, K)."""
        return values.T.ravel().take(self.at)

    def sums(self, values: FloatArray | BoolArray) -> FloatArray:
        """The sum over each row; shape (N,) to (T,)."""
        return np.bincount(self.row, values, self.n_rows).astype(np.float64, copy=False)  # integers of no entry

    def counts(self) -> IntArray:
        """How many each row has, shape (T,)."""
        return np.bincount(self.row, minlength=self.n_rows)

    def within(self, rows: BoolArray) -> Entries:
        """Those of some rows, shape (T,), as they stand in an array of these rows alone."""
        keep = rows[self.row]
        row = (np.cumsum(rows) - 1)[self.row[keep]]
        n_rows = int(np.count_nonzero(rows))
        return Entries(self.at[keep] // self.n_rows * n_rows + row, row, n_rows)
