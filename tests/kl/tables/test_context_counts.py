"""Counts of the prompt's tokens: which positions they convict, and when they say nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kl.records import Candidate, Position, Prompt, Response, Score, ScoreFailure, Turn
from kl.tables import context_counts
from kl.tables.context_counts import RETOKENISED, CountEvidence, Results, without_retokenised

PROMPT = Prompt((Turn("user", "Why?"),))
BASE = 11


def response(tokens: Sequence[str], index: int = 0) -> Response:
    positions = tuple(Position(Candidate(token, -0.1), (Candidate(token, -0.1),)) for token in tokens)
    return Response("a.json", index, PROMPT, "p", "".join(tokens), positions)


def answers(
    of: Response, counts: Sequence[int | None], asked: Sequence[int] | None = None, version: str | None = None
) -> Results:
    """What Q said at the positions asked; equal prefixes are one context."""
    found: Results = [None] * len(of.positions)
    for t, end, count in zip(range(len(counts)), of.prefix_ends(), counts, strict=True):
        if asked is None or t in asked:
            top = (Candidate("x", -0.1),)
            found[t] = Score(f"key of {of.text[:end]!r}", top, input_tokens=count, model_version=version)
    return found


def rising(n: int, **changes: int) -> list[int]:
    """Counts as they ought to be, with changes from (``from_7``) or at (``at_7``) a position."""
    counts = BASE + np.arange(n)
    for where, change in changes.items():
        kind, _, position = where.partition("_")
        counts[int(position) : None if kind == "from" else int(position) + 1] += change
    return counts.tolist()


def words(n: int, name: str = "w") -> list[str]:
    return [f" {name}{index}" for index in range(n)]


def marked(*sequences: Sequence[int | None], asked: Sequence[int] | None = None) -> list[list[int]]:
    """The positions that are replaced, by response."""
    responses = [response(words(len(counts), f"r{index}w"), index) for index, counts in enumerate(sequences)]
    results = [answers(item, counts, asked) for item, counts in zip(responses, sequences, strict=True)]
    return replaced(responses, results)


def replaced(responses: Sequence[Response], results: Sequence[Results]) -> list[list[int]]:
    found: list[list[int]] = []
    for before, after in zip(results, without_retokenised(responses, results).results, strict=True):
        found.append([t for t, (old, new) in enumerate(zip(before, after, strict=True)) if old != new])
        assert all(isinstance(after[t], ScoreFailure) and after[t].reason == RETOKENISED for t in found[-1])
        assert all(after[t].key == before[t].key for t in found[-1])
    return found


RULES: list[tuple[str, Sequence[int | None], list[int]]] = [
    ("all as it ought to be", rising(20), []),
    ("a header of the model turn, which position 0 has not", rising(20, from_1=4), []),
    ("one position", rising(20, at_7=-1), [7]),
    ("one position, more", rising(20, at_7=2), [7]),
    ("from a position on", rising(20, from_7=-1), list(range(7, 20))),
    ("from a position on, more", rising(20, from_7=5), list(range(7, 20))),
    ("further and further", rising(20, from_7=-1, from_12=-1), list(range(7, 20))),
    ("much is put into the context", rising(20, at_7=300), [7]),
    ("more is put in", rising(20, from_7=8), list(range(7, 20))),
    ("much more from a position on, or the first had a cache", rising(20, from_7=300), []),
    ("the first has too many", rising(20, at_1=1), []),
    ("a header, and from the second position on", rising(20, from_1=3, from_2=-1), []),
    ("a header as long as what the first position lost", rising(20, from_1=1, at_1=-1), [1]),
    ("much is put in, and a little is lost", rising(20, at_7=300, at_8=-1), [7, 8]),
    ("white space of four tokens", rising(20, at_7=-1, at_8=-2, at_9=-3, at_10=-4), [7, 8, 9, 10]),
    ("the first position", rising(20, at_1=-1), [1]),
    ("the first position, under a header", rising(20, from_1=3, at_1=-1), [1]),
    ("from the second position on", rising(20, from_2=-1), list(range(2, 20))),
    ("none has a count", [None] * 20, []),
    ("some have no count", [count if t % 3 else None for t, count in enumerate(rising(20, at_7=-1))], [7]),
    ("tokens of a cache are left out at some", rising(40, at_9=-128, at_30=-128), []),
    ("tokens of a cache are left out from a position on", rising(40, from_20=-128, at_10=-1), [10]),
    ("tokens of a cache are left out from an early position on", rising(400, from_6=-64), []),
    ("some of the tokens of a cache are not", rising(400, from_6=-64, from_100=20, from_200=7), []),
    ("no cache again, and one position", rising(400, from_6=-64, from_300=64, at_350=-1), [350]),
    ("only the first have a cache", rising(400, from_1=-64, from_6=64), []),
    ("few have none", rising(60, from_1=-64, at_20=64, at_30=64), []),
    ("a cache of blocks that grow", [BASE + t - 128 * (t // 128) for t in range(700)], []),
    ("a cache of small blocks that grow", [BASE + t - 64 * (t // 64) for t in range(700)], []),
    ("one position alone", [BASE], []),
]


@pytest.mark.parametrize(("counts", "expected"), [rule[1:] for rule in RULES], ids=[rule[0] for rule in RULES])
def test_positions_whose_count_does_not_rise_by_one_are_convicted(
    counts: Sequence[int | None], expected: list[int]
) -> None:
    assert marked(counts) == [expected]


def test_it_says_what_was_counted_and_what_was_to_be_expected() -> None:
    asked = response(["a", "b", " \n", "c", "d"])
    failure = without_retokenised([asked], [answers(asked, rising(5, at_3=-1))]).results[0][3]
    assert isinstance(failure, ScoreFailure)
    assert f"counted {BASE + 2} tokens before this position, where {BASE + 3} belong" in failure.message
    assert "it trims white space" in failure.message
    assert "\n" not in failure.message


def test_counts_that_say_nothing_are_numbered() -> None:
    asked = response(words(40))
    assert without_retokenised([asked], [answers(asked, rising(40, at_9=-128, at_30=64))]).n_odd == 1


def odd(responses: Sequence[Response], results: Sequence[Results]) -> int:
    return without_retokenised(responses, results).n_odd


def test_a_shortfall_stays_without_a_verdict_until_it_ends() -> None:
    asked = response(words(400))
    for counts, expected in (
        (rising(400, from_6=-64), 394),
        (rising(400, from_6=-64, from_300=64), 294),
        (rising(400, from_1=-64, from_6=64), 394),
    ):
        assert odd([asked], [answers(asked, counts)]) == expected


@pytest.mark.parametrize("step", [1, 7, 50, 130])
@pytest.mark.parametrize("size", [64, 128])
def test_a_cache_is_none_of_tokenising_at_any_distance_of_the_positions(step: int, size: int) -> None:
    assert marked(rising(500, from_140=-size), rising(500), asked=range(1, 500, step)) == [[], []]


def test_a_long_run_of_white_space_that_is_trimmed_is_no_cache() -> None:
    other = response(words(150, "other"), 1)
    for token, expected in (("\n", [130]), ("-", [])):
        asked = response([*words(100), *[token] * 30, *words(20, "end")])
        found = [answers(asked, rising(150, at_130=-30), [130]), answers(other, rising(150))]
        assert replaced([asked, other], found) == [expected, []]


UNDECIDED: list[tuple[str, list[list[int]], Sequence[int]]] = [
    ("two responses that contradict each other", [rising(9, from_1=-1), rising(9, from_1=0)], range(1, 9)),
    ("one position of each", [rising(9, at_4=-1), rising(9)], [4]),
    ("two positions, the first wrong", [rising(20, at_5=-1)], [5, 9]),
    ("two positions, the second wrong", [rising(20, at_9=-1)], [5, 9]),
    ("three positions, the first wrong", [rising(20, at_5=1)], [5, 9, 15]),
]


@pytest.mark.parametrize(("counts", "asked"), [case[1:] for case in UNDECIDED], ids=[case[0] for case in UNDECIDED])
def test_where_nothing_decides_none_is_marked_in_any_order(counts: list[list[int]], asked: Sequence[int]) -> None:
    responses = [response(words(len(of), f"r{index}w"), index) for index, of in enumerate(counts)]
    results = [answers(item, of, asked) for item, of in zip(responses, counts, strict=True)]
    for order in (slice(None), slice(None, None, -1)):
        assert replaced(responses[order], results[order]) == [[]] * len(counts)
        assert odd(responses[order], results[order]) == len(asked) * len(counts)
        assert CountEvidence.of(responses[order], results[order]).n_judged == 0


def test_the_first_position_has_no_vote_but_decides_where_nothing_else_does() -> None:
    assert marked(rising(9, from_1=3, at_5=-3), asked=[0, 3, 5, 7, 8]) == [[5]]
    assert marked(rising(9, at_5=-1), asked=[0, 3, 5]) == [[5]]
    assert marked(rising(9, from_1=3, at_5=-3), asked=[0, 3, 5]) == [[]]


def test_versions_of_the_model_are_not_compared() -> None:
    asked = response(words(40))
    first, later = answers(asked, rising(40)), answers(asked, rising(40, from_0=1, at_30=-1), version="2")
    mixed = [new if t % 7 == 2 else old for t, (old, new) in enumerate(zip(first, later, strict=True))]
    assert replaced([asked], [mixed]) == [[30]]
    assert CountEvidence.of([asked], [mixed]) == CountEvidence(37, 35, 39, 38)


def test_prefixes_that_end_in_white_space_have_no_vote() -> None:
    asked = response(["\n", "\n", "\n", "\n", "\n", "a", "b", "c"])
    counts = [BASE, BASE, BASE, BASE, BASE, BASE, BASE + 6, BASE + 7]  # all trimmed until a word comes
    assert replaced([asked], [answers(asked, counts)]) == [[1, 2, 3, 4, 5]]
    assert CountEvidence.of([asked], [answers(asked, counts)]) == CountEvidence(1, 1, 2, 2)


def test_responses_of_a_prompt_decide_together_and_share_what_is_equal() -> None:
    """The second and third begin alike, with a token that the service cuts in two from there on."""
    usual = [rising(12, from_1=2) for _ in range(2)]
    split = rising(12, from_1=3)
    responses = [response(words(12, "a")), response(words(12, "b"), 1)]
    responses += [response(["<ctrl>", *words(11, "c")], 2), response(["<ctrl>", *words(11, "d")], 3)]
    results = [answers(item, counts) for item, counts in zip(responses, [*usual, split, split], strict=True)]
    assert replaced(responses, results) == [[], [], list(range(1, 12)), list(range(1, 12))]


@pytest.mark.parametrize("asked", [(3, 9, 15), (9, 12, 19), (5, 9), (0, 9)])
def test_a_sample_of_the_positions_is_judged_by_their_distance(asked: tuple[int, ...]) -> None:
    assert marked(rising(20, at_9=-1), rising(20), asked=asked) == [[9], []]


def test_one_position_of_each_response() -> None:
    asked = [response(words(20, name), index) for index, name in enumerate("abc")]
    counts = [rising(20), rising(20, at_9=-1), rising(20)]
    results = [answers(item, of, [t]) for item, of, t in zip(asked, counts, (4, 9, 15), strict=True)]
    assert replaced(asked, results) == [[], [9], []]
    assert CountEvidence.of(asked, results).n_steps == 2


USABLE: list[tuple[str, Sequence[int | None], bool]] = [
    ("counts of tokens", rising(20), True),
    ("some jump", rising(40, at_5=-1, at_15=-1, from_25=-1), True),
    ("never rises", [BASE] * 20, False),
    ("rises by two", list(range(BASE, BASE + 40, 2)), False),
    ("one in ten tokens is two", [BASE + t + t // 10 for t in range(300)], False),
    ("and one in thirty", [BASE + t + (t + 20) // 30 for t in range(300)], False),
    ("tokens of a cache are left out at most", rising(300, from_6=-64), True),
    ("characters", [BASE + 4 * t + t % 3 for t in range(20)], False),
    ("absent", [None] * 20, False),
]


@pytest.mark.parametrize(("counts", "expected"), [case[1:] for case in USABLE], ids=[case[0] for case in USABLE])
def test_counts_that_do_not_follow_the_tokens_are_not_used(counts: Sequence[int | None], expected: bool) -> None:
    asked = response(words(len(counts)))
    evidence = CountEvidence.of([asked], [answers(asked, counts)])
    assert evidence.usable is expected
    assert astuple(CountEvidence.total([evidence, evidence])) == tuple(2 * count for count in astuple(evidence))


def test_failures_and_positions_not_asked_stay_as_they_are() -> None:
    asked = response(words(6))
    found = answers(asked, rising(6, at_4=-1))
    found[1], found[2] = ScoreFailure("k", "blocked", "no."), None
    assert replaced([asked], [found]) == [[4]]


COUNTS = st.lists(st.sampled_from([0, 0, 0, 0, 0, 1, None]), min_size=6, max_size=6)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(COUNTS, st.sampled_from(["v1", "v1", "v2"])), min_size=1, max_size=3), st.booleans())
def test_counts_that_agree_are_judged_as_one_by_one(sequences, spaces) -> None:
    texts = [" a", " ", "", "b\n", "c"] if spaces else ["a", "b", "c", "d", "e"]
    responses = [response([f"{index}", *texts], index) for index in range(len(sequences))]
    results: list[Results] = []
    for of, (changes, version) in zip(responses, sequences, strict=True):
        counts = [None if change is None else BASE + t + change for t, change in enumerate(changes)]
        results.append(answers(of, counts, [t for t, count in enumerate(counts) if count is not None], version))
    groups = list(context_counts._groups(responses, results))
    assert CountEvidence.of(responses, results) == CountEvidence.total(map(CountEvidence._of_group, groups))
    if not context_counts._counts_agree(results):
        return
    assert without_retokenised(responses, results).n_odd == 0
    for group in groups:
        base = context_counts._base(group)
        judged = [] if base is None else [verdict for _, verdict in context_counts._judged(group, base)]
        assert judged == ["right"] * sum(item.position > 0 for sequence in group for item in sequence)
