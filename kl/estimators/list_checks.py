"""What a top-k list must be like, so that its smallest value bounds the tokens that it leaves out."""

from __future__ import annotations

import math
from collections.abc import Sequence, Sized
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kl.columns import TopLists
from kl.estimators.rows import n_responses
from kl.estimators.token_keys import Candidates, is_known, logprob_of
from kl.pieces import is_whole
from kl.records import LARGEST_MASS, UNKNOWN_LOGPROB, Candidate

_LARGEST_LOG = 700.0  # exp of more overflows float64
SUM_NOISE = 1e-9  # of a mass that is added in another order
_STEPS = (0.1, 0.01, 0.001, 0.0001)
_TELLING_VALUES = 20  # fewer may be multiples by hand
_FLOAT32 = 2e-7  # of a value that went through float32, and in nats of one near 0


class CandidateListError(ValueError):
    """A list that no bound can be taken from, with its position, its side and what to do."""

    def __init__(self, position: int, side: Literal["P", "Q"], problem: str) -> None:
        super().__init__(position, side, problem)
        self.position = position
        self.side = side
        self.problem = problem

    def __str__(self) -> str:
        return f"position {self.position}: the list of {self.side} {self.problem}"


def check_lengths(lists_p: Sequence[Candidates], lists_q: Sequence[Candidates], *sampled: Sized | None) -> None:
    """Refuse other than one list of each side, and one sampled token where these are given, per position."""
    if len(lists_p) != len(lists_q):
        raise ValueError(f"{len(lists_p)} lists of P but {len(lists_q)} of Q; give one of each per position.")
    for tokens in sampled:
        if tokens is not None and len(tokens) != len(lists_p):
            raise ValueError(f"{len(tokens)} sampled tokens for {len(lists_p)} lists; None stands for an unknown one.")


def check_lists(lists: Sequence[Candidates], side: Literal["P", "Q"]) -> None:
    """Refuse a list that is empty, holds an unknown value, does not fall, or adds up to more than `LARGEST_MASS`.

    Raises
    ------
    CandidateListError
        For the first of these.
    """
    for position in _suspicious(TopLists.of(lists)):
        problem = _problem(lists[position])
        if problem is not None:
            raise CandidateListError(position, side, problem)


def check_wanted(best: TopLists, wanted: TopLists) -> None:
    """Refuse values that Q was asked for where one is unknown, they do not fall, or more than all would be listed.

    Raises
    ------
    CandidateListError
        For the first of these.
    ValueError
        If there is not one list for each of Q's.
    """
    if len(wanted) != len(best):
        raise ValueError(f"{len(wanted)} lists of wanted tokens for {len(best)} lists of Q; give one for each.")
    for position in unusable(wanted).tolist():
        raise CandidateListError(position, "Q", "of wanted tokens has unknown values, or does not fall.")
    mass = masses(best) + masses(wanted)
    for position in np.flatnonzero((mass > LARGEST_MASS) & (wanted.lengths > 0)).tolist():
        whole = listed_mass((*best[position], *wanted[position]))
        if whole > LARGEST_MASS:
            problem = f"adds up to {whole:.4f} with what was asked for beside it; give each token once."
            raise CandidateListError(position, "Q", problem)


def _suspicious(lists: TopLists) -> list[int]:
    """The lists that `_problem` may say something of."""
    found = (lists.lengths == 0) | (masses(lists) > LARGEST_MASS - SUM_NOISE)
    found[unusable(lists)] = True
    return np.flatnonzero(found).tolist()


def unusable(lists: TopLists) -> NDArray[np.int64]:
    """The numbers of the lists with a value that is not known, or that do not fall."""
    logs, rows = lists.entries.logprobs, lists.rows
    wrong = ~(logs > UNKNOWN_LOGPROB)
    wrong[1:] |= (rows[1:] == rows[:-1]) & ~(logs[1:] <= logs[:-1])
    return np.unique(rows[wrong])


def masses(lists: TopLists) -> NDArray[np.float64]:
    """The listed probability of each list, shape (N,); an entry that is there twice counts twice."""
    probs = np.exp(np.minimum(lists.entries.logprobs, _LARGEST_LOG))
    return np.bincount(lists.rows, probs, len(lists)).astype(np.float64)


