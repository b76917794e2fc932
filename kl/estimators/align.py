"""Which listed token of P is which listed token of Q.

Two ragged candidate lists per position become padded arrays. A key that several tokens share cannot be matched: its
mass is kept apart as *open* mass, of which only "at least this much, on tokens that the other side may or may not
list" is known.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kl.estimators.list_checks import check_lengths, check_lists
from kl.estimators.token_keys import (
    AlignKey,
    Candidates,
    Key,
    KeyChoice,
    KeyFunction,
    choose_key,
    end_roles,
    is_known,
    key_functions,
    logprob_of,
    role_key,
)
from kl.records import Candidate

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Aligned:
    """T positions of two matched top-k lists; natural logarithms.

    Attributes
    ----------
    logp, logq : float64, shapes (T, K_p) and (T, K_q)
        Listed log-probabilities of the tokens that have a key of their own, by falling value; ``-inf`` is padding.
    index_q : int64, shape (T, K_p)
        Where P's token stands in Q's row, -1 where Q does not list it. ``index_p``, shape (T, K_q), is the inverse.
    log_cap_p, log_cap_q : float64, shape (T,)
        The smallest listed log-probability: no token that the side does not list has more.
    coverage_p, coverage_q : float64, shape (T,)
        All listed mass, open mass included; may exceed 1 by the rounding of the source.
    open_p, open_q : float64, shape (T,)
        Listed mass on keys that more than one token has.
    n_listed_p, n_listed_q : int64, shape (T,)
        Listed tokens after merging.
    top_open : bool, shape (T,)
        Whether the most probable token of a side is among the open mass.
    n_duplicate_keys : int64, shape (T,)
        Entries of both lists that repeat a key of their list.
    logp_sampled, logq_sampled : float64, shape (T,)
        Of the sampled token; NaN where not reported.
    sampled_clear : bool, shape (T,)
        Whether the sampled token has a key of its own, so that its absence from Q's list means something.
    choice : KeyChoice
        What the tokens were matched by.
    keys_p, keys_q : frozenset
        Every key that a side lists.
    """

    logp: FloatArray
    logq: FloatArray
    index_q: IntArray
    index_p: IntArray
    log_cap_p: FloatArray
    log_cap_q: FloatArray
    coverage_p: FloatArray
    coverage_q: FloatArray
    open_p: FloatArray
    open_q: FloatArray
    n_listed_p: IntArray
    n_listed_q: IntArray
    top_open: BoolArray
    n_duplicate_keys: IntArray
    logp_sampled: FloatArray
    logq_sampled: FloatArray
    sampled_clear: BoolArray
    choice: KeyChoice
    keys_p: frozenset[Key]
    keys_q: frozenset[Key]

    @property
    def overlap(self) -> IntArray:
        """Tokens that both sides list, shape (T,)."""
        return np.count_nonzero(self.index_q >= 0, axis=1)

    @property
    def shared_logq(self) -> FloatArray:
        """Q's log-probability of each token of P's row, shape (T, K_p); ``-inf`` where Q does not list it."""
        found = np.take_along_axis(self.logq, np.maximum(self.index_q, 0), axis=1)
        return np.where(self.index_q >= 0, found, -np.inf)


class _KeyedList(NamedTuple):
    """One list of one position: keys and log-probabilities, still with repeated keys and keys of several tokens."""

    keys: list[Key | None]
    logs: list[float]
    candidates: tuple[Candidate, ...]


class _Row(NamedTuple):
    """One matched position."""

    keys_p: list[Key]
    keys_q: list[Key]
    logp: list[float]
    logq: list[float]
    open_p: float
    open_q: float
    n_open_p: int
    n_open_q: int
    top_open: bool
    n_duplicates: int
    sampled: tuple[float, float, bool]


def align(
    lists_p: Sequence[Candidates],
    lists_q: Sequence[Candidates],
    sampled_p: Sequence[Candidate | None] | None = None,
    sampled_q: Sequence[Candidate | None] | None = None,
) -> Aligned:
    """Match the lists of P and Q, position by position.

    Parameters
    ----------
    lists_p, lists_q : sequences of T candidate lists
        As `listed` returns them: the k best by falling log-probability, known values only, at least one entry each.
    sampled_p : sequence of T candidates, optional
        The token that P sampled; it need not be listed.
    sampled_q : sequence of T candidates, optional
        What Q reports beside its list. It is used where it is the token that P sampled, and only there.

    Raises
    ------
    CandidateListError
        If a list is empty, holds a value that is not known, does not fall, or has a mass above 1.
    ValueError
        If there are not T of each.
    """
    check_lengths(lists_p, lists_q, sampled_p, sampled_q)
    check_lists(lists_p, "P")
    check_lists(lists_q, "Q")
    choice = choose_key(lists_p, lists_q)
    key_p, key_q = key_functions(choice.key, lists_p, lists_q)
    nobody = [None] * len(lists_p)
    rows = [
        _match(cands_p, cands_q, key_p, key_q, choice.key, sample_p, sample_q)
        for cands_p, cands_q, sample_p, sample_q in zip(
            lists_p, lists_q, sampled_p or nobody, sampled_q or nobody, strict=True
        )
    ]
    caps_p = np.array([logprob_of(cands[-1]) for cands in lists_p], dtype=np.float64)
    caps_q = np.array([logprob_of(cands[-1]) for cands in lists_q], dtype=np.float64)
    return _stack(rows, caps_p, caps_q, choice)


def _match(
    cands_p: Candidates,
    cands_q: Candidates,
    key_p: KeyFunction,
    key_q: KeyFunction,
    kind: AlignKey,
    sample_p: Candidate | None,
    sample_q: Candidate | None,
) -> _Row:
    side_p = _KeyedList([key_p(c) for c in cands_p], [logprob_of(c) for c in cands_p], tuple(cands_p))
    side_q = _KeyedList([key_q(c) for c in cands_q], [logprob_of(c) for c in cands_q], tuple(cands_q))
    ends = end_roles(side_p.keys, side_q.keys) if kind == "text" else frozenset[Key]()
    if ends:
        side_p, side_q = (side._replace(keys=[role_key(key, ends) for key in side.keys]) for side in (side_p, side_q))
    several = _several(side_p) | _several(side_q)
    keys_p, logp, open_p, n_open_p, repeats_p = _split(side_p, several)
    keys_q, logq, open_q, n_open_q, repeats_q = _split(side_q, several)
    top_open = side_p.keys[0] in several or side_q.keys[0] in several
    wanted = None if sample_p is None else role_key(_sampled_key(sample_p, side_p, key_p), ends)
    own = None if sample_q is None else role_key(key_q(sample_q), ends)
    sample_q = sample_q if own is not None and own == wanted else None
    sampled = _sampled(sample_p, sample_q, wanted, several, keys_p, logp, keys_q, logq)
    n_duplicates = repeats_p + repeats_q
    return _Row(keys_p, keys_q, logp, logq, open_p, open_q, n_open_p, n_open_q, top_open, n_duplicates, sampled)


def _several(side: _KeyedList) -> set[Key | None]:
    """Keys of one list that stand for more than one token; ``None`` is the key of all unidentified ones."""
    if len(set(side.keys)) == len(side.keys):
        return {None} if None in side.keys else set()
    tokens: dict[Key | None, set[tuple[int | None, float]]] = {}
    counts: dict[Key | None, int] = {}
    for key, logprob, candidate in zip(side.keys, side.logs, side.candidates, strict=True):
        tokens.setdefault(key, set()).add((candidate.token_id, logprob))
        counts[key] = counts.get(key, 0) + 1
    # One id listed twice with one value is one token that the source repeats; anything else may be two tokens.
    repeats = {key for key, seen in tokens.items() if len(seen) == 1 and None not in {number for number, _ in seen}}
    return {key for key, count in counts.items() if (count > 1 and key not in repeats) or key is None}


def _split(side: _KeyedList, several: set[Key | None]) -> tuple[list[Key], list[float], float, int, int]:
    """Keys and log-probabilities of clear tokens; mass and number of the other keys; number of repeated entries."""
    if not several and len(set(side.keys)) == len(side.keys):
        return [key for key in side.keys if key is not None], side.logs, 0.0, 0, 0
    clear: dict[Key, float] = {}
    other: dict[tuple[Key | None, str, int | None, float], float] = {}
    for key, logprob, candidate in zip(side.keys, side.logs, side.candidates, strict=True):
        if key is None or key in several:
            # An entry repeated to the last bit is counted once: "at least" stays true whether it is one token or two.
            other[key, candidate.token, candidate.token_id, logprob] = math.exp(logprob)
        else:
            clear.setdefault(key, logprob)
    keyed = [key for key in side.keys if key is not None]
    n_open = len({entry[0] for entry in other})
    return list(clear), list(clear.values()), math.fsum(other.values()), n_open, len(keyed) - len(set(keyed))


def _sampled_key(sample: Candidate, side: _KeyedList, key_of: KeyFunction) -> Key | None:
    """The sampled token's key; where it has no id or bytes of its own, that of the one listed token of its text."""
    key = key_of(sample)
    if key is not None:
        return key
    same = [key for key, candidate in zip(side.keys, side.candidates, strict=True) if candidate.token == sample.token]
    return same[0] if len(same) == 1 else None


