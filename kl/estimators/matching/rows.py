"""One position by all the rules: repeated keys, keys of several tokens, ids that texts contradict, ends of turns."""

from __future__ import annotations

import math
from collections import Counter
from typing import NamedTuple

from kl.estimators.token_bytes import Candidates
from kl.estimators.token_keys import (
    END_KEY,
    Key,
    KeyFunction,
    end_roles,
    is_known,
    known_ends,
    logprob_of,
    role_key,
)
from kl.pieces import is_special, is_whole
from kl.records import Candidate


class KeyedList(NamedTuple):
    """One list of one position: keys and log-probabilities, still with repeated keys and keys of several tokens.

    The first ``n_best`` entries are the k best, the others what the side was asked for beside them.
    """

    keys: list[Key | None]
    logs: list[float]
    candidates: Candidates
    n_best: int


class Split(NamedTuple):
    """One list of one position: tokens with a key of their own, the values and the mass of the others.

    The last ``n_wanted`` keys are not of the k best; open entries that are not have a mass only.
    """

    keys: list[Key]
    logs: list[float]
    open_logs: list[float]
    open_mass: float
    n_listed: int
    n_repeats: int
    n_wanted: int
    wanted_mass: float

    @property
    def top_open(self) -> bool:
        """Whether an open entry is as probable as any with a key."""
        return bool(self.open_logs) and max(self.open_logs) >= max(self.logs, default=-math.inf)


class MatchedRow(NamedTuple):
    """One matched position; ``sampled`` is its value under P and Q, and whether it has a key of its own."""

    p: Split
    q: Split
    sampled: tuple[float, float, bool]


def keyed(candidates: Candidates, key_of: KeyFunction, n_best: int | None = None) -> KeyedList:
    """A list with the keys of its entries."""
    n = len(candidates) if n_best is None else n_best
    return KeyedList([key_of(c) for c in candidates], [logprob_of(c) for c in candidates], candidates, n)


class Sample(NamedTuple):
    """The sampled token as a side reports it, how the side's keys are found, and what is known of its own."""

    candidate: Candidate | None
    key_of: KeyFunction
    key: Key | None = None
    roles: frozenset[Key] = frozenset()


def with_one_stop(
    side_p: KeyedList, side_q: KeyedList, samples: tuple[Sample, Sample]
) -> tuple[KeyedList, KeyedList, tuple[Sample, Sample]]:
    """The same with one key for what ends the turn, where P's name for it is not listed by Q.

    Only for a name that is no text, as a response may also end at a text that it was to stop at, and only if Q lists
    one token that is known to end turns, which P does not list. What Q was asked for says nothing of how it ends turns:
    its vocabulary may well contain P's name.
    """
    sampled = samples[0].candidate
    listed_q = side_q.keys[: side_q.n_best]
    ends = known_ends(listed_q).difference(side_p.keys)
    if sampled is None or not is_special(sampled.token) or len(ends) != 1:
        return side_p, side_q, samples
    at = [
        place
        for place, candidate in enumerate(side_p.candidates)
        if candidate == sampled or (is_whole(sampled.token) and candidate.token == sampled.token)
    ]
    own = None if len(at) != 1 else side_p.keys[at[0]]
    if len(at) != 1 or (own is not None and own in listed_q):
        return side_p, side_q, samples
    if own is not None:
        side_q = _without_wanted(side_q, frozenset([own]))
    keys_p = [END_KEY if place == at[0] else key for place, key in enumerate(side_p.keys)]
    keys_q = [role_key(key, ends) for key in side_q.keys]
    by_role = samples[0]._replace(key=END_KEY), samples[1]._replace(roles=ends)
    return side_p._replace(keys=keys_p), side_q._replace(keys=keys_q), by_role


def match_row(
    side_p: KeyedList,
    side_q: KeyedList,
    sample_p: Sample,
    sample_q: Sample,
    unclear: frozenset[Key | None],
    *,
    by_role: bool,
) -> MatchedRow:
    """One position. Entries with an ``unclear`` key are open; end tokens may be matched ``by_role``."""
    side_p, side_q, ends = _with_roles(side_p, side_q, by_role=by_role)
    several = unclear | _several(side_p) | _several(side_q)
    split_p, split_q = _split(side_p, several), _split(side_q, several)
    wanted = role_key(_sampled_key(sample_p, side_p), ends)
    clear = wanted is not None and wanted not in several
    own = None if sample_q.candidate is None else role_key(sample_q.key_of(sample_q.candidate), ends | sample_q.roles)
    logp = _lookup(sample_p.candidate, wanted, clear, split_p)
    logq = _lookup(sample_q.candidate if own is not None and own == wanted else None, wanted, clear, split_q)
    return MatchedRow(split_p, split_q, (logp, logq, clear))


def clear_sides(
    side_p: KeyedList, side_q: KeyedList, unclear: frozenset[Key | None], *, by_role: bool
) -> tuple[KeyedList, KeyedList]:
    """Both lists as `match_row` takes them, with the key None for each open entry."""
    side_p, side_q, _ = _with_roles(side_p, side_q, by_role=by_role)
    several = unclear | _several(side_p) | _several(side_q)
    clear_p, clear_q = (
        side._replace(keys=[None if key in several else key for key in side.keys]) for side in (side_p, side_q)
    )
    return clear_p, clear_q


