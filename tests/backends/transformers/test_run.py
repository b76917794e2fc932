"""Sample, run and analyse with two checkpoints, in one command."""

from __future__ import annotations

import json
from pathlib import Path

import polars as pl
import yaml

from tests.backends.transformers.checkpoints import tiny_model
from tests.programs import Run


def test_sampled_compared_and_analysed(run_program: Run, tiny: Path, tmp_path: Path) -> None:
    q = str(tiny_model(tmp_path / "q", seed=1))
    sections = {
        "sample": {"backend": "transformers", "model1": str(tiny), "prompts": ["Hello", "1, 2, 3"],
                   "output_dir": str(tmp_path / "responses"), "sampling": {"max_tokens": 5}},
        "run": {"backend": "transformers", "input_dir": str(tmp_path / "responses"), "model2": q,
                "top_logprobs": "full", "output_dir": str(tmp_path / "out"), "force": True,
                "noise_floor": {"fraction": 1.0}},
        "analyze": {},
    }  # fmt: skip
    (tmp_path / "pipeline.yaml").write_text(yaml.safe_dump(sections))
    done = run_program("flows.pipeline", "--config", tmp_path / "pipeline.yaml")
    assert done.code == 0, done.err
    tokens = pl.read_parquet(tmp_path / "out/tokens.parquet")
    assert 2 <= len(tokens) <= 12
    assert tokens["kl_exact"].null_count() == 0
    assert tokens["kl_exact"].min() > 0.01  # type: ignore[operator]
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert summary["model_q"] == q
