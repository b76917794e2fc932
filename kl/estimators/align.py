"""Which listed token of P is which listed token of Q.

Two ragged candidate lists per position become padded arrays. An entry without a key, or with one that several tokens
share, is *open*: its probability is known, and that it is no token that its own side names otherwise. It may be one
that the other side names, one that the other side holds open too, or one that the other side does not list.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import chain
from typing import NamedTuple

import numpy as np

from kl.estimators.list_checks import Trusted, check_lengths, check_lists, rounding_step
from kl.estimators.rows import BoolArray, Entries, FloatArray, IntArray, row_counts, row_sums
from kl.estimators.token_bytes import Candidates, byte_functions
from kl.estimators.token_keys import (
    END_KEY,
    Key,
    KeyChoice,
    KeyFunction,
    choose_key,
    contradicted_ids,
    end_roles,
    id_key,
    is_known,
    known_ends,
    logprob_of,
    role_key,
)
from kl.pieces import is_special, is_whole
from kl.records import Candidate


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
        Listed log-probabilities of the open entries, each as often as it is listed; ``-inf`` is padding.
    log_cap_p, log_cap_q : float64, shape (T,)
        The smallest listed log-probability: no token that the side does not list has more. It may have as much, as
        equal values are ordinary, and which of two is listed says nothing.
    coverage_p, coverage_q : float64, shape (T,)
        All listed mass, open mass included, as the source gives it; may exceed 1 by its rounding.
    open_p, open_q : float64, shape (T,)
        Mass of the open entries; one that is listed twice without an id counts once.
    n_listed_p, n_listed_q : int64, shape (T,)
        Listed tokens, an entry that is there twice counted once.
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
    choice : KeyChoice
        What the tokens were matched by.
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
    top_open: BoolArray
    n_duplicate_keys: IntArray
    logp_sampled: FloatArray
    logq_sampled: FloatArray
    sampled_clear: BoolArray
    step_p: FloatArray
    step_q: FloatArray
    response: IntArray
    choice: KeyChoice
    keys_p: frozenset[Key]
    keys_q: frozenset[Key]

    def __post_init__(self) -> None:
        for name in ("logp", "logq", "index_q", "index_p", "log_open_p", "log_open_q"):
            object.__setattr__(self, name, np.asfortranarray(getattr(self, name)))

    def only(self, rows: Sequence[int] | IntArray | slice) -> Aligned:
        """Some of the positions, in their order."""
        arrays = {item.name: getattr(self, item.name) for item in fields(self)}
        return replace(self, **{name: value[rows] for name, value in arrays.items() if isinstance(value, np.ndarray)})

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


def _finite(logs: FloatArray) -> FloatArray:
    return np.maximum(logs, np.finfo(np.float64).min)


class _KeyedList(NamedTuple):
    """One list of one position: keys and log-probabilities, still with repeated keys and keys of several tokens."""

    keys: list[Key | None]
    logs: list[float]
    candidates: Candidates


class _Split(NamedTuple):
    """One list of one position: tokens with a key of their own, the values and the mass of the others."""

    keys: list[Key]
    logs: list[float]
    open_logs: list[float]
    open_mass: float
    n_listed: int
    n_repeats: int

    @property
    def top_open(self) -> bool:
        return bool(self.open_logs) and max(self.open_logs) >= max(self.logs, default=-math.inf)


class _Row(NamedTuple):
    """One matched position; ``sampled`` is its value under P and Q, and whether it has a key of its own."""

    p: _Split
    q: _Split
    sampled: tuple[float, float, bool]


def align(
    lists_p: Sequence[Candidates],
    lists_q: Sequence[Candidates],
    sampled_p: Sequence[Candidate | None] | None = None,
    sampled_q: Sequence[Candidate | None] | None = None,
    stops: Sequence[bool] | None = None,
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
    stops : sequence of T bool, optional
        Whether the token that P sampled ends the turn: it is then that of Q which is known to, whatever it is called.

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
    bytes_p, bytes_q = byte_functions(lists_p, lists_q)
    choice = choose_key(lists_p, lists_q, bytes_p, bytes_q)
    key_p, key_q = (id_key, id_key) if choice.key == "id" else (bytes_p, bytes_q)
    sides_p, sides_q = [_keyed(cands, key_p) for cands in lists_p], [_keyed(cands, key_q) for cands in lists_q]
    ambiguous = frozenset[Key | None]().union(*map(_of_several, sides_p), *map(_of_several, sides_q))
    nobody = [None] * len(lists_p)
    rows: list[_Row] = []
    for side_p, side_q, sample_p, sample_q, is_stop in zip(
        sides_p, sides_q, sampled_p or nobody, sampled_q or nobody, stops or [False] * len(lists_p), strict=True
    ):
        unclear = ambiguous
        if choice.key == "id":
            unclear |= contradicted_ids(side_p.candidates, side_q.candidates, bytes_p, bytes_q)
        samples = _Sample(sample_p, key_p), _Sample(sample_q, key_q)
        if is_stop and choice.key != "id":
            side_p, side_q, samples = _with_one_stop(side_p, side_q, samples)
        rows.append(_match(side_p, side_q, *samples, unclear, by_role=choice.key == "text"))
    caps_p = np.array([logprob_of(cands[-1]) for cands in lists_p], dtype=np.float64)
    caps_q = np.array([logprob_of(cands[-1]) for cands in lists_q], dtype=np.float64)
    return _stack(rows, caps_p, caps_q, rounding_step(lists_p), rounding_step(lists_q), choice)


def with_hidden(aligned: Aligned, lists_p: Sequence[Trusted], lists_q: Sequence[Trusted]) -> Aligned:
    """The same with what one token outside each list may have, where its smallest value is no limit."""
    caps_p, caps_q = (
        np.array([math.log(item.largest_hidden) if item.largest_hidden else -math.inf for item in lists])
        for lists in (lists_p, lists_q)
    )
    return replace(
        aligned,
        log_cap_p=np.maximum(aligned.log_cap_p, caps_p),
        log_cap_q=np.maximum(aligned.log_cap_q, caps_q),
    )


def _keyed(candidates: Candidates, key_of: KeyFunction) -> _KeyedList:
    return _KeyedList([key_of(c) for c in candidates], [logprob_of(c) for c in candidates], candidates)


class _Sample(NamedTuple):
    """The sampled token as a side reports it, how the side's keys are found, and what is known of its own."""

    candidate: Candidate | None
    key_of: KeyFunction
    key: Key | None = None
    roles: frozenset[Key] = frozenset()


