"""P writes, Q is asked, the run is analysed: on the local Vertex AI, online and in batches, and on the local model."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from tests.process_worker import kill_group
from tests.programs import Done, Run, Start, finish
from tests.vertex_world.fixtures import vertex_world
from tests.vertex_world.language_model import prompt_turns
from tests.vertex_world.world import VertexWorld

__all__ = ["vertex_world"]

P, Q = "gemini-2.5-flash-lite", "gemini-2.5-flash"
QUESTIONS = [f"What do you know about the number {number}?" for number in range(5)]
FAST = {"vertex_batch": {"poll_interval_s": 0.1}, "vertex_online": {}}


def guide(folder: Path, name: str, /, **changes: Any) -> Path:
    """A configuration in the sections of the guide."""
    folder.mkdir(exist_ok=True)
    (folder / "prompts.txt").write_text("\n".join(QUESTIONS) + "\n\n")
    settings = {
        "backend": {"name": name, **FAST[name]},
        "dataset": {"source": "file", "file_path": str(folder / "prompts.txt"), "sampling_mode": "first"},
        "models": [P],
        "api": {"project_id": None, "location": "us-central1"},
        "sampling": {"num_samples_per_prompt": 2, "max_tokens": 8, "temperature": 1.0, "top_p": 1.0, "logprobs": 20},
        "output": {"base_dir": str(folder), "experiment_name": "responses"},
    }
    path = folder / "sample.yaml"
    path.write_text(json.dumps(settings | changes))
    return path


@pytest.fixture
def sample(run_program: Run, vertex_world: VertexWorld) -> Callable[..., Done]:
    def run(config: Path, *arguments: str) -> Done:
        return run_program("flows.sample", "--config", config, *arguments, env=vertex_world.environment())

    return run


@pytest.mark.parametrize("backend", ["vertex_online", "vertex_batch"])
def test_sample_run_analyse(
    backend: str, sample: Callable[..., Done], run_program: Run, vertex_world: VertexWorld, tmp_path: Path
) -> None:
    config = guide(tmp_path, backend)
    dry = sample(config, "--dry-run")
    assert dry.code == 0, dry.err
    assert "10 in 5 files" in dry.out
    assert vertex_world.requests == []
    assert sample(config, "--max-cost-usd", "0.000001").code == 2
    done = sample(config)
    assert done.code == 0, done.err
    assert re.search(
        r"responses sampled: 10 of 10; .*\b0\.\d{4} of at most 0\.\d{4} USD spent$", done.err, re.MULTILINE
    )
    line = re.search(r"estimated ([\d,]+) input tokens, the service counted ([\d,]+)$", done.err, re.MULTILINE)
    assert line is not None, done.err
    assert line[1] == line[2]  # it counted the prompts before
    assert vertex_world.rejected == []
    bought = dict(vertex_world.rows_bought)
    assert len(bought) == 10 + 1  # and the proof that the model can be used
    assert set(bought.values()) == {1}
    folder = tmp_path / "responses"
    assert sorted(path.name for path in folder.iterdir()) == [
        f"00{number}_what-do-you-know-about-the-number-{number}.json" for number in range(5)
    ]
    again = sample(config)
    assert again.code == 0
    assert "5 of 5 files are there already and are left alone" in again.err
    assert done.err.count("responses sampled: 10 of 10") == 1
    assert again.err.endswith("10 responses in 5 files, 5 of them were there already and are left alone\n")
    assert done.err.endswith("10 responses in 5 files\n")
    assert dict(vertex_world.rows_bought) == bought

    document = json.loads((folder / "003_what-do-you-know-about-the-number-3.json").read_text())
    assert (document["prompt"], document["model"], document["num_responses"]) == (QUESTIONS[3], P, 2)
    for index, response in enumerate(document["responses"]):
        content = response["logprobs"]["content"]
        assert response["usage"]["completion_tokens"] == len(content)
        assert (response["sample"], response["seed"], response["model_version"]) == (index, index, P)
        assert response["finish_reason"] in ("STOP", "MAX_TOKENS")

    flags = ("--input-dir", folder, "--output-dir", tmp_path / "out", "--model2", Q, "--backend", backend)
    fast = [item for name, value in FAST[backend].items() for item in ("--set", f"backend.{name}={value}")]
    run = run_program("flows.run", *flags, *fast, env=vertex_world.environment())
    assert run.code == 0, run.err
    tokens = pl.read_parquet(tmp_path / "out" / "tokens.parquet")
    rows = tokens.filter(source_file="003_what-do-you-know-about-the-number-3.json", response_idx=0)
    prefix, exact = "", []
    for token in rows["token"]:
        exact.append(vertex_world.exact_kl(P, Q, QUESTIONS[3], prefix))
        prefix += token
    assert (rows["kl_lower"] <= pl.Series(exact) + 1e-6).all()
    shown = run_program("flows.analyze", "--result-dir", tmp_path / "out", "--top-k", "10")
    assert shown.code == 0, shown.err
    assert "Positions with the largest KL" in shown.out
    go_on(backend, sample, run_program, vertex_world, tmp_path)


def go_on(backend: str, sample: Callable[..., Done], run_program: Run, world: VertexWorld, folder: Path) -> None:
    """Both models go on from the positions with a high KL."""
    high = folder / "high.json"
    flags = ("--threshold", "0.05", "--score", "lower", "--out", high)
    done = run_program("flows.analyze", folder / "out", *flags, env=world.environment())
    assert done.code == 0, done.err
    positions = json.loads(high.read_text())
    # A run of an earlier version has no candidate table: the same lists are in its scores.
    (folder / "out" / "candidates.parquet").unlink()
    stored = folder / "stored.json"
    assert run_program("flows.analyze", folder / "out", *flags[:-1], stored, env=world.environment()).code == 0
    assert json.loads(stored.read_text()) == positions
    assert f"{len(positions)} of " in done.out
    assert len(positions) > 1
    assert [item["score"] for item in positions] == sorted((item["score"] for item in positions), reverse=True)
    for item in positions:
        place = item["source"]
        response = json.loads((folder / "responses" / place["file"]).read_text())["responses"][place["response_idx"]]
        before = response["logprobs"]["content"][: place["position"]]
        assert item["prefix"] == "".join(token["token"] for token in before)
        assert item["prefix_token_ids"] == [token["token_id"] for token in before]
        assert item["scores"]["kl_lower"] == item["score"] >= 0.05
        for model, side in ((P, "p"), (Q, "q")):
            assert item["lists"][side][0]["logprob"] == pytest.approx(first_logprob(world, model, item), abs=1e-5)
    config = guide(
        folder, backend, dataset=None, continue_from=str(high), models=[P, Q], num_responses=1,
        sampling={"max_tokens": 3}, output={"base_dir": str(folder / "continued")},
    )  # fmt: skip
    done = sample(config)
    assert done.code == 0, done.err
    first = {(item["prompt"], item["prefix"]): item for item in reversed(positions)}
    positions = [item for item in positions if first[item["prompt"], item["prefix"]] is item]
    for model in (P, Q):
        files = sorted((folder / "continued" / model).glob("*.json"))
        assert len(files) == len(positions)
        for path, item in zip(files, positions, strict=True):
            document = json.loads(path.read_text())
            assert (document["continues"]["prefix"], document["continues"]["source"]) == (
                item["prefix"],
                item["source"],
            )
            (response,) = document["responses"]
            best = response["logprobs"]["content"][0]["top_logprobs"][0]["logprob"]
            assert best == pytest.approx(first_logprob(world, model, item), abs=1e-5)
    flags = ("--input-dir", folder / "continued" / P, "--output-dir", folder / "no", "--model2", Q)
    refused = run_program("flows.run", *flags, "--backend", backend, env=world.environment())
    assert refused.code != 0
    assert "go on from a prefix" in refused.out + refused.err


def first_logprob(world: VertexWorld, model: str, item: dict[str, Any]) -> float:
    turns = prompt_turns(item["prompt"])
    return float(world.language_model.distribution(model, turns, None, item["prefix"]).logprobs.max())


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["vertex_online", "vertex_batch"])
def test_what_was_killed_goes_on_and_buys_nothing_twice(
    backend: str, start_program: Start, sample: Callable[..., Done], vertex_world: VertexWorld, tmp_path: Path
) -> None:
    settings = {"name": backend, **FAST[backend]} | ({"max_concurrent": 2} if backend == "vertex_online" else {})
    config = guide(tmp_path, backend, backend=settings)
    vertex_world.faults.latency_s = 0.3
    vertex_world.hurry(60)
    process = start_program("flows.sample", "--config", config, env=vertex_world.environment())
    state = tmp_path / "responses" / ".sampling"
    until = time.monotonic() + 60
    begun = "journal/*.jsonl" if backend == "vertex_online" else "jobs/*.json"
    while not any(path.stat().st_size for path in state.glob(begun)) or (backend != "vertex_online") > len(
        vertex_world.jobs
    ):
        assert time.monotonic() < until
        assert process.poll() is None, finish(process).err
        time.sleep(0.02)
    kill_group(process)
    assert len(list((tmp_path / "responses").glob("*.json"))) < 5
    vertex_world.faults.latency_s = 0
    vertex_world.hurry()
    done = sample(config)
    assert done.code == 0, done.err
    assert len(list((tmp_path / "responses").glob("*.json"))) == 5
    assert not state.exists()
    counts = sorted(vertex_world.rows_bought.values())
    if backend == "vertex_batch":
        assert len(vertex_world.jobs) == 1
        assert counts == [1] * 10 + [2]  # the proof, of each of the two runs
    else:  # two calls were in flight when it was killed, and both runs made the proof
        assert len(counts) == 11
        assert sum(counts) <= 11 + 2 + 1


def test_what_fails_is_counted_and_the_others_are_written(
    sample: Callable[..., Done], vertex_world: VertexWorld, tmp_path: Path
) -> None:
    config = guide(tmp_path, "vertex_online", models=[P, Q])
    vertex_world.faults.blocked_rate, vertex_world.faults.no_logprobs_rate = 0.3, 0.3
    done = sample(config, "--no-preflight")
    assert done.code == 3, done.err
    blocked = vertex_world.faults.injected["blocked"]
    assert 0 < blocked < 20
    assert f"responses missing: {blocked} (blocked)" in done.err
    lines = [line for line in done.err.splitlines() if "responses are missing (blocked" in line]
    files = sorted((tmp_path / "responses").glob("*/*.json"))
    documents = [json.loads(path.read_text()) for path in files]
    assert sum(len(document["responses"]) for document in documents) == 20 - blocked
    assert len(lines) == 10 - sum(len(document["responses"]) == 2 for document in documents)
    assert {path.parent.name for path in files} == {P, Q}
    assert {response["sample"] for document in documents for response in document["responses"]} == {0, 1}

    calls = len(vertex_world.online_calls)
    again = sample(config, "--no-preflight")
    assert again.code == 3
    assert f"responses missing: {blocked} (blocked)" in again.err
    assert len(vertex_world.online_calls) == calls, "what is refused for good is not asked again"
    changed = sample(config, "--set", "sampling.temperature=0.5")
    assert changed.code == 2
    assert "holds responses that were sampled otherwise" in changed.err


def test_one_model_alone_is_not_asked_again_when_a_second_joins(
    sample: Callable[..., Done], vertex_world: VertexWorld, tmp_path: Path
) -> None:
    assert sample(guide(tmp_path, "vertex_online")).code == 0
    done = sample(guide(tmp_path, "vertex_online", models=[P, Q]))
    assert done.code == 2
    assert f"Move them to {tmp_path / 'responses' / P} to go on with several models" in done.err
