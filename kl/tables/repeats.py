"""A model that was asked twice: its first answers in the place of P's lists."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from kl.columns import Entries, Positions
from kl.records import Response
from kl.scores import Scores
from kl.tables.pairs import Results


def first_answers(response: Response, scores: Results) -> Response:
    """``response`` with the lists of ``scores`` for P's, to be compared with those of a second asking.

    The sampled tokens are those of the scores, of which the response's own are no part.
    """
    positions, answers = Positions.of(response.positions), Scores.of(scores)
    answered = np.flatnonzero(answers.is_score)
    sampled = positions.sampled.with_logprobs(np.where(answers.is_score, np.nan, positions.sampled.logprobs))
    own = answers.is_score & answers.sampled.tokens.is_not_null().to_numpy()
    order = np.arange(len(positions)) + np.where(own, len(positions), 0)
    replaced = Positions(
        Entries.joined([sampled, answers.sampled]).take(order),
        positions.tops.replaced(answered, answers.tops.take(answered)),
        np.where(answers.is_score, answers.n_dropped, positions.n_dropped),
        positions.may_lack & ~answers.is_score,
        {t: defect for t, defect in positions.defects.items() if not answers.is_score[t]},
    )
    return replace(response, positions=replaced)


def where_both(first: Results, second: Results) -> Scores:
    """The second answers where there is a first one; elsewhere why there is none."""
    once = Scores.of(first)
    return Scores.of(second).without({t: once.failures.get(t) for t in map(int, np.flatnonzero(~once.is_score))})
