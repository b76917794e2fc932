"""Whether Q saw the prefixes that P wrote: by how many tokens its service counted before each position.

The context of position t is the prompt and the first t tokens of P, so that in one response the count of the prompt's
tokens rises by one a position. Where it does not, the prefix was tokenised otherwise, or trimmed, and Q's list belongs
to another context.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from kl.records import Response, Score, ScoreFailure

Results = list[Score | ScoreFailure | None]

RETOKENISED = "retokenised"
_EARLY = 5  # positions of a response that say what its prompt counts
_SLACK = 8  # tokens that one step may lose beside those it adds: a word that is cut otherwise has fewer


class _Context(NamedTuple):
    """A position with a count. ``excess`` is the count minus the position: what the prompt and its turns count.

    After white space a service may trim the prefix.
    """

    position: int
    excess: int
    key: str
    after_space: bool


@dataclass(frozen=True, slots=True)
class CountEvidence:
    """Whether the counts of a service are counts of P's tokens at all; add up over a data set.

    ``n_right`` of ``n_steps`` from one position asked to the next one the count rises by their distance.
    """

    n_steps: int = 0
    n_right: int = 0

    @classmethod
    def of(cls, responses: Sequence[Response], results: Sequence[Results]) -> CountEvidence:
        """Of the responses to one prompt.

        Position 0 has no model turn, and prefixes that end in white space may be trimmed: both are passed over.
        Responses of which one position was asked are one sequence, by position.
        """
        steps: list[bool] = []
        alone: list[_Context] = []
        for response, found in zip(responses, results, strict=True):
            sequence = [item for item in _contexts(response, found) if item.position and not item.after_space]
            steps += _rises(sequence)
            alone += sequence if len(sequence) == 1 else ()
        steps += _rises(sorted(alone))
        return cls(len(steps), sum(steps))

    @classmethod
    def total(cls, parts: Iterable[CountEvidence]) -> CountEvidence:
        """Of all parts together."""
        items = list(parts)
        return cls(sum(item.n_steps for item in items), sum(item.n_right for item in items))

    @property
    def usable(self) -> bool:
        """Whether most steps are right: counts that rise otherwise, or never, say nothing of single positions."""
        return 2 * self.n_right > self.n_steps


class Checked(NamedTuple):
    """Results with the wrong ones replaced by failures; at ``n_odd`` positions the count said nothing."""

    results: list[Results]
    n_odd: int


def without_retokenised(responses: Sequence[Response], results: Sequence[Results]) -> Checked:
    """Replace the scores of contexts that Q saw otherwise than P wrote them by a failure ``retokenised``.

    What the prompt counts is what most of the early positions of all its responses agree on: the first five asked from
    1 on, prefixes that end in white space left aside, the n-th of a response with weight 1/n, equal contexts once. A
    count that is wrong at the very first position is outvoted, and so is a prefix that is tokenised otherwise from an
    early position on, which the first ones and the other responses contradict. Position 0 has one vote, and is never
    judged: there is no prefix, and the header of a model turn may be missing from its count.

    A count that falls short by more than tokenising can make, eight and the tokens between one position and the next,
    is no verdict (a service leaves out the tokens of a cache, say); such positions are counted. One that is too large
    by any number is a verdict: something else is in the context. Scores without a count stay.

    Parameters
    ----------
    responses : sequence of Response
        To one prompt, asked of one model.
    results : sequence, one per response, of sequences, one per position
        What Q answered.
    """
    contexts = [_contexts(response, found) for response, found in zip(responses, results, strict=True)]
    base = _base(contexts)
    if base is None:
        return Checked(list(results), 0)
    checked, n_odd = list[Results](), 0
    for found, sequence in zip(results, contexts, strict=True):
        wrong, odd = _judged(sequence, base)
        n_odd += odd
        checked.append(
            [ScoreFailure(_key(item), RETOKENISED, wrong[t]) if t in wrong else item for t, item in enumerate(found)]
        )
    return Checked(checked, n_odd)


def _contexts(response: Response, found: Results) -> list[_Context]:
    contexts: list[_Context] = []
    for t, (score, end) in enumerate(zip(found, response.prefix_ends().tolist(), strict=True)):
        if isinstance(score, Score) and score.input_tokens is not None:
            after_space = response.text[end - 1 : end].isspace() if end else False
            contexts.append(_Context(t, score.input_tokens - t, score.key, after_space))
    return contexts


def _rises(sequence: Sequence[_Context]) -> Iterator[bool]:
    return (later.excess == earlier.excess for earlier, later in pairwise(sequence))


def _base(contexts: Sequence[Sequence[_Context]]) -> int | None:
    votes: dict[int, float] = {}
    seen: set[str] = set()
    for sequence in contexts:
        prefixes = [item for item in sequence if item.position]
        early = [item for item in prefixes if not item.after_space][:_EARLY] or prefixes[:_EARLY]
        start = [(1, item) for item in sequence if not item.position]
        for rank, item in (*enumerate(early, 1), *start):
            if item.key not in seen:
                seen.add(item.key)
                votes[item.excess] = votes.get(item.excess, 0.0) + 1 / rank
    return max(votes, key=votes.__getitem__, default=None)


def _judged(sequence: Sequence[_Context], base: int) -> tuple[dict[int, str], int]:
    """Why positions are wrong, and at how many the count says nothing."""
    wrong: dict[int, str] = {}
    n_odd, last_position, last_excess = 0, 0, base
    for item in sequence:
        if not item.position:
            continue
        lost, added = min(last_excess, base) - item.excess, item.position - last_position
        if lost > added + _SLACK:
            n_odd += 1
            continue
        if item.excess != base:
            wrong[item.position] = _why(item, base)
        last_position, last_excess = item.position, item.excess
    return wrong, n_odd


def _why(item: _Context, base: int) -> str:
    less = item.excess < base
    cause = "it trims white space at the end" if less and item.after_space else "it tokenised the text otherwise than P"
    return (
        f"Q's service counted {item.excess + item.position} tokens before this position, where "
        f"{base + item.position} belong there (one more a position): {cause}, so that its list is of another context. "
        "A backend that feeds token ids can measure the position."
    )


def _key(result: Score | ScoreFailure | None) -> str:
    return result.key if result is not None else ""