def _sampled(
    sample_p: Candidate | None,
    sample_q: Candidate | None,
    wanted: Key | None,
    several: set[Key | None],
    keys_p: list[Key],
    logp: list[float],
    keys_q: list[Key],
    logq: list[float],
) -> tuple[float, float, bool]:
    """Log-probability of the sampled token under P and Q (NaN where unknown), and whether its key is its own."""
    clear = wanted is not None and wanted not in several
    own_p = None if sample_p is None else sample_p.logprob
    own_q = None if sample_q is None else sample_q.logprob
    return _lookup(own_p, wanted, clear, keys_p, logp), _lookup(own_q, wanted, clear, keys_q, logq), clear


def _lookup(own: float | None, wanted: Key | None, clear: bool, keys: list[Key], logs: list[float]) -> float:
    if clear and wanted in keys:
        return logs[keys.index(wanted)]
    return own if is_known(own) else math.nan


def _stack(rows: list[_Row], caps_p: FloatArray, caps_q: FloatArray, choice: KeyChoice) -> Aligned:
    n_p = np.array([len(row.logp) for row in rows], dtype=np.int64)
    n_q = np.array([len(row.logq) for row in rows], dtype=np.int64)
    logp, logq = _pad([row.logp for row in rows], n_p, -np.inf), _pad([row.logq for row in rows], n_q, -np.inf)
    index_q = _pad([_indices(row.keys_p, row.keys_q) for row in rows], n_p, -1.0).astype(np.int64)
    index_p = np.full(logq.shape, -1, dtype=np.int64)
    at, column = np.nonzero(index_q >= 0)
    index_p[at, index_q[at, column]] = column
    open_p = np.array([row.open_p for row in rows], dtype=np.float64)
    open_q = np.array([row.open_q for row in rows], dtype=np.float64)
    return Aligned(
        logp=logp,
        logq=logq,
        index_q=index_q,
        index_p=index_p,
        log_cap_p=caps_p,
        log_cap_q=caps_q,
        coverage_p=np.exp(logp).sum(axis=1) + open_p,
        coverage_q=np.exp(logq).sum(axis=1) + open_q,
        open_p=open_p,
        open_q=open_q,
        n_listed_p=n_p + np.array([row.n_open_p for row in rows], dtype=np.int64),
        n_listed_q=n_q + np.array([row.n_open_q for row in rows], dtype=np.int64),
        top_open=np.array([row.top_open for row in rows], dtype=np.bool_),
        n_duplicate_keys=np.array([row.n_duplicates for row in rows], dtype=np.int64),
        logp_sampled=np.array([row.sampled[0] for row in rows], dtype=np.float64),
        logq_sampled=np.array([row.sampled[1] for row in rows], dtype=np.float64),
        sampled_clear=np.array([row.sampled[2] for row in rows], dtype=np.bool_),
        choice=choice,
        keys_p=frozenset(chain.from_iterable(row.keys_p for row in rows)),
        keys_q=frozenset(chain.from_iterable(row.keys_q for row in rows)),
    )


def _indices(keys_p: list[Key], keys_q: list[Key]) -> list[int]:
    place = {key: column for column, key in enumerate(keys_q)}
    return [place.get(key, -1) for key in keys_p]


def _pad(rows: Sequence[Sequence[float]], lengths: IntArray, fill: float) -> FloatArray:
    width = int(lengths.max(initial=1))  # a column even where no token has a key, so that rows can be indexed
    padded = np.full((len(rows), width), fill, dtype=np.float64)
    padded[np.arange(width) < lengths[:, None]] = np.fromiter(chain.from_iterable(rows), dtype=np.float64)
    return padded
