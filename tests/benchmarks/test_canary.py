"""The benchmark of the canary has a rate for every kind of noise and change."""

from __future__ import annotations

from benchmarks.canary import CHANGES, NOISES
from tests.benchmarks.scripts import printed


def test_every_noise_has_its_rates() -> None:
    head, _, *lines = printed("canary", "--runs", "2", "--contexts", "5")
    assert head.startswith("| noise | earlier runs | unchanged |")
    assert [line.split(" | ")[0].strip("| ") for line in lines] == [name for name in NOISES for _ in range(2)]
    assert all(line.count(" %") == len(CHANGES) for line in lines)
