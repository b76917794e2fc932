"""The benchmark of a whole run measures all positions and prints its table; its figures are for people to read."""

from __future__ import annotations

import re

import pytest

from tests.benchmarks.scripts import printed


@pytest.mark.parametrize("prompts", [[], ["--one-prompt"]])
def test_every_size_has_its_figures(prompts: list[str]) -> None:
    head, _, *lines = printed("whole_run", "--positions", "60", "120", "--length", "6", "--repeats", "1", *prompts)
    assert head.startswith("| positions | positions/s | of processor time | time a position, × | peak MB | × | plan |")
    assert [line.split("|")[1].strip() for line in lines] == ["60", "120"]
    figures = r"\| \d+ \| [\d,]+ \| [\d,]+ \| \d+\.\d\d \| \d+ \| \d+\.\d\d( \| \d+\.\d µs){3} \|"
    assert all(re.fullmatch(figures, line) for line in lines)


def test_a_profile_says_where_the_time_goes() -> None:
    lines = printed("whole_run", "--positions", "60", "--length", "6", "--profile")
    assert any("function calls" in line for line in lines)
    assert any("Ordered by: internal time" in line for line in lines)
