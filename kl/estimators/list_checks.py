"""What a top-k list must be like, so that its smallest value bounds the tokens that it leaves out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

from kl.estimators.token_keys import Candidates, is_known, logprob_of
from kl.records import Candidate

# Log-probabilities rounded to two decimals reach 1.005; above, the list holds something else than one distribution.
LARGEST_MASS = 1.01
_LARGEST_LOG = 700.0  # exp of more overflows float64


class CandidateListError(ValueError):
    """A list that no bound can be taken from, with its position, its side and what to do."""

    def __init__(self, position: int, side: Literal["P", "Q"], problem: str) -> None:
        super().__init__(position, side, problem)
        self.position = position
        self.side = side
        self.problem = problem

    def __str__(self) -> str:
        return f"position {self.position}: the list of {self.side} {self.problem}"


def check_lengths(
    lists_p: Sequence[Candidates], lists_q: Sequence[Candidates], *sampled: Sequence[Candidate | None] | None
) -> None:
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
    for position, candidates in enumerate(lists):
        problem = _problem(candidates)
        if problem is not None:
            raise CandidateListError(position, side, problem)


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


class Parted(NamedTuple):
    """The lists of one side without what was added to the k best, and these entries; ``None`` where there was none."""

    lists: list[Candidates]
    added: list[Candidate | None]


def part_appended(lists: Sequence[Candidates], sampled: Sequence[Candidate | None]) -> Parted:
    """Take the last entry out of each list that may end with a sampled token which is not one of the k best.

    Some servers add the sampled token to their k best. Its value bounds nothing, as the tokens between the k-th and it
    are not listed. A list that ends with the sampled token is whole for certain where a list of the same side that does
    not end so is as long, or where less mass is left over than the token itself has. Any other is doubtful, and loses
    its last entry: what remains is a true list of the best, if perhaps one token short.

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
    return same_id or sampled.token == listed.token


def _leaves_room(top: Candidates) -> bool:
    """Whether a token that is not listed could be more probable than the last one that is."""
    return 1.0 - listed_mass(top) > math.exp(logprob_of(top[-1]))
