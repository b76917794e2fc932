"""The spread of log p/q of a data set, of which the last response says whether all its answers count."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import NamedTuple

from kl.estimators.censored import SpreadEvidence, SpreadPrior, pooled_prior
from kl.records import Response
from kl.tables.pairs import Scores
from kl.tables.tokens import response_spread


class Answered(NamedTuple):
    """A response and what was said at its positions."""

    response: Response
    scores: Scores


class Spreads(NamedTuple):
    """What responses say of the spread of log p/q, with the positions that the counts of tokens take away and without.

    ``plain`` is of the responses of which they take none away, ``checked`` of the others without those positions,
    ``unchecked`` of the same with them: whether counts are used is known when all responses are (`CountEvidence`).
    """

    plain: SpreadEvidence
    checked: SpreadEvidence
    unchecked: SpreadEvidence

    @classmethod
    def of(cls, checked: Answered, unchecked: Answered) -> Spreads:
        """Of one response: without the positions that its counts take away, and with them."""
        none = SpreadEvidence.none()
        same_lists = checked.response.positions == unchecked.response.positions
        if same_lists and all(map(operator.is_, checked.scores, unchecked.scores)):
            return cls(response_spread(*checked), none, none)
        return cls(none, response_spread(*checked), response_spread(*unchecked))

    @classmethod
    def total(cls, parts: Sequence[Spreads]) -> Spreads:
        """Of all responses, in the order of the parts."""
        columns = zip(*parts, strict=True) if parts else [()] * len(cls._fields)
        return cls(*map(SpreadEvidence.total, columns))

    def prior(self, use_counts: bool) -> SpreadPrior | None:
        """From the positions that are measured."""
        return pooled_prior(SpreadEvidence.total([self.plain, self.checked if use_counts else self.unchecked]))
