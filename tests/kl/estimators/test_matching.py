"""Many responses at once are matched as each is by itself, and as the rules say for one position after the other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kl.columns import Entries, TopLists
from kl.estimators.align import Aligned, align
from kl.estimators.bounds import cells, lower_bounds
from kl.records import Candidate
from tests.kl.estimators.slow_matching import SlowMatch

PLAIN = [" the", " a", " cat", "at", "s", " é", "\n", " "]
OTHERS = ["的", " 的", "é", "a▁b", "Ċ", "<é>", " \x1c"]
PARTS = ["", "\ufffd", "<0xE2>", "<0xF0>", "bytes:\\xe2\\x82", "\\xe2", "token_id:7", "▁the", "Ġthe"]
ENDS = ["<|im_end|>", "</s>", "<eos>"]
STATED = {
    "": [b"", b"\xe2", b"\xf0\x9f"],
    "\ufffd": [b"\xe2\x82", b"\xef\xbf\xbd"],
    " é": [" é".encode()],
    "at": [b"at"],
    "▁the": [b" the"],
    "Ġthe": [b" the", b"\xe2"],
    "é": [b"\xe9", "é".encode()],
}


class Drawn(NamedTuple):
    lists_p: list[tuple[Candidate, ...]]
    lists_q: list[tuple[Candidate, ...]]
    sampled_p: list[Candidate | None]
    sampled_q: list[Candidate | None]
    stops: list[bool]


@st.composite
def responses(draw: st.DrawFn) -> Drawn:
    """A response of one way of writing tokens a side, with oddities of its own."""
    plain = draw(st.sampled_from([PLAIN, ["at", "s", "\n", " "]]))
    texts = [*plain, *draw(st.lists(st.sampled_from([*OTHERS, *PARTS, *ENDS]), max_size=5))]
    ids = {text: number for number, text in enumerate(dict.fromkeys(texts))}
    some_ids, collide = draw(st.sampled_from(["all", "some", "none"])), draw(st.booleans())
    stating = draw(st.sampled_from(["always", "sometimes", "never"]))
    n, most = draw(st.integers(1, 6)), draw(st.sampled_from([1, 4, 8]))

    def candidate(logprob: float | None) -> Candidate:
        text = draw(st.sampled_from(texts))
        number: int | None = ids[text] + (draw(st.sampled_from([0, 0, 0, 100])) if collide else 0)
        if some_ids == "none" or (some_ids == "some" and draw(st.booleans())):
            number = None
        stated = None
        if stating == "always" or (stating == "sometimes" and draw(st.booleans())):
            stated = draw(st.sampled_from(STATED.get(text, [text.encode()])))
        return Candidate(text, logprob, number, stated)

    def top() -> tuple[Candidate, ...]:
        values = draw(st.lists(st.integers(-40, -25), min_size=1, max_size=most))
        return tuple(candidate(value / 10) for value in sorted(values, reverse=True))

    def sampled(top: Sequence[Candidate]) -> Candidate | None:
        kind = draw(st.sampled_from(["listed", "other", "none"]))
        own = draw(st.sampled_from([None, -1.5, -9999.0]))
        return draw(st.sampled_from(top)) if kind == "listed" else candidate(own) if kind == "other" else None

    lists_p, lists_q = [top() for _ in range(n)], [top() for _ in range(n)]
    return Drawn(
        lists_p, lists_q, [*map(sampled, lists_p)], [*map(sampled, lists_q)], [*[False] * (n - 1), draw(st.booleans())]
    )


def rows_of(aligned: Aligned, name: str) -> list[Any]:
    """A field row by row, without padding."""
    values = getattr(aligned, name)
    if values.ndim == 1:
        return values.tolist()
    width = {"index_q": "logp", "index_p": "logq"}.get(name, name)
    return [row[known].tolist() for row, known in zip(values, np.isfinite(getattr(aligned, width)), strict=True)]


def check(aligned: Aligned, drawn: Sequence[Drawn]) -> None:
    slow = [SlowMatch(*item) for item in drawn]
    assert aligned.choices == tuple(item.choice for item in slow)
    for name in slow[0].columns():
        assert rows_of(aligned, name) == [row for item in slow for row in item.columns()[name]], name
    for name in slow[0].floats():
        np.testing.assert_allclose(
            getattr(aligned, name), np.concatenate([item.floats()[name] for item in slow]), rtol=1e-14, err_msg=name
        )
    for side, steps in ((0, aligned.step_p), (1, aligned.step_q)):
        assert steps.tolist() == [item.steps[side] for item in slow for _ in item.rows]
    for side, keys in ((0, aligned.keys_p), (1, aligned.keys_q)):
        assert keys == frozenset[Any]().union(*(item.keys()[side] for item in slow))


def aligned_of(drawn: Sequence[Drawn]) -> Aligned:
    columns = [[part for item in drawn for part in item[field]] for field in range(5)]
    lengths = [len(item.lists_p) for item in drawn]
    return align(
        TopLists.of(columns[0]),
        TopLists.of(columns[1]),
        Entries.of(columns[2]),
        Entries.of(columns[3]),
        columns[4],
        np.repeat(np.arange(len(drawn)), lengths),
    )


@settings(max_examples=150)
@given(st.lists(responses(), min_size=1, max_size=4))
def test_many_responses_are_matched_as_the_rules_say(drawn: list[Drawn]) -> None:
    check(aligned_of(drawn), drawn)


def listed(*texts: str, ids: bool = False) -> tuple[Candidate, ...]:
    return tuple(Candidate(text, -1.5 - rank, rank if ids else None) for rank, text in enumerate(texts))


@pytest.mark.parametrize("escape", ["<0xE2>", "bytes:\\xe2"])
def test_a_sampled_escape_that_no_list_has_is_read(escape: str) -> None:
    drawn = Drawn([listed(" a", " b")], [listed(" b", " c")], [Candidate(escape, -3.0)], [None], [False])
    check(aligned_of([drawn]), [drawn])


@pytest.mark.parametrize("piece", ["Ġthe", "▁the"])
def test_a_piece_says_how_its_side_writes_though_it_states_its_bytes(piece: str) -> None:
    p = (Candidate(piece, -1.5, None, b" the"), Candidate("Ãī", -2.5), Candidate("a▁", -3.0))
    q = (Candidate(" the", -1.5), Candidate("É", -2.5), Candidate("a ", -3.0))
    drawn = Drawn([p], [q], [p[0]], [None], [False])
    check(aligned_of([drawn]), [drawn])


def test_a_pair_of_ids_counts_where_both_sides_say_their_text() -> None:
    p = (Candidate(" a", -1.5, 0), Candidate(" é", -2.5, 1))
    q = (Candidate(" a", -1.5, 0), Candidate("\ufffd", -2.5, 1))
    drawn = Drawn([p], [q], [p[0]], [None], [False])
    check(aligned_of([drawn]), [drawn])


@pytest.mark.parametrize("k", [63, 65, 130])
def test_long_lists_are_matched_the_same(k: int) -> None:
    rng = np.random.default_rng(k)
    texts = np.array([f" w{number}" for number in range(3 * k)])
    lists = [
        tuple(Candidate(str(text), -5.0 - rank, None) for rank, text in enumerate(rng.permutation(texts)[:k]))
        for _ in range(6)
    ]
    drawn = [Drawn(lists[:3], lists[3:], [lists[0][0]] * 3, [None] * 3, [False] * 3)]
    check(aligned_of(drawn), drawn)


def test_a_text_that_the_sampled_token_shares_with_a_listed_one_names_neither() -> None:
    """Q was asked for the sampled token by name, and does not say the listed one of the same text."""
    names = [" tok0", " tok1", " tok3", " tok3", "", "", " tok6"]
    p = np.array([0.168, 0.119, 0.113, 0.186, 0.135, 0.173, 0.106])
    q = np.array([0.183, 0.111, 0.114, 0.178, 0.134, 0.185, 0.095])

    def entries(law: np.ndarray, *numbers: int) -> tuple[Candidate, ...]:
        return tuple(Candidate(names[i], math.log(law[i]), 10 + i) for i in numbers)

    (sampled,) = entries(p, 2)
    found = align([entries(p, 3, 5, 0, 4, 1)], [entries(q, 5, 0)], [sampled], wanted_q=[entries(q, 4, 2, 1)])
    assert found.choices[0].key == "text"
    assert lower_bounds(cells(found)).kl[0] <= (p * np.log(p / q)).sum()