def _problem(candidates: Candidates) -> str | None:
    if not candidates:
        return "is empty; that is missing data: leave the position out."
    above = math.inf
    for rank, candidate in enumerate(candidates):
        logprob = candidate.logprob
        if not is_known(logprob):
            return f"has {logprob} at {candidate.token!r}, entry {rank}; keep what is known, as `listed` does."
        if logprob > above:
            return (
                f"does not fall: {above} stands before {logprob} at {candidate.token!r}, entry {rank}. "
                "Sort the k best; a sampled token that stands beside them is none of them."
            )
        above = logprob
    mass = listed_mass(candidates)
    if mass > LARGEST_MASS:
        return f"adds up to {mass:.4f}, not one distribution; give natural logarithms, each token once."
    return None


def listed_mass(candidates: Candidates) -> float:
    """Probability of all tokens of a list with known values; an entry that is there twice counts once."""
    return math.fsum(_exp(logprob_of(candidate)) for candidate in set(candidates))


def _exp(logprob: float) -> float:
    return math.exp(logprob) if logprob < _LARGEST_LOG else math.inf


def rounding_step(lists: Sequence[Candidates]) -> float:
    """The step of one to four decimals that all log-probabilities of a side are multiples of; 0 where there is none.

    The mass of such a list is known to half a step.
    """
    values = np.array([logprob_of(candidate) for candidates in lists for candidate in candidates], dtype=np.float64)
    return _step(values) if np.count_nonzero(values) >= _TELLING_VALUES else 0.0


def rounding_steps(lists: TopLists, response: NDArray[np.int64]) -> NDArray[np.float64]:
    """`rounding_step` of each of R responses, shape (R,), from the number of the response of each list."""
    steps = np.zeros(n_responses(response))
    of = np.flatnonzero(np.diff(response, prepend=-1))  # the first list of each response that has one
    edges = np.append(lists.offsets[of], lists.offsets[-1])
    starts, ends, values = edges[:-1], edges[1:], lists.entries.logprobs
    first = starts[:, None] + np.arange(_TELLING_VALUES)
    is_there = first < ends[:, None]
    some = values[np.where(is_there, first, 0)] if len(values) else np.zeros(first.shape)
    for step in _STEPS[::-1]:
        may_be = is_there.any(axis=1) & (_is_multiple(some, step) | ~is_there).all(axis=1)
        for number in np.flatnonzero(may_be).tolist():
            own = values[starts[number] : ends[number]]
            if np.count_nonzero(own) >= _TELLING_VALUES and _are_multiples(own, step):
                steps[response[of[number]]] = step
    return steps


def _step(values: NDArray[np.float64]) -> float:
    first = values[:_TELLING_VALUES]
    return next((step for step in _STEPS if _are_multiples(first, step) and _are_multiples(values, step)), 0.0)


def _are_multiples(values: NDArray[np.float64], step: float) -> bool:
    return bool(_is_multiple(values, step).all())


def _is_multiple(values: NDArray[np.float64], step: float) -> NDArray[np.bool_]:
    return np.abs(values - step * np.round(values / step)) <= _FLOAT32 * (1.0 + np.abs(values))


class Parted(NamedTuple):
    """The lists of one side without what was added to the k best, and these entries; ``None`` where there was none."""

    lists: list[Candidates]
    added: list[Candidate | None]


def part_appended(lists: Sequence[Candidates], sampled: Sequence[Candidate | None]) -> Parted:
    """Take the last entry out of each list that may end with a sampled token which is not one of the k best.

    Some servers add the sampled token to their k best. Its value bounds nothing, as the tokens between the k-th and it
    are not listed. A list that ends with the sampled token is whole for certain where a list of the same side that does
    not end so is as long, or where less mass is left over than the token itself has, whatever the list is rounded to.
    Any other is doubtful, and loses its last entry: what remains is a true list of the best, perhaps one token short.

    Parameters
    ----------
    lists : sequence of T candidate lists
        Of one side, as `check_lists` accepts them.
    sampled : sequence of T candidates
        What P sampled, whichever side the lists are of. ``None`` is not known, and says nothing.
    """
    ends = [None if token is None else _may_be(token, top[-1]) for top, token in zip(lists, sampled, strict=True)]
    whole = max((len(top) for top, end in zip(lists, ends, strict=True) if end is False), default=1)
    doubts = [bool(end) and len(top) > whole and _leaves_room(top) for top, end in zip(lists, ends, strict=True)]
    return Parted(
        [top[:-1] if doubt else top for top, doubt in zip(lists, doubts, strict=True)],
        [top[-1] if doubt else None for top, doubt in zip(lists, doubts, strict=True)],
    )


