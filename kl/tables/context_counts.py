"""Whether Q saw the prefixes that P wrote: by how many tokens its service counted before each position.

The context of position t is the prompt and the first t tokens of P, so that in one response the count of the prompt's
tokens rises by one a position. Where it does not, the prefix was tokenised otherwise, or trimmed, and Q's list belongs
to another context.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import astuple, dataclass
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kl.records import Response, Score, ScoreFailure
from kl.scores import NO_COUNT, Scores

Results = Sequence[Score | ScoreFailure | None]

RETOKENISED = "retokenised"
_VOTES = (60, 30, 20, 15, 12)  # of the first positions of a response: the n-th has 1/n
_SLACK = 8  # tokens that one step may lose beside those it adds: a word that is cut otherwise has fewer
_MOST_LOST = 16  # of the tokens a step adds, however many; the blocks of caches have 64 and more

_Verdict = Literal["right", "wrong", "odd"]


class _Context(NamedTuple):
    """A position with a count. ``excess`` is the count minus the position: what the prompt and its turns count.

    ``n_space`` is the number of white-space characters that end the prefix, which a service may trim; ``row`` the
    number of the response, ``version`` that of the model.
    """

    position: int
    excess: int
    key: str
    n_space: int
    row: int
    version: str | None


_Group = list[list[_Context]]  # by response, in the order of positions


@dataclass(frozen=True, slots=True)
class CountEvidence:
    """Whether the counts of a service are counts of P's tokens at all; add up over a data set.

    ``n_right`` of ``n_steps`` from one position asked to the next one the count rises by their distance; at ``n_base``
    of ``n_judged`` positions it is what the prompt counts and the position. Where that is not known, or the count says
    nothing, a position is not judged.
    """

    n_steps: int = 0
    n_right: int = 0
    n_judged: int = 0
    n_base: int = 0

    @classmethod
    def of(cls, responses: Sequence[Response], results: Sequence[Results]) -> CountEvidence:
        """Of the responses to one prompt.

        Position 0 has no model turn, and prefixes that end in white space may be trimmed: both are passed over.
        Responses of which one position was asked are one sequence, by position.
        """
        if _counts_agree(results):
            return cls._of_agreeing(responses, results)
        return cls.total(map(cls._of_group, _groups(responses, results)))

    @classmethod
    def _of_agreeing(cls, responses: Sequence[Response], results: Sequence[Results]) -> CountEvidence:
        """The same, much faster, where all counts are right."""
        lengths: list[int] = []
        for response, found in zip(responses, results, strict=True):
            counted = np.flatnonzero(Scores.of(found).input_tokens != NO_COUNT)
            ends = response.prefix_ends()[counted[counted > 0]]
            lengths.append(len(ends) - int(_is_space(response.text, ends - 1).sum()))
        n_alone, n_judged = lengths.count(1), sum(lengths)
        n_steps = sum(length - 1 for length in lengths if length) + max(n_alone - 1, 0)
        return cls(n_steps, n_steps, n_judged, n_judged)

    @classmethod
    def _of_group(cls, group: _Group) -> CountEvidence:
        kept = [[item for item in sequence if item.position and not item.n_space] for sequence in group]
        alone = sorted(sequence[0] for sequence in kept if len(sequence) == 1)
        steps = [later.excess == earlier.excess for items in (*kept, alone) for earlier, later in pairwise(items)]
        base = _base(group)
        verdicts = [] if base is None else [verdict for item, verdict in _judged(group, base) if not item.n_space]
        n_base, n_wrong = verdicts.count("right"), verdicts.count("wrong")
        return cls(len(steps), sum(steps), n_base + n_wrong, n_base)

    @classmethod
    def total(cls, parts: Iterable[CountEvidence]) -> CountEvidence:
        """Of all parts together."""
        columns = zip(*(astuple(part) for part in parts), strict=True)
        return cls(*map(sum, columns))

    @property
    def usable(self) -> bool:
        """Whether most steps are right, and most positions.

        Counts that rise otherwise, or never, say nothing of single positions, nor does a tokenizer that cuts a tenth of
        the tokens in two: most steps are right, and soon no position is.
        """
        return 2 * self.n_right > self.n_steps and (2 * self.n_base > self.n_judged or not self.n_judged)


class Checked(NamedTuple):
    """Results with the wrong ones replaced by failures; at ``n_odd`` positions the count said nothing."""

    results: list[Scores]
    n_odd: int


def without_retokenised(responses: Sequence[Response], results: Sequence[Results]) -> Checked:
    """Replace the scores of contexts that Q saw otherwise than P wrote them by a failure ``retokenised``.

    Counts are compared within one version of the model. What the prompt counts is what the first five positions of all
    its responses say by more than half of their votes: those asked from 1 on, prefixes that end in white space left
    aside, the n-th of a response with weight 1/n, equal contexts once. One context alone outvotes no other. A level
    below that of a response's first position counts there only if another response shows it, because a text that is cut
    otherwise stays so. Position 0 has no vote, as its count may lack the header of a model turn, and is never judged;
    but if there is no majority and the highest level is its own, that is the base, as a header only adds. Where
    all this decides nothing, no position is judged.

    No verdict is, too, a count that falls short by more than tokenising can make from one position to the next: eight
    and the tokens between them, of these at most sixteen and white space at the end (a service leaves out the tokens of
    a cache, say). It lasts until the count is back within eight of the base. A count that is too large by more than
    eight is a verdict, as something else is in the context; but not if other contexts have the same excess, as then the
    base may be that of a cache. All positions without a verdict are counted. Scores without a count stay.

    Parameters
    ----------
    responses : sequence of Response
        To one prompt, asked of one model.
    results : sequence, one per response, of sequences, one per position
        What Q answered.
    """
    if _counts_agree(results):
        return Checked([Scores.of(found) for found in results], 0)
    wrong: list[dict[int, ScoreFailure]] = [{} for _ in results]
    n_odd = 0
    for group in _groups(responses, results):
        base = _base(group)
        if base is None:
            n_odd += sum(item.position > 0 for sequence in group for item in sequence)
            continue
        for item, verdict in _judged(group, base):
            n_odd += verdict == "odd"
            if verdict == "wrong":
                wrong[item.row][item.position] = ScoreFailure(item.key, RETOKENISED, _why(item, base))
    return Checked([Scores.of(found).without(failures) for found, failures in zip(results, wrong, strict=True)], n_odd)


def _counts_agree(results: Sequence[Results]) -> bool:
    """Whether one version of the model counted, and before each position but 0 as many tokens more as it says."""
    levels, versions = set[int](), set[str | None]()
    for found in results:
        scores = Scores.of(found)
        counts = scores.input_tokens
        excess = (counts - np.arange(len(counts)))[counts != NO_COUNT]
        if not excess.size:
            continue
        versions |= scores.table.named
        levels.update(np.unique(excess[int(counts[0] != NO_COUNT) :]).tolist())
        if len(levels) > 1 or len(versions) > 1:
            return False
    return True


def _is_space(text: str, at: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Whether there is white space at some places of a text; before it there is none."""
    space = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<U1")
    found: NDArray[np.bool_] = np.char.isspace(space[at]) & (at >= 0) if len(space) else at > at
    return found


