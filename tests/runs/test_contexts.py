"""Runs whose service sees other contexts than P's, or counts in its own way; projects named like an error."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from tests.programs import Done, Run
from tests.vertex_world.fixtures import make_vertex_world
from tests.vertex_world.language_model import SyntheticModel
from tests.vertex_world.world import VertexWorld

__all__ = ["make_vertex_world"]

P, Q = "gemini-2.5-flash-lite", "gemini-2.5-flash"
BACKENDS = ["vertex_batch", "vertex_online"]


@pytest.fixture
def world(make_vertex_world: Callable[..., VertexWorld], tmp_path: Path) -> VertexWorld:
    """A world of few tokens, a tenth of them white space, with three responses to each of two prompts."""
    made = make_vertex_world(language_model=SyntheticModel(vocabulary=150, noise={Q: 0.3}))
    made.write_responses(tmp_path / "in", P, ["Why?", "How?"], n=3, max_tokens=20, seed=5)
    return made


@pytest.fixture
def run(run_program: Run, tmp_path: Path) -> Callable[..., Done]:
    def over_the_responses(world: VertexWorld, backend: str, *arguments: object) -> Done:
        flags = ("--input-dir", tmp_path / "in", "--output-dir", tmp_path / "out", "--model2", Q, "--backend", backend)
        fast = ("--set", "backend.poll_interval_s=0.1") if backend == "vertex_batch" else ()
        return run_program("flows.run", *flags, *fast, *arguments, env=world.environment())

    return over_the_responses


def prefixes(folder: Path) -> pl.DataFrame:
    """Each position with the text before it."""
    rows: list[dict[str, Any]] = []
    for path in sorted((folder / "in").glob("*.json")):
        for index, response in enumerate(json.loads(path.read_text())["responses"]):
            tokens = [item["token"] for item in response["logprobs"]["content"]]
            rows += [
                {"source_file": path.name, "response_idx": index, "position": t, "prefix": "".join(tokens[:t])}
                for t in range(len(tokens))
            ]
    return pl.DataFrame(rows, schema_overrides={"response_idx": pl.Int32, "position": pl.Int32})


def tokens_of(folder: Path) -> pl.DataFrame:
    tokens = pl.read_parquet(folder / "out" / "tokens.parquet")
    return tokens.join(prefixes(folder), on=["source_file", "response_idx", "position"], how="left", validate="1:1")


def assert_bounds_hold(world: VertexWorld, folder: Path, tokens: pl.DataFrame) -> None:
    for row in tokens.filter(pl.col("reason").is_null()).iter_rows(named=True):
        prompt = json.loads((folder / "in" / row["source_file"]).read_text())["prompt"]
        assert row["kl_lower"] <= world.exact_kl(P, Q, prompt, row["prefix"]) + 1e-4


def warnings_of(folder: Path, done: Done) -> str:
    said = json.loads((folder / "out" / "summary.json").read_text())["warnings"]
    assert all(line[:40] in done.out for line in said)
    return done.out


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_service_that_trims_prefills_loses_the_positions_after_white_space(backend, run, world, tmp_path) -> None:
    world.faults.trims_prefill = True
    done = run(world, backend)
    assert done.code == 3, done.err
    assert "does not count the white space at the end of a prefill" in done.err
    tokens = tokens_of(tmp_path)
    trimmed = tokens["prefix"].map_elements(lambda text: text[-1:].isspace(), return_dtype=pl.Boolean)
    assert 3 < trimmed.sum() < tokens.height / 2
    assert tokens.filter(trimmed)["reason"].unique().to_list() == ["retokenised"]
    assert tokens.filter(trimmed)["kl_lower"].null_count() == trimmed.sum()
    assert tokens.filter(~trimmed)["reason"].null_count() == tokens.height - trimmed.sum()
    assert_bounds_hold(world, tmp_path, tokens)
    assert f"{trimmed.sum():,} of {tokens.height:,} positions were asked about another context" in warnings_of(
        tmp_path, done
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_service_that_merges_two_tokens_loses_all_positions_after_them(backend, run, world, tmp_path) -> None:
    responses = json.loads((tmp_path / "in" / "prompt_001.json").read_text())["responses"]
    content = max((response["logprobs"]["content"] for response in responses), key=len)
    merged = content[5]["token"] + content[6]["token"]
    world.faults.merges = (merged,)
    world.faults.turn_header = 3
    done = run(world, backend)
    assert done.code == 3, done.err
    tokens = tokens_of(tmp_path)
    after = tokens["prefix"].str.contains(merged, literal=True)
    assert 5 < after.sum() < tokens.height / 2
    assert tokens.filter(after)["reason"].unique().to_list() == ["retokenised"]
    assert tokens.filter(~after)["reason"].null_count() == tokens.height - after.sum()
    assert_bounds_hold(world, tmp_path, tokens)


COUNTS: list[tuple[str, dict[str, Any], str]] = [
    ("tokens of a cache are left out", {"counts": "uncached"}, "tokens decide nothing at"),
    ("a constant", {"counts": "constant"}, "they do not count P's tokens"),
    ("none, and lists that are padded", {"counts": "absent", "padded_lists": True, "turn_header": 4}, ""),
]


@pytest.mark.parametrize(("switches", "said"), [case[1:] for case in COUNTS], ids=[case[0] for case in COUNTS])
def test_counts_that_are_no_counts_take_nothing_away(switches, said, run, world, tmp_path) -> None:
    for name, value in switches.items():
        setattr(world.faults, name, value)
    done = run(world, "vertex_online")
    assert done.code == 0, done.err
    assert done.out.count("model 2's counts of the prompt's tokens") == (1 if said else 0)
    assert said in done.out
    tokens = tokens_of(tmp_path)
    assert tokens["kl_lower"].null_count() == 0
    run_json = json.loads((tmp_path / "out" / "run.json").read_text())["prompt_counts"]
    assert (run_json["n_odd"] > 0) == ("decide" in said)
    assert (2 * run_json["n_right"] > run_json["n_steps"]) == ("decide" in said)
    assert set(tokens["n_dropped"]) == {2 if "padded_lists" in switches else 0}
    assert_bounds_hold(world, tmp_path, tokens)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_project_of_that_name_has_no_daily_quota(backend, run, make_vertex_world, tmp_path) -> None:
    world = make_vertex_world(project="daily-evals")
    world.write_responses(tmp_path / "in", P, ["Why?"], n=1, max_tokens=20, seed=5)
    world.faults.names = "daily-evals"
    world.faults.row_error_rate = world.faults.failing_rate = 0.2
    world.faults.http = {"online": {"429": 0.2}, "create": {"429": 0.5}}
    few = ("--set", "backend.max_attempts=3") if backend == "vertex_batch" else ()
    done = run(world, backend, "--no-preflight", *few)
    assert done.code == 3, done.out
    reasons = pl.read_parquet(tmp_path / "out" / "tokens.parquet")["reason"]
    assert 0 < len(reasons) - reasons.null_count() < len(reasons) / 2
    assert reasons.drop_nulls().unique().to_list() == ["row-error" if backend == "vertex_batch" else "refused"]
