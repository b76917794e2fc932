"""What a request is, and what is left of it."""

from __future__ import annotations

from backends.base import ScoreRequest
from kl.records import Prompt, Turn


def test_a_request_for_some_keys_asks_each_once_in_the_order_of_positions() -> None:
    keys = ("a", "b", "b", "c", "a")
    asked = ScoreRequest(
        "n", "m", Prompt((Turn("user", "?"),)), "wxyz", (0, 1, 1, 2, 0), None, (0, 1, 2, 3, 4), keys, 5
    )
    left = asked.only({"a", "b", "elsewhere"})
    assert (left.positions, left.keys) == ((0, 1), ("a", "b"))
    assert list(left.contexts()) == [(0, "a", ""), (1, "b", "w")]
    assert asked.only(()).keys == ()