def _may_be(sampled: Candidate, listed: Candidate) -> bool:
    same_id = sampled.token_id is not None and sampled.token_id == listed.token_id
    same_bytes = bool(sampled.token_bytes) and sampled.token_bytes == listed.token_bytes
    is_anything = not is_whole(sampled.token) and sampled.token_id is None and not sampled.token_bytes
    return same_id or same_bytes or is_anything or sampled.token == listed.token


def _leaves_room(top: Candidates) -> bool:
    """Whether a token that is not listed could be more probable than the last one that is; equal, it is within its cap.

    The listed mass may be too large by the rounding that lists are let through with.
    """
    return 1.0 - listed_mass(top) / LARGEST_MASS > math.exp(logprob_of(top[-1]))


# Lists whose values are no probabilities, or those of another law than the model's.

CERTAIN = 1e-6  # a token with all but this is one that a degenerate list gives everything
MOST_TOKENS = 2.0**20  # no vocabulary has more
EXTREME = -50.0  # in lists of real models the k-th value is rarely below -40; a round or repeated one is a mark
FLOOR_BELOW = -9.0  # bfloat16 models tie at any value, but neither so often nor at the same one
FLOAT_NOISE = 2e-6  # of the mass of a list, in float32
ENOUGH = 4  # entries that say what the next one should be like
_COMMON_SHARE = 0.1  # of the lists of a response, that end with a floor
TELLING = 1e-4  # a last value at which some thousandths of the mass must be left for the tokens behind it


class Trusted(NamedTuple):
    """The part of a list that can be relied on, with its ``mass``.

    ``n_clipped`` entries of at most ``floor`` were a mark in place of a probability. ``largest_hidden`` is what one
    token outside the list may have, where the smallest value in it is no limit. ``is_degenerate``: one token has
    everything and the rest are marks, which is no distribution.
    """

    candidates: Candidates
    mass: float
    n_clipped: int
    floor: float | None
    largest_hidden: float | None
    is_degenerate: bool

    def unlimited(self) -> Trusted:
        """The same where one token outside may have all that is left over."""
        return self._replace(largest_hidden=max(0.0, 1.0 - self.mass))


def trusted(
    candidates: Candidates, n_dropped: int = 0, floors: frozenset[float] = frozenset(), *, by_mass: bool = True
) -> Trusted:
    """A list, as `kl.estimators.token_keys.listed` gives it, without values that are no probabilities.

    The smallest value is a clip, "this or below" in place of a value, if it is far below what real lists reach and is a
    whole number or shared by several entries, or if it is one of the ``floors`` of its side (`common_floors`). One that
    leaves more mass over than a whole vocabulary of such tokens has is contradicted: its token may have any value, up
    to all the mass left. A single such value that is no mark stays, for `kl.estimators.outliers` to set aside.

    Parameters
    ----------
    n_dropped : int
        Entries that were taken out of the list before.
    by_mass : bool
        Whether contradicted values are taken out, too; else marks alone.
    """
    if by_mass and _is_one_wrong_value(candidates, floors):
        return Trusted(candidates, listed_mass(candidates), 0, None, None, False)
    kept, floor = list(candidates), None
    mass, hidden = listed_mass(kept), None
    while kept:
        is_contradicted = by_mass and _is_contradicted(kept, mass)
        if not is_contradicted and not _is_clip(kept, floors):
            break
        least = logprob_of(kept[-1])
        floor = least if floor is None else max(floor, least)
        kept = [candidate for candidate in kept if logprob_of(candidate) > least]
        mass = listed_mass(kept)
        hidden = max(0.0, 1.0 - mass) if is_contradicted else hidden
    n_clipped = len(candidates) - len(kept)
    return Trusted(tuple(kept), mass, n_clipped, floor, hidden, _is_degenerate(candidates, kept, n_clipped + n_dropped))


def _is_one_wrong_value(candidates: Candidates, floors: frozenset[float]) -> bool:
    """Whether the last value alone is contradicted and no mark: `kl.estimators.outliers` judges it by both lists."""
    others = candidates[:-1]
    return (
        len(others) >= ENOUGH
        and not _is_clip(candidates, floors)
        and _is_contradicted(candidates, listed_mass(candidates))
        and not _is_contradicted(others, listed_mass(others))
    )


def with_lists(found: Sequence[Trusted], lists: Sequence[Candidates]) -> list[Trusted]:
    """The same with other candidates, of which some were taken out."""
    return [item._replace(candidates=tuple(top), mass=listed_mass(top)) for item, top in zip(found, lists, strict=True)]


