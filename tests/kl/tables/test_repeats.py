"""The first answers of a model in the place of P's lists."""

from __future__ import annotations

import numpy as np

from kl.records import Candidate, Position, Prompt, Response, Score, ScoreFailure, Turn
from kl.tables.repeats import first_answers, where_both
from kl.tables.tokens import measure_response

LIST = tuple(Candidate(f"t{rank}", logprob, rank) for rank, logprob in enumerate((-0.5, -1.5, -2.5, -3.5, -4.5)))
OTHER = tuple(
    entry._replace(logprob=entry.logprob + shift) for entry, shift in zip(LIST, (-0.2, 0.2, 0.2, 0.2, 0.2), strict=True)
)


def response(n: int) -> Response:
    """P says that another token is nearly certain; that is no part of what Q said."""
    certain = Candidate("x", -0.01, 99)
    return Response("a.json", 0, Prompt((Turn("user", "Hi"),)), "p", "x" * n, (Position(certain, (certain,)),) * n)


def test_two_answers_of_q_are_compared_and_p_takes_no_part():
    first = [Score("a", LIST), Score("b", LIST), ScoreFailure("c", "blocked", "the service blocked it."), None]
    second = [Score("a2", LIST), Score("b2", OTHER), Score("c2", OTHER), Score("d2", OTHER)]
    compared = first_answers(response(4), first)
    table = measure_response(compared, where_both(first, second), estimator="censored", prior=None)
    assert table["kl_lower"][0] == 0
    assert table["kl_lower"][1] > 0.01
    assert table["reason"].to_list()[2:] == ["blocked", "not-scored"]
    assert table["logprob_p"].to_list()[:2] == [None, None], "what P sampled has no value in Q's first answer"
    assert np.isclose(table["coverage_p"][1], np.exp([-0.5, -1.5, -2.5, -3.5, -4.5]).sum())


def test_a_first_answer_that_is_no_distribution_is_refused_as_any_other():
    everything = Score("a", (Candidate("x", 0.0, 1),), n_dropped=4)
    table = measure_response(
        first_answers(response(1), [everything]), [Score("b", LIST)], estimator="lower", prior=None
    )
    assert table["reason"].to_list() == ["degenerate-p"]


def test_the_sampled_token_is_that_of_the_first_answer():
    """A service may add it to its list; it is recognised there by what the same answer says that it sampled."""
    first = [Score("a", LIST, sampled=LIST[-1])]
    (position,) = first_answers(response(1), first).positions
    assert (position.sampled, position.top) == (LIST[-1], LIST)
