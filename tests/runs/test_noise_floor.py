"""A model asked again, end to end: bought once, whoever is asked, and a KL no larger than the service's unrest."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from flows.watch.history import read_history
from tests import ROOT
from tests.process_worker import kill_group, wait_for
from tests.programs import Done, Run, Start
from tests.vertex_world.fixtures import make_vertex_world
from tests.vertex_world.language_model import SyntheticModel
from tests.vertex_world.models import MODELS
from tests.vertex_world.testing import bought
from tests.vertex_world.world import VertexWorld

__all__ = ["make_vertex_world"]

P, Q, GONE = "gemini-2.5-flash-lite", "gemini-2.5-flash", "gemini-2.0-flash"
PROMPTS = [f"What is known of the number {number}?" for number in range(8)]
AGAIN = ("--set", "noise_floor.fraction=0.2")
FAST = ("--set", "backend.poll_interval_s=0.2")
ONLINE = ("--backend", "vertex_online")


@pytest.fixture
def unquiet(make_vertex_world: Callable[..., VertexWorld]) -> Callable[..., VertexWorld]:
    """Worlds in which every model is the same and ends no turn, and each answer is another one."""

    def make(**settings: Any) -> VertexWorld:
        model = SyntheticModel(unrest={P: 0.1, Q: 0.1}, eos_probability=0.0)
        return make_vertex_world(language_model=model, **settings)

    return make


def flags(folder: Path) -> tuple[object, ...]:
    return ("--input-dir", folder / "in", "--output-dir", folder / "out", "--model2", Q)


def summary_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "out" / "summary.json").read_text())


@pytest.mark.slow
def test_a_killed_batch_run_buys_no_second_answer_twice(
    unquiet: Callable[..., VertexWorld], start_program: Start, run_program: Run, tmp_path: Path
) -> None:
    world = unquiet(job_seconds=1.0)
    world.write_responses(tmp_path / "in", P, PROMPTS, n=1, max_tokens=20, seed=3)
    for n_jobs in (1, 9):  # one for each response, and one that asks P again about all of them
        killed = start_program("flows.run", *flags(tmp_path), *FAST, *AGAIN, env=world.environment())
        wait_for(lambda n=n_jobs, process=killed: len(world.jobs) >= n or process.poll() is not None)
        kill_group(killed)
    done = run_program("flows.run", *flags(tmp_path), *FAST, *AGAIN, env=world.environment())
    assert done.code == 0, done.err
    assert world.rejected == []

    tokens = pl.read_parquet(tmp_path / "out" / "tokens.parquet")
    summary = summary_of(tmp_path)
    floor = summary["noise_floor"]
    assert (floor["of"], floor["models"], floor["versions"]) == ("p", [P], [P])
    assert (tokens.height, floor["n_drawn"], floor["n_measured"]) == (160, 32, 32)
    assert bought(world) == 160 + 32
    assert len(world.jobs) == 9
    # P and Q are one model: their KL is that of two answers, as the floor is.
    assert 0.4 < floor["ratio"] < 2.5
    assert floor["kl_per_token"]["ci_low"] > 0.001
    assert "Noise floor per token" in done.out
    row = read_history(tmp_path / "out" / "history.parquet").row(-1, named=True)
    assert (row["noise_floor"], row["noise_floor_of"]) == (floor["kl_per_token"]["value"], "p")
    assert row["noise_floor_low"] < row["noise_floor"] < row["noise_floor_high"]

    before = bought(world)
    again = run_program("flows.run", *flags(tmp_path), *FAST, *AGAIN, env=world.environment())
    assert again.code == 0, again.err
    assert "0 to ask" in again.err
    assert (bought(world), summary_of(tmp_path)) == (before, summary)
    scores = pl.read_parquet(tmp_path / "out" / "scores" / "*" / "*.parquet")
    assert scores["key"].n_unique() == scores.height == before


def test_q_is_asked_twice_where_the_model_of_the_responses_is_gone(
    unquiet: Callable[..., VertexWorld], run_program: Run, tmp_path: Path
) -> None:
    world = unquiet()
    world.write_responses(tmp_path / "in", GONE, PROMPTS, n=1, max_tokens=10, seed=3)
    alert = ("--set", "alert.kl_per_token=1")

    def run(*arguments: object) -> Done:
        done = run_program("flows.run", *flags(tmp_path), *ONLINE, *AGAIN, *arguments, env=world.environment())
        assert done.code == 0, done.err
        return done

    planned = run("--dry-run")
    assert f"asks again {GONE} at 16 positions: 16 of the requests" in " ".join(planned.out.split())
    done = run(*alert)
    assert f"noise floor: {GONE} cannot be asked again, so that Q is asked twice" in done.err
    summary = summary_of(tmp_path)
    floor = summary["noise_floor"]
    assert (floor["of"], floor["models"], floor["n_measured"]) == ("q", [Q], 16)
    assert bought(world) == 80 + 16
    # The responses are of a quiet model: two answers of Q are twice as far from each other as one from P.
    assert 1.2 < floor["ratio"] < 3.3
    assert summary["drift"]["below_noise_floor"]
    assert "; below the noise floor of 0.0" in summary["drift"]["message"]
    assert "KL(Q‖Q again) at 16 positions; KL(P‖Q) is not above it" in " ".join(done.out.split())

    world.online_calls.clear()
    assert f"{GONE} cannot be asked again by the record in {tmp_path / 'out' / 'scores'}" in run().err
    assert world.online_calls == []
    assert f"asks again {Q} at 16 positions: 0 of the requests" in " ".join(run("--dry-run").out.split())


@pytest.mark.parametrize("why", ["no rights", "daily quota"])
def test_what_may_pass_leaves_p_to_the_next_run_and_the_measurement_whole(
    why: str, unquiet: Callable[..., VertexWorld], run_program: Run, tmp_path: Path
) -> None:
    world = unquiet()
    world.write_responses(tmp_path / "in", P, PROMPTS, n=1, max_tokens=10, seed=3)
    if why == "no rights":
        world.faults.http_script = {"online": [None, None, "403"]}  # the two probes of Q come first
    else:
        world.faults.logprobs_daily_quota = {P: 0}

    def run(*, asks_p: bool) -> dict[str, Any]:
        done = run_program("flows.run", *flags(tmp_path), *ONLINE, *AGAIN, env=world.environment())
        assert done.code == 0, done.err
        assert (f"{P} is not asked again in this run" in done.err) != asks_p
        return summary_of(tmp_path)

    summary = run(asks_p=False)
    assert pl.read_parquet(tmp_path / "out" / "tokens.parquet")["kl_lower"].null_count() == 0
    assert (summary["noise_floor"]["of"], summary["noise_floor"]["n_measured"]) == ("p", 0)
    assert sum(call.model == P for call in world.online_calls) <= 1
    world.faults.logprobs_daily_quota = None
    world.online_calls.clear()
    assert run(asks_p=True)["noise_floor"]["n_measured"] == 16
    assert sum(call.model == P for call in world.online_calls) == 16 + 2


def test_second_answers_of_a_model_that_is_shut_down_since_are_kept(
    unquiet: Callable[..., VertexWorld], run_program: Run, tmp_path: Path
) -> None:
    world = unquiet()

    world.write_responses(tmp_path / "in", P, PROMPTS, n=1, max_tokens=10, seed=3)

    def run(*arguments: object) -> dict[str, Any]:
        done = run_program("flows.run", *flags(tmp_path), *ONLINE, *AGAIN, *arguments, env=world.environment())
        assert done.code == 0, done.err
        return summary_of(tmp_path)["noise_floor"]

    first = run("--max-files", 4)
    assert (first["of"], first["n_measured"]) == ("p", 8)
    world.service.models[P] = replace(MODELS[P], shut=True)
    world.online_calls.clear()
    floor = run()
    assert (floor["of"], floor["models"], floor["n_measured"]) == ("both", [Q, P], 16)
    assert len(world.online_calls) == 2 + 40 + 8
    world.online_calls.clear()
    assert run() == floor
    assert world.online_calls == []


def test_p_against_itself_is_asked_twice_and_a_new_version_of_it_is_said(
    unquiet: Callable[..., VertexWorld], run_program: Run, tmp_path: Path
) -> None:
    world = unquiet()
    for path in world.write_responses(tmp_path / "in", P, PROMPTS, n=1, max_tokens=10, seed=3):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"model_version": "lite-000"}))
    itself = ("--input-dir", tmp_path / "in", "--output-dir", tmp_path / "out", "--model2", P)
    done = run_program("flows.run", *itself, *ONLINE, *AGAIN, env=world.environment())
    assert done.code == 0, done.err
    assert bought(world) == 80 + 16, "the second answer is not the one that Q gave to the same context"
    floor = summary_of(tmp_path)["noise_floor"]
    assert (floor["of"], floor["n_measured"]) == ("p", 16)
    assert 0.4 < floor["ratio"] < 2.5
    said = " ".join(done.out.split())
    assert f"noise floor: P was asked again as {P}, and its responses were written by lite-000" in said


@pytest.mark.slow
@pytest.mark.parametrize("remote", [False, True], ids=["on a disk", "in a bucket"])
def test_submit_and_collect_take_the_model_that_the_submission_found(
    remote: bool, unquiet: Callable[..., VertexWorld], run_program: Run, tmp_path: Path
) -> None:
    world = unquiet(job_seconds=3600.0)
    world.write_responses(tmp_path / "in", GONE, PROMPTS[:5], n=1, max_tokens=10, seed=3)
    world.objects.create_bucket("data")
    out = "gs://data/out" if remote else tmp_path / "out"
    # In a store of several runs what is there is looked at again when the plan changes, and by another backend then.
    shared = () if remote else ("--scores-dir", tmp_path / "scores")
    arguments = ("--input-dir", tmp_path / "in", "--output-dir", out, "--model2", Q, *FAST, *AGAIN, *shared)

    def run(stage: str) -> Done:
        return run_program("flows.run", *arguments, "--stage", stage, env=world.environment())

    submitted = run("submit")
    assert submitted.code == 0, submitted.err
    assert "submitted: 60 contexts are in 6 batch jobs" in submitted.out
    assert len(world.jobs) == 6
    assert run("collect").code == 5
    world.hurry()
    world.wait_for_jobs()
    collected = run("collect")
    assert collected.code == 0, collected.err
    written = world.objects.read(f"{out}/summary.json") if remote else (tmp_path / "out" / "summary.json").read_bytes()
    floor = json.loads(written)["noise_floor"]
    assert (floor["of"], floor["n_measured"], len(world.jobs)) == ("q", 10, 6)
    assert run("collect").out.startswith("unchanged:")


def test_a_second_answer_that_fails_leaves_the_run_complete(
    make_vertex_world: Callable[..., VertexWorld], run_program: Run, tmp_path: Path
) -> None:
    """Without a preflight nobody knows before that P is gone."""
    world = make_vertex_world()
    world.write_responses(tmp_path / "in", GONE, PROMPTS[:5], n=1, max_tokens=5, seed=3)
    (tmp_path / "run.yaml").write_text("preflight: false\n")
    done = run_program(
        "flows.run", "--config", tmp_path / "run.yaml", *flags(tmp_path), *ONLINE, *AGAIN, env=world.environment()
    )
    assert done.code == 0, done.err
    assert "noise floor: 5 of 5 positions have no second answer to compare (refused 5)" in " ".join(done.out.split())
    floor = summary_of(tmp_path)["noise_floor"]
    assert (floor["kl_per_token"]["value"], floor["above"]) == (None, None)


def test_a_local_model_has_no_noise(run_program: Run, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for path in sorted((ROOT / "examples" / "responses").glob("*.json"))[1:4]:
        shutil.copy(path, tmp_path / "in")
    local = ("--backend", "local", "--input-dir", tmp_path / "in", "--output-dir", tmp_path / "out")
    run = ("flows.run", *local, "--model2", "smollm2-135m@int8", *AGAIN)
    done = run_program(*run)
    assert done.code == 0, done.err
    summary = summary_of(tmp_path)
    floor = summary["noise_floor"]
    assert (floor["of"], floor["models"]) == ("p", ["smollm2-135m"])
    # The examples were sampled on another processor, whose float32 sums may differ from this one's.
    assert 0 <= floor["kl_per_token"]["value"] < 1e-6 < 0.01 * summary["kl_per_token"]["estimate"]["value"]
    again = run_program(*run)
    assert "0 to ask" in again.err
    assert summary_of(tmp_path) == summary
