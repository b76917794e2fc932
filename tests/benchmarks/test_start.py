"""The benchmark of starting runs and prints its table; its times are for people to read."""

from __future__ import annotations

import re

from tests.benchmarks.scripts import printed


def waits(*what: str) -> list[tuple[str, str]]:
    head, _, *lines = printed("start", "--repeats", "1", "--what", *what)
    assert head == "| what | until | wall, s | processor, s |"
    assert all(re.search(r"\| \d+\.\d\d \| (-|\d+\.\d\d) \|$", line) for line in lines)
    return [(line.split("|")[1].strip(), line.split("|")[2].strip()) for line in lines]


def test_the_help_has_its_time() -> None:
    assert waits("import", "help") == [("import", "end"), ("help", "end")]
