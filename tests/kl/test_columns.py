from __future__ import annotations

import pickle

import numpy as np
import pytest

from kl.columns import Entries, Positions, TopLists
from kl.records import Candidate, Defect, Position

LISTS: list[tuple[Candidate, ...]] = [
    (Candidate(" a", -0.5, 7), Candidate("", -1.0, None, b"\xe2"), Candidate(" b", -2.0)),
    (),
    (Candidate(" a", -0.25),),
]
POSITIONS = (
    Position(Candidate(" a", -0.5, 7), LISTS[0], 2),
    Position(Candidate("\ufffd", None), (), defect=Defect("bad", "a line"), may_lack=True),
    Position(Candidate("", -0.25, 0, b""), LISTS[2]),
)


def test_lists_come_back_as_they_were() -> None:
    lists = TopLists.of(LISTS)
    assert list(lists) == LISTS
    assert lists[-1] == LISTS[-1]
    assert lists[1:] == tuple(LISTS[1:])
    assert list(pickle.loads(pickle.dumps(lists))) == LISTS
    assert list(TopLists.joined([lists, lists])) == LISTS * 2
    assert list(lists.take(np.array([2, 0]))) == [LISTS[2], LISTS[0]]
    assert list(lists.kept(lists.entries.logprobs > -2.0)) == [LISTS[0][:2], (), LISTS[2]]
    assert lists.last().tolist()[::2] == [-2.0, -0.25]
    assert np.isnan(lists.last()[1])


def test_rows_are_padded_to_the_longest() -> None:
    lists = TopLists.of(LISTS)
    padded = lists.padded(lists.entries.logprobs, -np.inf)
    assert padded.tolist() == [[-0.5, -1.0, -2.0], [-np.inf] * 3, [-0.25, -np.inf, -np.inf]]


def test_one_text_has_one_code() -> None:
    codes = TopLists.of(LISTS).entries.codes()
    assert codes[0] == codes[3]
    assert len(set(codes.tolist())) == 3
    assert Entries.of([None]).codes().tolist() == [-1]
    assert Entries.of([None, LISTS[0][0]]).candidates() == [None, LISTS[0][0]]


def test_positions_come_back_as_they_were() -> None:
    positions = Positions.of(POSITIONS)
    assert tuple(positions) == POSITIONS
    assert positions == POSITIONS
    assert positions[1:] == POSITIONS[1:]
    assert positions != POSITIONS[:2]
    assert Positions.of(positions) is positions
    with pytest.raises(IndexError):
        positions[3]


def test_no_entry_is_a_list_too() -> None:
    assert list(TopLists.of([])) == []
    assert list(TopLists.joined([])) == []
    assert TopLists.of([()]).padded(np.zeros(0), 0.0).tolist() == [[0.0]]


def test_an_id_that_has_no_place_is_refused() -> None:
    with pytest.raises(OverflowError):
        Entries.of([Candidate("a", -1.0, 2**63)])


def test_half_a_character_is_no_text() -> None:
    lists = TopLists.of([(Candidate("\ud83d", -0.5), Candidate(" a", -1.0))])
    assert list(lists) == [(Candidate("\ufffd", -0.5), Candidate(" a", -1.0))]