def _with_one_stop(
    side_p: _KeyedList, side_q: _KeyedList, samples: tuple[_Sample, _Sample]
) -> tuple[_KeyedList, _KeyedList, tuple[_Sample, _Sample]]:
    """The same with one key for what ends the turn, where P's name for it is not listed by Q.

    Only for a name that is no text, as a response may also end at a text that it was to stop at, and only if Q lists
    one token that is known to end turns, which P does not list.
    """
    sampled = samples[0].candidate
    ends = known_ends(side_q.keys).difference(side_p.keys)
    if sampled is None or not is_special(sampled.token) or len(ends) != 1:
        return side_p, side_q, samples
    at = [
        place
        for place, candidate in enumerate(side_p.candidates)
        if candidate == sampled or (is_whole(sampled.token) and candidate.token == sampled.token)
    ]
    if len(at) != 1 or (side_p.keys[at[0]] is not None and side_p.keys[at[0]] in side_q.keys):
        return side_p, side_q, samples
    keys_p = [END_KEY if place == at[0] else key for place, key in enumerate(side_p.keys)]
    keys_q = [role_key(key, ends) for key in side_q.keys]
    by_role = samples[0]._replace(key=END_KEY), samples[1]._replace(roles=ends)
    return side_p._replace(keys=keys_p), side_q._replace(keys=keys_q), by_role


def _match(
    side_p: _KeyedList,
    side_q: _KeyedList,
    sample_p: _Sample,
    sample_q: _Sample,
    unclear: frozenset[Key | None],
    *,
    by_role: bool,
) -> _Row:
    """One position. Entries with an ``unclear`` key are open; end tokens may be matched ``by_role``."""
    ends = end_roles(side_p.keys, side_q.keys) if by_role else frozenset[Key]()
    if ends:
        side_p, side_q = (side._replace(keys=[role_key(key, ends) for key in side.keys]) for side in (side_p, side_q))
    several = unclear | _several(side_p) | _several(side_q)
    split_p, split_q = _split(side_p, several), _split(side_q, several)
    wanted = role_key(_sampled_key(sample_p, side_p), ends)
    clear = wanted is not None and wanted not in several
    own = None if sample_q.candidate is None else role_key(sample_q.key_of(sample_q.candidate), ends | sample_q.roles)
    logp = _lookup(sample_p.candidate, wanted, clear, split_p)
    logq = _lookup(sample_q.candidate if own is not None and own == wanted else None, wanted, clear, split_q)
    return _Row(split_p, split_q, (logp, logq, clear))


def _of_several(side: _KeyedList) -> set[Key | None]:
    """Keys that a list gives to entries which are different tokens for certain: whatever has them, has no key."""
    if len(set(side.keys)) == len(side.keys):
        return set()
    values: dict[Key | None, set[tuple[int | None, float]]] = {}
    for key, logprob, candidate in zip(side.keys, side.logs, side.candidates, strict=True):
        values.setdefault(key, set()).add((candidate.token_id, logprob))
    return {key for key, seen in values.items() if len(seen) > 1 and key is not None}


def _several(side: _KeyedList) -> set[Key | None]:
    """Keys of one list that may stand for more than one token; ``None`` is the key of all unidentified ones."""
    if len(set(side.keys)) == len(side.keys):
        return {None} if None in side.keys else set()
    # One id listed twice with one value is one token that the source repeats; anything else may be two tokens.
    entries = {
        (key, candidate.token_id, logprob if candidate.token_id is not None else place)
        for place, (key, logprob, candidate) in enumerate(zip(side.keys, side.logs, side.candidates, strict=True))
    }
    counts = Counter(key for key, _, _ in entries)
    return {key for key, count in counts.items() if count > 1 or key is None}


