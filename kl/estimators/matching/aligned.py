"""Two matched top-k lists at every position: what all estimators start from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kl.estimators.rows import BoolArray, Entries, FloatArray, IntArray, row_counts
from kl.estimators.token_keys import Key, KeyChoice


@dataclass(frozen=True)
class Aligned:
    """T positions of two matched top-k lists; natural logarithms. Arrays of two axes are held column by column.

    Attributes
    ----------
    logp, logq : float64, shapes (T, K_p) and (T, K_q)
        Listed log-probabilities of the tokens that have a key of their own, by falling value; ``-inf`` is padding.
    index_q : int64, shape (T, K_p)
        Where P's token stands in Q's row, -1 where Q does not list it. ``index_p``, shape (T, K_q), is the inverse.
    log_open_p, log_open_q : float64, shapes (T, M_p) and (T, M_q)
        Log-probabilities of the open entries of the k best, each as often as it is listed; ``-inf`` is padding.
    log_cap_p, log_cap_q : float64, shape (T,)
        The smallest log-probability of the k best: no token that the side does not list has more. It may have as much,
        as equal values are ordinary, and which of two is listed says nothing.
    coverage_p, coverage_q : float64, shape (T,)
        All listed mass, open mass included, as the source gives it; may exceed 1 by its rounding.
    open_p, open_q : float64, shape (T,)
        Mass of the open entries; one that is listed twice without an id counts once.
    n_listed_p, n_listed_q : int64, shape (T,)
        Listed tokens, an entry that is there twice counted once.
    n_wanted_q : int64, shape (T,)
        How many of Q's tokens with a key, the last ones of their row, are not of the k best: Q was asked for them. They
        count as listed in all but the cap.
    wanted_mass_q : float64, shape (T,)
        Mass of what Q was asked for, that of open entries included; part of ``coverage_q``.
    top_open : bool, shape (T,)
        Whether an open entry of a side is as probable as its most probable token with a key.
    n_duplicate_keys : int64, shape (T,)
        Entries of both lists that repeat a key of their list.
    logp_sampled, logq_sampled : float64, shape (T,)
        Of the sampled token; NaN where not reported.
    sampled_clear : bool, shape (T,)
        Whether the sampled token has a key of its own: where Q does not list it, Q gives it at most ``log_limit_q``.
    step_p, step_q : float64, shape (T,)
        What the log-probabilities of a side are rounded to in the row's response; 0 where they are not.
    response : int64, shape (T,)
        The number of the response a row belongs to; never falls. Rows of one are measured in the light of each other.
    choices : tuple of KeyChoice
        What the tokens of each response were matched by.
    keys_p, keys_q : frozenset
        Every key that a side lists.
    """

    logp: FloatArray
    logq: FloatArray
    index_q: IntArray
    index_p: IntArray
    log_open_p: FloatArray
    log_open_q: FloatArray
    log_cap_p: FloatArray
    log_cap_q: FloatArray
    coverage_p: FloatArray
    coverage_q: FloatArray
    open_p: FloatArray
    open_q: FloatArray
    n_listed_p: IntArray
    n_listed_q: IntArray
    n_wanted_q: IntArray
    wanted_mass_q: FloatArray
    top_open: BoolArray
    n_duplicate_keys: IntArray
    logp_sampled: FloatArray
    logq_sampled: FloatArray
    sampled_clear: BoolArray
    step_p: FloatArray
    step_q: FloatArray
    response: IntArray
    choices: tuple[KeyChoice, ...]
    keys_p: frozenset[Key]
    keys_q: frozenset[Key]

    def __post_init__(self) -> None:
        for name in ("logp", "logq", "index_q", "index_p", "log_open_p", "log_open_q"):
            object.__setattr__(self, name, np.asfortranarray(getattr(self, name)))

    def only(self, rows: Sequence[int] | IntArray | slice) -> Aligned:
        """Some of the positions, in their order."""
        return replace(self, **{name: _rows(value, rows) for name, value in self._arrays().items()})

    def replaced(self, rows: IntArray, others: Aligned) -> Aligned:
        """The same with other positions, of the same responses, in the place of some; keys are those of both."""
        mine, theirs = self._arrays(), others._arrays()
        changed: dict[str, Any] = {}
        for name, values in mine.items():
            fill = -1 if name.startswith("index") else -np.inf
            width = max(values.shape[1:] + theirs[name].shape[1:], default=0)
            changed[name] = widened(values, width, fill) if width else values.copy()
            changed[name][rows] = widened(theirs[name], width, fill) if width else theirs[name]
        again = set(others.response.tolist())
        return replace(
            self,
            **changed,
            choices=tuple(
                others.choices[number] if number in again else choice for number, choice in enumerate(self.choices)
            ),
            keys_p=self.keys_p | others.keys_p,
            keys_q=self.keys_q | others.keys_q,
        )

    def _arrays(self) -> dict[str, NDArray[Any]]:
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, np.ndarray)}

    @property
    def choice(self) -> KeyChoice:
        """What the tokens were matched by, if all are of one response."""
        (choice,) = self.choices
        return choice

    @property
    def log_limit_p(self) -> FloatArray:
        """No token that P does not name has more: P's cap, or its largest open entry. Shape (T,)."""
        return np.maximum(self.log_cap_p, self.log_open_p.max(axis=1))

    @property
    def log_limit_q(self) -> FloatArray:
        """No token that Q does not name has more: Q's cap, or its largest open entry. Shape (T,)."""
        return np.maximum(self.log_cap_q, self.log_open_q.max(axis=1))

    @property
    def log_top_p(self) -> FloatArray:
        """The largest listed value of P, with a key or open. Shape (T,)."""
        return np.maximum(self.logp.max(axis=1), self.log_open_p.max(axis=1))

    @property
    def log_top_q(self) -> FloatArray:
        """The largest listed value of Q, with a key or open. Shape (T,)."""
        return np.maximum(self.logq.max(axis=1), self.log_open_q.max(axis=1))

    @cached_property
    def shared(self) -> BoolArray:
        """Whether Q lists P's token, too; shape (T, K_p)."""
        return self.index_q >= 0

    @cached_property
    def overlap(self) -> IntArray:
        """Tokens that both sides list, shape (T,)."""
        return row_counts(self.shared)

    @cached_property
    def n_best_q(self) -> IntArray:
        """How many of Q's tokens with a key, the first ones of their row, are of its k best. Shape (T,)."""
        return row_counts(self.logq > -np.inf) - self.n_wanted_q

    @cached_property
    def best_q(self) -> BoolArray:
        """Which tokens of Q's row are of its k best; shape (T, K_q)."""
        named = self.logq > -np.inf
        if not self.n_wanted_q.any():
            return named
        columns = np.arange(named.shape[1], dtype=np.int64)
        return named & (columns < self.n_best_q[:, None])

    @cached_property
    def shared_best(self) -> BoolArray:
        """Whether P's token is one of Q's k best; shape (T, K_p)."""
        return self.shared & (self.index_q < self.n_best_q[:, None]) if self.n_wanted_q.any() else self.shared

    @cached_property
    def shared_logq(self) -> FloatArray:
        """Q's log-probability of each token of P's row, shape (T, K_p); 0 where Q does not list it."""
        n = len(self.logq)
        at = self.index_q * n + np.arange(n, dtype=np.int64)[:, None]
        return np.asfortranarray(_finite(self.logq).T.ravel().take(at.T, mode="clip").T * self.shared)

    @cached_property
    def log_ratio(self) -> FloatArray:
        """``log p/q`` of the tokens that both sides list, shape (T, K_p); 0 elsewhere."""
        return (_finite(self.logp) - self.shared_logq) * self.shared

    @cached_property
    def alone_p(self) -> Entries:
        """The tokens that P alone lists."""
        return Entries.of((self.logp > -np.inf) & ~self.shared)

    @cached_property
    def alone_q(self) -> Entries:
        """The tokens that Q alone lists."""
        return Entries.of((self.logq > -np.inf) & (self.index_p < 0))


def _rows(values: NDArray[Any], rows: Sequence[int] | IntArray | slice) -> NDArray[Any]:
    """Some rows of an array, taken of each column and held so."""
    return values.T[..., rows].T if isinstance(rows, slice) else values.T.take(rows, axis=-1).T


def _finite(logs: FloatArray) -> FloatArray:
    return np.maximum(logs, np.finfo(np.float64).min)


def widened(table: NDArray[Any], width: int, fill: float) -> NDArray[Any]:
    """A copy with further columns of padding."""
    wide = np.full((len(table), width), fill, dtype=table.dtype)
    wide[:, : table.shape[1]] = table
    return wide