def _with_roles(side_p: KeyedList, side_q: KeyedList, *, by_role: bool) -> tuple[KeyedList, KeyedList, frozenset[Key]]:
    """The same with one key for the end tokens, if they are matched by their role, and which these are."""
    ends = end_roles(side_p.keys, side_q.keys[: side_q.n_best]) if by_role else frozenset[Key]()
    if ends:
        side_q = _without_wanted(side_q, ends)
        side_p, side_q = (side._replace(keys=[role_key(key, ends) for key in side.keys]) for side in (side_p, side_q))
    return side_p, side_q, ends


def _without_wanted(side: KeyedList, keys: frozenset[Key]) -> KeyedList:
    """The same without what was asked for under some keys: a token that another one stands for by its role."""
    kept = [place for place, key in enumerate(side.keys) if place < side.n_best or key not in keys]
    return side._replace(
        keys=[side.keys[place] for place in kept],
        logs=[side.logs[place] for place in kept],
        candidates=tuple(side.candidates[place] for place in kept),
    )


def keys_of_several(side: KeyedList) -> set[Key | None]:
    """Keys that a list gives to entries which are different tokens for certain: whatever has them, has no key."""
    if len(set(side.keys)) == len(side.keys):
        return set()
    values: dict[Key | None, set[tuple[int | None, float]]] = {}
    for key, logprob, candidate in zip(side.keys, side.logs, side.candidates, strict=True):
        values.setdefault(key, set()).add((candidate.token_id, logprob))
    return {key for key, seen in values.items() if len(seen) > 1 and key is not None}


def namesakes(side: KeyedList, sample: Sample) -> frozenset[Key | None]:
    """The sampled token's key, if a listed token of another id has it too: then it stands for two tokens."""
    own = _sampled_key(sample, side)
    if sample.candidate is None or sample.candidate.token_id is None or own is None:
        return frozenset()
    others = (None, sample.candidate.token_id)
    is_shared = any(
        key == own and candidate.token_id not in others
        for key, candidate in zip(side.keys, side.candidates, strict=True)
    )
    return frozenset[Key | None]([own]) if is_shared else frozenset()


def _several(side: KeyedList) -> set[Key | None]:
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


def _split(side: KeyedList, several: frozenset[Key | None]) -> Split:
    if not several and len(set(side.keys)) == len(side.keys):
        wanted = side.logs[side.n_best :]
        keys = [key for key in side.keys if key is not None]
        return Split(keys, side.logs, [], 0.0, len(keys), 0, len(wanted), math.fsum(map(math.exp, wanted)))
    clear: dict[Key, float] = {}
    other: dict[tuple[Key | None, str, int | None, float], float] = {}
    open_logs: list[float] = []
    n_best, best_mass = 0, 0.0
    for place, (key, logprob, candidate) in enumerate(zip(side.keys, side.logs, side.candidates, strict=True)):
        if key is None or key in several:
            # Listed twice to the last bit may be one token or two that tie: the mass counts once, the values twice.
            other[key, candidate.token, candidate.token_id, logprob] = math.exp(logprob)
            if place < side.n_best:
                open_logs.append(logprob)
        else:
            clear.setdefault(key, logprob)
        if place == side.n_best - 1:
            n_best, best_mass = len(clear), math.fsum(other.values())
    keyed = [key for key in side.keys if key is not None]
    logs, open_mass = list(clear.values()), math.fsum(other.values())
    return Split(
        list(clear),
        logs,
        open_logs,
        open_mass,
        len(clear) + len(other),
        len(keyed) - len(set(keyed)),
        len(clear) - n_best,
        math.fsum(map(math.exp, logs[n_best:])) + open_mass - best_mass,
    )


def _sampled_key(sample: Sample, side: KeyedList) -> Key | None:
    """The sampled token's key; where it has no id or bytes of its own, that of the one listed token of its text."""
    if sample.candidate is None or sample.key is not None:
        return sample.key
    key, token = sample.key_of(sample.candidate), sample.candidate.token
    if key is not None or not is_whole(token):
        return key
    same = [key for key, candidate in zip(side.keys, side.candidates, strict=True) if candidate.token == token]
    return same[0] if len(same) == 1 else None


def _lookup(sample: Candidate | None, wanted: Key | None, clear: bool, side: Split) -> float:
    """The log-probability of the sampled token on one side; NaN where unknown."""
    if clear and wanted in side.keys:
        return side.logs[side.keys.index(wanted)]
    own = None if sample is None else sample.logprob
    return own if is_known(own) else math.nan


def indices(keys_p: list[Key], keys_q: list[Key]) -> list[int]:
    """Where each key of P stands among those of Q, -1 for nowhere."""
    place = {key: column for column, key in enumerate(keys_q)}
    return [place.get(key, -1) for key in keys_p]
