"""The baseline is the estimate that it is said to be, and its benchmark runs."""

from __future__ import annotations

import re

import numpy as np

from benchmarks.baseline import floor_of, plain
from benchmarks.token_rows import drawn_lists
from kl.estimators.align import align
from kl.estimators.divergence import floor
from tests.benchmarks.scripts import printed


def test_it_is_the_floor() -> None:
    lists_p, lists_q = drawn_lists(300, peaked=False)
    found = [floor_of(*tops) for tops in zip(plain(lists_p), plain(lists_q), strict=True)]
    np.testing.assert_allclose(found, floor(align(lists_p, lists_q)).kl, atol=1e-9)


def test_either_kind_of_lists_has_its_rate() -> None:
    head, _, flat, peaked = printed("baseline", "--positions", "50", "--repeats", "1")
    assert head == "| lists | positions/s |"
    assert re.fullmatch(r"\| flat \| [\d,]+ \|", flat)
    assert re.fullmatch(r"\| peaked \| [\d,]+ \|", peaked)