def without_contradicted(found: Trusted) -> Trusted:
    """A list without the smallest values that the mass contradicts, none of which a position was set aside for.

    The last one stays, whatever it is, and is no limit.
    """
    kept, mass = found.candidates, found.mass
    while kept and logprob_of(kept[0]) > logprob_of(kept[-1]) and _is_contradicted(kept, mass):
        least = logprob_of(kept[-1])
        kept = tuple(candidate for candidate in kept if logprob_of(candidate) > least)
        mass = listed_mass(kept)
    if not kept or (len(kept) == len(found.candidates) and not _is_contradicted(kept, mass)):
        return found
    if len(kept) == len(found.candidates):
        return found.unlimited()
    floor = logprob_of(found.candidates[len(kept)])
    shorter = found._replace(
        candidates=kept,
        mass=mass,
        n_clipped=found.n_clipped + len(found.candidates) - len(kept),
        floor=floor if found.floor is None else max(floor, found.floor),
    )
    return shorter.unlimited()


def trusted_lists(lists: Sequence[Candidates], side: Literal["P", "Q"]) -> list[Trusted]:
    """The lists of one side without marks; values that the mass contradicts are left to `kl.estimators.outliers`.

    Raises
    ------
    CandidateListError
        If one is no distribution.
    """
    floors = common_floors(lists)
    found = [trusted(candidates, floors=floors, by_mass=False) for candidates in lists]
    for position, item in enumerate(found):
        if item.is_degenerate:
            raise CandidateListError(
                position, side, "gives one token everything and the others one floor; leave it out."
            )
    return found


def _is_clip(kept: Sequence[Candidate], floors: frozenset[float]) -> bool:
    least = logprob_of(kept[-1])
    if least > EXTREME:
        return least in floors
    return least == int(least) or (len(kept) > 1 and logprob_of(kept[-2]) == least)


def _is_contradicted(kept: Sequence[Candidate], mass: float) -> bool:
    most = MOST_TOKENS * math.exp(logprob_of(kept[-1]))
    if 1.0 - mass - FLOAT_NOISE <= most:
        return False
    logs = np.array([logprob_of(candidate) for candidate in kept], dtype=np.float64)
    return 1.0 - mass - FLOAT_NOISE - _step(logs) / 2 > most


def _is_degenerate(candidates: Candidates, kept: Sequence[Candidate], n_marks: int) -> bool:
    if not kept:
        return True
    first, others = logprob_of(kept[0]), {logprob_of(candidate) for candidate in candidates[1:]}
    one_floor = len(candidates) > 4 and len(others) == 1 and min(others) <= FLOOR_BELOW
    return (len(kept) == 1 and n_marks > 0 and first > -CERTAIN) or (one_floor and first > -1e-3)


def common_floors(lists: Sequence[Candidates]) -> frozenset[float]:
    """The smallest value of all lists of a side, if a tenth of them, and at least two, end with several entries of it.

    Ties are ordinary: bfloat16 models give the last of 20 values twice at every other position, and by chance one value
    at two positions, but not at many.
    """
    lasts = [logprob_of(top[-1]) for top in lists if len(top) > 2 and top[-1].logprob == top[-3].logprob]
    least = min((logprob_of(top[-1]) for top in lists if top), default=0.0)
    common = bool(is_common(np.array(lasts.count(least)), np.array(len(lists))))
    return frozenset({least}) if least <= FLOOR_BELOW and common else frozenset()


def is_common(n_ties: NDArray[np.int64], n_lists: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Whether so many lists of all end with several entries of one value that it is no value."""
    return n_ties > np.maximum(1, _COMMON_SHARE * n_lists)


def truncated(lists: Sequence[Trusted | None]) -> list[bool]:
    """Which lists of one side hold all mass of a law that was cut (top-p, top-k, min-p) and renormalised.

    Where the last listed token is still probable, so are those behind it: a list that leaves nothing for them has been
    made to. One may be so by chance, half of them not.
    """
    whole = [found is not None and abs(1.0 - found.mass) <= FLOAT_NOISE for found in lists]
    telling = [
        found is not None and len(found.candidates) > 1 and math.exp(logprob_of(found.candidates[-1])) >= TELLING
        for found in lists
    ]
    n_whole = sum(is_whole and tells for is_whole, tells in zip(whole, telling, strict=True))
    return whole if n_whole and 2 * n_whole >= sum(telling) else [False] * len(lists)
