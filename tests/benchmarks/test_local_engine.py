"""The benchmark of the local engine runs and prints its table; its figures are for people to read."""

from __future__ import annotations

import re

from tests.benchmarks.scripts import printed


def test_a_number_of_threads_has_its_figures() -> None:
    options = ("--responses", "1", "--tokens", "4", "--repeats", "1", "--threads", "1")
    *_, head, _, line = printed("local_engine", *options)
    assert head == "| threads | positions a second | of the peak of matrix products | exact pairs a second |"
    assert re.fullmatch(r"\| 1 \| [\d,]+ \| \d+% \| [\d,]+ \|", line)
