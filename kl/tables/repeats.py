"""A model that was asked twice: its first answers in the place of P's lists."""

from __future__ import annotations

from dataclasses import replace

from kl.records import Position, Response, Score, ScoreFailure
from kl.tables.pairs import Scores


def first_answers(response: Response, scores: Scores) -> Response:
    """``response`` with the lists of ``scores`` for P's, to be compared with those of a second asking.

    The sampled tokens are those of the scores, of which the response's own are no part.
    """
    positions = [
        _answered(position, score) if isinstance(score, Score) else position
        for position, score in zip(response.positions, scores, strict=True)
    ]
    return replace(response, positions=tuple(positions))


def _answered(position: Position, score: Score) -> Position:
    return Position(score.sampled or position.sampled._replace(logprob=None), score.top, score.n_dropped)


def where_both(first: Scores, second: Scores) -> list[Score | ScoreFailure | None]:
    """The second answers where there is a first one; elsewhere why there is none."""
    return [two if isinstance(one, Score) else one for one, two in zip(first, second, strict=True)]
