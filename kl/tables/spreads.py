"""The spread of log p/q of a data set, of which the last response says whether all its answers count."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from kl.columns import BoolArray
from kl.estimators.censored import SpreadEvidence, SpreadPrior, pooled_prior
from kl.estimators.outliers import spread_evidence
from kl.tables.pairs import Answered, Paired, pair_up


class Spreads(NamedTuple):
    """What responses say of the spread of log p/q, with the positions that the counts of tokens take away and without.

    ``plain`` is of the responses of which they take none away, ``checked`` of the others without those positions,
    ``unchecked`` of the same with them: whether counts are used is known when all responses are (`CountEvidence`).
    """

    plain: SpreadEvidence
    checked: SpreadEvidence
    unchecked: SpreadEvidence

    @classmethod
    def total(cls, parts: Sequence[Spreads]) -> Spreads:
        """Of all responses, in the order of the parts."""
        columns = zip(*parts, strict=True) if parts else [()] * len(cls._fields)
        return cls(*map(SpreadEvidence.total, columns))

    def prior(self, use_counts: bool) -> SpreadPrior | None:
        """From the positions that are measured."""
        return pooled_prior(SpreadEvidence.total([self.plain, self.checked if use_counts else self.unchecked]))


class BothWays(NamedTuple):
    """Responses with the positions that their counts take away (``came``), and without them.

    ``checked`` is None where they take none away, ``others`` are the R responses of which they do, shape (R,).
    """

    came: Paired
    checked: Paired | None
    others: BoolArray

    @classmethod
    def of(cls, checked: Sequence[Answered], came: Sequence[Answered], *, keep_lists: bool = False) -> BothWays:
        """Answers that are the same objects do not differ; the lists that are not compared are kept if told to."""
        same = [
            one.scores is two.scores and one.response.positions is two.response.positions
            for one, two in zip(checked, came, strict=True)
        ]
        both = pair_up(came, keep_lists=keep_lists)
        others = ~np.array(same, dtype=np.bool_)
        return cls(both, None if all(same) else pair_up(checked, keep_lists=keep_lists), others)

    def spreads(self) -> Spreads:
        """What they say of the spread."""
        plain, unchecked = self._divided(self.came)
        return Spreads(
            plain, SpreadEvidence.none() if self.checked is None else self._divided(self.checked)[1], unchecked
        )

    def _divided(self, paired: Paired) -> tuple[SpreadEvidence, SpreadEvidence]:
        """Of the responses that counts leave alone, and of the others."""
        aligned = paired.aligned
        if aligned is None:
            return SpreadEvidence.none(), SpreadEvidence.none()
        is_other = self.others[aligned.response]
        if not is_other.any():
            return spread_evidence(aligned), SpreadEvidence.none()
        plain, others = (spread_evidence(aligned.only(np.flatnonzero(rows))) for rows in (~is_other, is_other))
        return plain, others

    def chosen(self, use_counts: bool) -> Paired:
        """What is measured."""
        return self.checked if use_counts and self.checked is not None else self.came
