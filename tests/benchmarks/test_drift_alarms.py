"""The benchmark of the drift alerts: a share for every kind of noise; int8 weights are found by the alert of Q."""

from __future__ import annotations

from benchmarks.drift_alarms import CHANGED, NOISES
from tests.benchmarks.scripts import printed


def test_every_noise_has_its_rates() -> None:
    head, _, *lines = printed("drift_alarms", "--pairs", "1", "--prompts", "8", "--tokens", "4")
    assert head.endswith("| alert of pq | alert of q |")
    cells = [line.strip("| ").split(" | ") for line in lines]
    assert [row[0] for row in cells] == [
        *(f"unchanged, {name}" for name in NOISES),
        *(f"int8, {name}" for name in CHANGED),
    ]
    alert_of_q = {row[0]: row[-1] for row in cells}
    assert alert_of_q["int8, 0.005"].startswith("100.0")
