"""A canary end to end: each first position is bought so many times, and another model is an event."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import polars as pl

from flows.watch.events import DRIFT
from flows.watch.history import read_history, record_row
from tests.programs import Run
from tests.vertex_world.fixtures import make_vertex_world, vertex_world
from tests.vertex_world.world import VertexWorld

__all__ = ["make_vertex_world", "vertex_world"]

P, Q = "gemini-2.5-flash-lite", "gemini-2.5-flash"
PROMPTS = [f"What is known of the number {number}?" for number in range(8)]
CANARY = json.dumps({"first": True, "repeats": 3})
ALERT = json.dumps({"of": "q", "test": "permutation", "compared_with": "previous", "kl_per_token": 0})


def test_first_positions_are_bought_three_times_and_another_model_is_an_event(
    run_program: Run, vertex_world: VertexWorld, tmp_path: Path
):
    vertex_world.write_responses(tmp_path / "in", P, PROMPTS, n=1, max_tokens=20, seed=3)
    history = tmp_path / "results" / "history.parquet"
    flags = ("--input-dir", tmp_path / "in", "--output-dir", tmp_path / "results/{flow_run_name}", "--model2", Q)
    settings = ("--backend", "vertex_online", "--set", f"positions={CANARY}", "--set", f"alert={ALERT}")

    done = run_program("flows.run", *flags, *settings, env=vertex_world.environment())
    assert done.code == 0, done.err
    assert "8 positions, 24 contexts, 0 of them on disk, 24 to ask" in done.err
    assert "every figure is of the first position of each response alone" in done.out
    first = read_history(history).row(-1, named=True)
    assert (first["drift"], first["first_repeats"], first["measured"]) == ("undecided", 3, 8)
    lists = pl.read_parquet(Path(first["output_dir"], "first_lists.parquet"))
    assert (lists.height, lists["key"].n_unique(), lists["logprobs"].null_count()) == (24, 8, 0)

    rng = np.random.default_rng(1)
    for number in range(5):  # other days, of which each list is a little off
        folder = Path(shutil.copytree(first["output_dir"], tmp_path / "results" / f"day {number}"))
        off = pl.Series([rng.normal(0, 0.01, 20).tolist()[: len(row)] for row in lists["logprobs"]])
        lists.with_columns(pl.col("logprobs") + off).write_parquet(folder / "first_lists.parquet")
        record_row(history, first | {"run_id": f"day {number}", "output_dir": str(folder)})
    vertex_world.language_model.noise[Q] = 0.9
    done = run_program("flows.run", *flags, *settings, "--fail-on-drift", env=vertex_world.environment())
    assert done.code == 4, done.err
    row = read_history(history).row(-1, named=True)
    assert (row["drift"], row["events"], row["drift_of"]) == ("drift", [DRIFT], "q")
    assert row["canary_distance"] > row["canary_limit"] > 0
    assert row["canary_p"] <= 0.01
    assert json.loads(Path(row["output_dir"], "run.json").read_text())["drift"]["first_positions"]["n_earlier"] == 6
