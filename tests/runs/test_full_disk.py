"""A disk that fills up under a run: one line, everything that was paid for is kept, nothing is bought twice."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import polars as pl
import pytest

from tests.disks import Resize, small_disk
from tests.programs import Done, Run
from tests.vertex_world.fixtures import make_vertex_world
from tests.vertex_world.world import VertexWorld

__all__ = ["make_vertex_world", "small_disk"]

pytestmark = pytest.mark.slow

P, Q = "gemini-2.5-flash-lite", "gemini-2.5-flash"
RESERVE = 4_000_000
N_PROBES = 2  # the tiny requests of each run that asks, which prove the model usable


def test_a_disk_that_fills_up_costs_no_answer(
    make_vertex_world, run_program: Run, small_disk: tuple[Path, Resize], tmp_path: Path
) -> None:
    world: VertexWorld = make_vertex_world()
    world.faults.latency_s = 0.02
    (folder, resize), out = small_disk, small_disk[0] / "out"
    world.write_responses(tmp_path / "in", P, [f"Prompt {i}" for i in range(10)], n=1, max_tokens=25, seed=2)

    def run() -> Done:
        flags = ("--input-dir", tmp_path / "in", "--output-dir", out, "--model2", Q, "--backend", "vertex_online")
        return run_program("flows.run", *flags, "--max-concurrent", "20", env=world.environment())

    def refused(done: Done, *places: Path) -> None:
        assert done.code == 1, done.err
        assert "Traceback" not in done.out + done.err
        (said,) = [line for line in done.err.splitlines() if line.startswith("error: ")]
        assert any(said.startswith(f"error: {place} takes no more (No space left on device") for place in places)
        assert re.search(rf"; \d\.\d MB free\)\. What was bought is kept in {out / 'scores'}\. Make room; the", said)
        assert "Go on with: python -m flows.run --input-dir" in said

    resize(RESERVE // 2)  # there is no room to keep
    refused(run(), out / "scores")
    assert sum(world.rows_bought.values()) == len(world.rows_bought) == N_PROBES

    resize(RESERVE + 120_000)
    refused(run(), *(out / "scores").iterdir())  # a journal, or the part of a response that is complete
    n_bought = sum(world.rows_bought.values())
    stored = pl.read_parquet(out / "scores" / "*" / "*.parquet")
    assert len(stored) == n_bought - 2 * N_PROBES
    assert len(stored) > 20
    assert not (out / "scores" / ".reserve").exists()

    resize(50_000_000)
    done = run()
    assert done.code == 0, done.err
    assert sorted(world.rows_bought.values())[:-N_PROBES] == [1] * (len(world.rows_bought) - N_PROBES)
    tokens = (out / "tokens.parquet").read_bytes()

    free = shutil.disk_usage(folder).free
    (folder / "filler").write_bytes(b"x" * (free - 60_000))  # the results, which are written anew, do not fit
    done = run()
    refused(done, out if f"{out} takes" in done.err else out / ".parts" / "tokens")
    (folder / "filler").unlink()
    assert run().code == 0
    assert (out / "tokens.parquet").read_bytes() == tokens
    assert sum(world.rows_bought.values()) == len(world.rows_bought) + 2 * N_PROBES