def _split(side: _KeyedList, several: frozenset[Key | None]) -> _Split:
    if not several and len(set(side.keys)) == len(side.keys):
        return _Split([key for key in side.keys if key is not None], side.logs, [], 0.0, len(side.keys), 0)
    clear: dict[Key, float] = {}
    other: dict[tuple[Key | None, str, int | None, float], float] = {}
    open_logs: list[float] = []
    for key, logprob, candidate in zip(side.keys, side.logs, side.candidates, strict=True):
        if key is None or key in several:
            # Listed twice to the last bit may be one token or two that tie: the mass counts once, the values twice.
            other[key, candidate.token, candidate.token_id, logprob] = math.exp(logprob)
            open_logs.append(logprob)
        else:
            clear.setdefault(key, logprob)
    keyed = [key for key in side.keys if key is not None]
    n_listed = len(clear) + len(other)
    return _Split(
        list(clear),
        list(clear.values()),
        open_logs,
        math.fsum(other.values()),
        n_listed,
        len(keyed) - len(set(keyed)),
    )


def _sampled_key(sample: _Sample, side: _KeyedList) -> Key | None:
    """The sampled token's key; where it has no id or bytes of its own, that of the one listed token of its text."""
    if sample.candidate is None or sample.key is not None:
        return sample.key
    key, token = sample.key_of(sample.candidate), sample.candidate.token
    if key is not None or not is_whole(token):
        return key
    same = [key for key, candidate in zip(side.keys, side.candidates, strict=True) if candidate.token == token]
    return same[0] if len(same) == 1 else None


def _lookup(sample: Candidate | None, wanted: Key | None, clear: bool, side: _Split) -> float:
    """The log-probability of the sampled token on one side; NaN where unknown."""
    if clear and wanted in side.keys:
        return side.logs[side.keys.index(wanted)]
    own = None if sample is None else sample.logprob
    return own if is_known(own) else math.nan


def _stack(
    rows: list[_Row], caps_p: FloatArray, caps_q: FloatArray, step_p: float, step_q: float, choice: KeyChoice
) -> Aligned:
    logp, logq = _pad([row.p.logs for row in rows], -np.inf), _pad([row.q.logs for row in rows], -np.inf)
    index_q = _pad([_indices(row.p.keys, row.q.keys) for row in rows], -1.0).astype(np.int64)
    index_p = np.full(logq.shape, -1, dtype=np.int64)
    at, column = np.nonzero(index_q >= 0)
    index_p[at, index_q[at, column]] = column
    open_p = np.array([row.p.open_mass for row in rows], dtype=np.float64)
    open_q = np.array([row.q.open_mass for row in rows], dtype=np.float64)
    return Aligned(
        logp=logp,
        logq=logq,
        index_q=index_q,
        index_p=index_p,
        log_open_p=_pad([row.p.open_logs for row in rows], -np.inf),
        log_open_q=_pad([row.q.open_logs for row in rows], -np.inf),
        log_cap_p=caps_p,
        log_cap_q=caps_q,
        coverage_p=row_sums(np.exp(logp)) + open_p,
        coverage_q=row_sums(np.exp(logq)) + open_q,
        open_p=open_p,
        open_q=open_q,
        n_listed_p=np.array([row.p.n_listed for row in rows], dtype=np.int64),
        n_listed_q=np.array([row.q.n_listed for row in rows], dtype=np.int64),
        top_open=np.array([row.p.top_open or row.q.top_open for row in rows], dtype=np.bool_),
        n_duplicate_keys=np.array([row.p.n_repeats + row.q.n_repeats for row in rows], dtype=np.int64),
        logp_sampled=np.array([row.sampled[0] for row in rows], dtype=np.float64),
        logq_sampled=np.array([row.sampled[1] for row in rows], dtype=np.float64),
        sampled_clear=np.array([row.sampled[2] for row in rows], dtype=np.bool_),
        step_p=np.full(len(rows), step_p),
        step_q=np.full(len(rows), step_q),
        response=np.zeros(len(rows), dtype=np.int64),
        choice=choice,
        keys_p=frozenset(chain.from_iterable(row.p.keys for row in rows)),
        keys_q=frozenset(chain.from_iterable(row.q.keys for row in rows)),
    )


def _indices(keys_p: list[Key], keys_q: list[Key]) -> list[int]:
    place = {key: column for column, key in enumerate(keys_q)}
    return [place.get(key, -1) for key in keys_p]


def _pad(rows: Sequence[Sequence[float]], fill: float) -> FloatArray:
    lengths = np.array([len(row) for row in rows], dtype=np.int64)
    width = int(lengths.max(initial=1))  # a column even where no token has a key, so that rows can be indexed
    padded = np.full((len(rows), width), fill, dtype=np.float64)
    padded[np.arange(width) < lengths[:, None]] = np.fromiter(chain.from_iterable(rows), dtype=np.float64)
    return padded
