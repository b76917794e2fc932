"""When the lists on disk cannot say whether Q has changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flows.config.alert import AlertConfig
from flows.config.comparison import Comparison
from flows.config.models import BackendChoice, PositionsConfig, RunConfig
from flows.config.templates import RunValues
from flows.folder.layout import OutputFolder
from flows.watch.ending import DriftContext, then_against_now
from flows.watch.reference import Reference
from flows.watch.verdict import Verdict
from kl.finished.between import QLists, kl_between
from tests.kl.finished.test_between import run_of

ALERT = AlertConfig(kl_per_token=0.0, of="q", compared_with="previous")
THEN, NOW = run_of(0.5, 0.9), run_of(0.8, 0.6)
SAME = run_of(0.5, 0.9)


def write(folder: Path, run: QLists) -> Path:
    folder.mkdir()
    run.tokens.sink_parquet(OutputFolder(folder).tokens)
    run.candidates.sink_parquet(OutputFolder(folder).candidates)
    return folder


def verdict(folder: Path, now: QLists, on_disk: int, *, rolling: bool = False, **settings: Any) -> Verdict:
    choice = BackendChoice(name="local")
    out = write(folder / "now", now)
    config = RunConfig(input_dir=folder, output_dir=out, model2="smollm2-135m", backend=choice, alert=ALERT, **settings)
    context = DriftContext(Comparison.of(config, RunValues.of_a_dry_run()), rolling, (), None, None)
    reference = Reference("previous", str(folder / "then"), kl_between(THEN, THEN).responses)
    return then_against_now(context, ALERT, reference, {"contexts": 12, "contexts_on_disk": on_disk}, None)


@pytest.mark.parametrize(
    ("now", "on_disk", "settings", "decision"),
    [
        pytest.param(SAME, 0, {}, "no drift", id="all asked"),
        pytest.param(SAME, 6, {}, "no drift", id="half asked"),
        pytest.param(SAME, 11, {}, "undecided", id="one new context"),
        pytest.param(SAME, 12, {}, "undecided", id="nothing asked"),
        pytest.param(SAME, 12, {"rolling": True}, "no drift", id="gone on with in a folder of its own"),
        pytest.param(NOW, 12, {}, "drift", id="what changed all the same"),
    ],
)
def test_answers_of_an_earlier_day_are_no_proof_that_nothing_changed(
    tmp_path: Path, now: QLists, on_disk: int, settings: dict[str, Any], decision: str
) -> None:
    write(tmp_path / "then", THEN)
    found = verdict(tmp_path, now, on_disk, **settings)
    assert found.decision == decision
    if decision == "undecided":
        assert f"{on_disk} of 12 answers were on disk before this run" in found.message


def test_a_floor_that_was_asked_for_and_is_not_there_decides_nothing(tmp_path: Path) -> None:
    write(tmp_path / "then", THEN)
    found = verdict(tmp_path, NOW, 0, noise_floor=PositionsConfig(fraction=0.5))
    assert found.message == "undecided: the noise floor of Q was asked for and none was measured"


def test_a_damaged_file_of_the_earlier_run_leaves_it_undecided(tmp_path: Path) -> None:
    path = OutputFolder(write(tmp_path / "then", run_of(*[0.1 + 0.001 * t for t in range(400)]))).candidates
    data = bytearray(path.read_bytes())
    data[10 : len(data) // 2] = bytes(byte ^ 0x5A for byte in data[10 : len(data) // 2])
    path.write_bytes(data)
    found = verdict(tmp_path, NOW, 0)
    assert found.decision == "undecided"
    assert f"the lists in {tmp_path / 'then'}" in found.message
