from __future__ import annotations

import pickle

import numpy as np
import pytest

from kl.records import Candidate, Score, ScoreFailure
from kl.scores import NO_COUNT, Scores

RESULTS: list[Score | ScoreFailure | None] = [
    Score("a", (Candidate(" x", -0.5, 3), Candidate("y", -1.0)), Candidate(" x", -0.5, 3), "v1", "STOP", 7, 1, 2),
    None,
    ScoreFailure("b", "blocked", "a line", final=True),
    Score("c", ()),
]


def test_results_come_back_as_they_were() -> None:
    scores = Scores.of(RESULTS)
    assert list(scores) == RESULTS
    assert [scores[t] for t in range(-4, 4)] == RESULTS * 2
    assert scores[1:3] == tuple(RESULTS[1:3])
    assert list(pickle.loads(pickle.dumps(scores))) == RESULTS
    assert Scores.of(scores) is scores
    with pytest.raises(IndexError):
        scores[4]


def test_columns_say_what_the_objects_do() -> None:
    scores = Scores.of(RESULTS)
    assert scores.is_score.tolist() == [True, False, False, True]
    assert scores.tops.lengths.tolist() == [2, 0, 0, 0]
    assert scores.n_dropped.tolist() == [2, 0, 0, 0]
    assert scores.input_tokens.tolist() == [7, NO_COUNT, NO_COUNT, NO_COUNT]
    assert scores.sampled.candidates() == [Candidate(" x", -0.5, 3), None, None, None]
    assert scores.versions() == {"v1"}


def test_several_are_joined_whatever_table_they_are_of() -> None:
    one, two = Scores.of(RESULTS), Scores.of([*RESULTS[2:], RESULTS[0]])
    assert list(Scores.joined([one, two, one])) == [*RESULTS, *RESULTS[2:], RESULTS[0], *RESULTS]
    some = Scores(one.table, np.array([1, -1, 0]))
    assert list(Scores.joined([one, some])) == [*RESULTS, RESULTS[3], None, RESULTS[0]]
    assert list(Scores.joined([])) == []


def test_failures_take_the_place_of_some() -> None:
    scores, failure = Scores.of(RESULTS), ScoreFailure("a", "retokenised", "a line")
    assert list(scores.without({0: failure, 3: None})) == [failure, None, RESULTS[2], None]
    assert list(scores) == RESULTS
    assert scores.without({}) is scores
