"""Both lists of many positions at once are what they are one by one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kl.estimators.token_bytes import byte_functions
from kl.output.report.lists import both_lists
from kl.output.report.visible import visible
from kl.records import END_TOKENS, Candidate

Entry = tuple[str, int | None, float, bytes | None]
ENTRY = st.tuples(
    st.sampled_from(["a", " the", "Ġthe", "é", "", "\ufffd", "\n", "<0xE2>", "</s>", "<eos>", "x" * 300]),
    st.sampled_from([None, 1, 2, 3, 2**62, -(2**62)]),
    st.sampled_from([-0.5, -1.0, -2.0]),
    st.sampled_from([None, None, b"a", b"\xe2"]),
)
ENDS = {token.encode() for token in END_TOKENS}


class Lists(NamedTuple):
    """Both lists of a position, the last ``n_wanted`` of Q asked for by name, and what tokens are matched by."""

    p: list[Entry]
    q: list[Entry]
    by: str
    n_wanted: int


POSITIONS = st.lists(
    st.builds(
        Lists,
        st.lists(ENTRY, max_size=6),
        st.lists(ENTRY, max_size=6),
        st.sampled_from(["id", "bytes", "text"]),
        st.integers(0, 2),
    ),
    max_size=4,
)


@settings(max_examples=300, deadline=None)
@given(POSITIONS)
def test_lists_are_those_of_one_position_at_a_time(positions: list[Lists]):
    found = both_lists(frame_of(positions), pl.Series([lists.by for lists in positions], dtype=pl.String))
    readers = byte_functions(*([_read_by(lists, side) for lists in positions if lists.by != "id"] for side in (0, 1)))
    expected = [(row, *token) for row, lists in enumerate(positions) for token in tokens_of(lists, readers)]
    assert found.select("row", "shown", "id_p", "id_q").rows() == [token[:4] for token in expected]
    for of_side, name in enumerate(("logprob_p", "logprob_q"), start=4):
        assert found[name].to_list() == [pytest.approx(token[of_side], abs=1e-12) for token in expected]


def frame_of(positions: Sequence[Lists]) -> pl.DataFrame:
    """The rows of the candidate table."""
    names = (("tokens", pl.String), ("token_ids", pl.Int64), ("logprobs", pl.Float64), ("bytes", pl.Binary))
    columns = {
        f"{side}_{name}": pl.Series(
            [[entry[at] for entry in lists[number]] for lists in positions], dtype=pl.List(kind)
        )
        for number, side in enumerate("pq")
        for at, (name, kind) in enumerate(names)
    }
    wanted = pl.Series([min(lists.n_wanted, len(lists.q)) for lists in positions], dtype=pl.Int32)
    return pl.DataFrame(columns | {"n_wanted_q": wanted}).with_row_index("row")


def _read_by(lists: Lists, side: int) -> list[Candidate]:
    return [_candidate(entry, lists.by) for entry in lists[side]]


def _candidate(entry: Entry, by: str) -> Candidate:
    stated = entry[0].encode() if by == "bytes" and entry[3] is None else entry[3]
    return Candidate(entry[0], None, None, stated)


def tokens_of(lists: Lists, readers: Sequence[Callable[[Candidate], bytes | None]]) -> list[tuple]:
    """``shown, id_p, id_q, logprob_p, logprob_q`` of each token, slowly."""
    keys = [
        [_key(entry, lists.by, side, place, readers[side]) for place, entry in enumerate(lists[side])]
        for side in (0, 1)
    ]
    best = lists.q[: max(len(lists.q) - lists.n_wanted, 0)]
    ends = [{key for key in keys[0] if key[1] in ENDS}, {key for key in keys[1][: len(best)] if key[1] in ENDS}]
    if lists.by == "text" and ends[0] and ends[1] and not ends[0] & ends[1]:
        keys = [[("end",) if key[1] in ENDS else key for key in of_side] for of_side in keys]
    found: dict[tuple, tuple[list[Entry], list[Entry]]] = {}
    for side in (0, 1):
        for key, entry in zip(keys[side], lists[side], strict=True):
            of_side = found.setdefault(key, ([], []))[side]
            if entry[1] is None or all(entry[1:3] != other[1:3] for other in of_side):
                of_side.append(entry)
    return [
        (visible(*_candidate((p + q)[0], lists.by)[::3]), *_ids(p, q), _mass(p), _mass(q)) for p, q in found.values()
    ]


def _ids(*sides: Sequence[Entry]) -> list[int | None]:
    return [entries[0][1] if entries else None for entries in sides]


def _key(entry: Entry, by: str, side: int, place: int, read: Callable[[Candidate], bytes | None]) -> tuple:
    if by == "id" and entry[1] is not None:
        return ("id", entry[1])
    own = read(_candidate(entry, by))
    return ("entry", None, side, place) if own is None else ("bytes", own)


def _mass(entries: Sequence[Entry]) -> float | None:
    return math.log(sum(math.exp(entry[2]) for entry in entries)) if entries else None
