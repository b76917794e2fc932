"""The benchmark of exact pairs on a device runs and prints its table; its figures are for people to read."""

from __future__ import annotations

import importlib.util
import re

import pytest

from tests.benchmarks.scripts import printed


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="needs torch")
def test_every_part_has_its_time() -> None:
    _, _, head, _, line = printed("device_pairs", "--shapes", "tiny", "--repeats", "1")
    assert head.startswith("| shape | tokens | two bodies, ms |")
    assert re.fullmatch(r"\| tiny \| 64( \| -?[\d.,]+%?){6} \|", line)