def _groups(responses: Sequence[Response], results: Sequence[Results]) -> Iterator[_Group]:
    """The contexts with a count, those of each version of the model apart."""
    contexts = [
        list(_contexts(row, response, found))
        for row, (response, found) in enumerate(zip(responses, results, strict=True))
    ]
    for version in dict.fromkeys(item.version for sequence in contexts for item in sequence):
        yield [[item for item in sequence if item.version == version] for sequence in contexts]


def _contexts(row: int, response: Response, found: Results) -> Iterator[_Context]:
    scores = Scores.of(found)
    counts = scores.input_tokens
    counted = np.flatnonzero(counts != NO_COUNT)
    if not counted.size:
        return
    ends = response.prefix_ends()[counted].tolist()
    rows, keys, versions = map(int, scores.rows[counted]), scores.table.keys, scores.table.versions
    for t, count, end, number in zip(map(int, counted), map(int, counts[counted]), ends, rows, strict=True):
        key, version = keys[number], versions[number]
        after_space = response.text[end - 1 : end].isspace() if end else False
        n_space = end - len(response.text[:end].rstrip()) if after_space else 0
        yield _Context(t, count - t, key, n_space, row, version)


def _base(group: _Group) -> int | None:
    """The excess of the prompt; None where nothing decides."""
    ballots: dict[str, tuple[int, int, bool]] = {}  # by context: weight, excess, whether it may vote by itself
    for sequence in group:
        prefixes = [item for item in sequence if item.position]
        early = [item for item in prefixes if not item.n_space] or prefixes
        for weight, item in zip(_VOTES, early, strict=False):
            ballot = (weight, item.excess, item.excess >= early[0].excess)
            ballots[item.key] = max(ballot, ballots.get(item.key, ballot))
    levels = {excess for _, excess, by_itself in ballots.values() if by_itself}
    if len({excess for _, excess, _ in ballots.values()}) == 1:
        return levels.pop()
    total = sum(weight for weight, _, _ in ballots.values())
    for level in levels:
        votes = [weight for weight, excess, _ in ballots.values() if excess == level]
        if len(votes) > 1 and 2 * sum(votes) > total:
            return level
    starts = {item.excess for sequence in group for item in sequence if not item.position}
    return max(levels) if levels and starts == {max(levels)} else None


def _judged(group: _Group, base: int) -> Iterator[tuple[_Context, _Verdict]]:
    """Every position but 0 of every response, with what its count says."""
    at_level = Counter({item.key: item.excess for sequence in group for item in sequence}.values())
    for sequence in group:
        last_position, last_excess, odd = 0, base, False
        for item in sequence:
            if not item.position:
                continue
            added, lost = item.position - last_position, min(last_excess, base) - item.excess
            too_low = lost > min(added, _MOST_LOST + item.n_space) + _SLACK
            odd = too_low or (odd and item.excess < base - _SLACK)
            shared_above = item.excess > base + _SLACK and at_level[item.excess] > 1
            yield item, "odd" if odd or shared_above else "right" if item.excess == base else "wrong"
            last_position, last_excess = item.position, item.excess


def _why(item: _Context, base: int) -> str:
    less = item.excess < base
    cause = "it trims white space at the end" if less and item.n_space else "it tokenised the text otherwise than P"
    return (
        f"Q's service counted {item.excess + item.position} tokens before this position, where "
        f"{base + item.position} belong there (one more a position): {cause}, so that its list is of another context. "
        "A backend that feeds token ids can measure the position."
    )
