"""The whole job against the local Vertex AI, through the command line and the real clients."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from kl.records import Prompt, Turn
from tests.programs import Done, Run
from tests.vertex_world.fixtures import make_vertex_world, vertex_world
from tests.vertex_world.world import VertexWorld

__all__ = ["make_vertex_world", "vertex_world"]

P, Q = "gemini-2.5-flash-lite", "gemini-2.5-flash"
PROMPTS = [f"What do you know about the number {number}?" for number in range(8)]


@pytest.fixture
def run_batch(run_program: Run, vertex_world: VertexWorld, tmp_path: Path):
    """One run over responses of the world's model P; ``arguments`` are further flags."""

    def run(*arguments: object, prompts: list[Any] = PROMPTS, n: int = 1, max_tokens: int = 40, **options: Any) -> Done:
        folder = tmp_path / "in"
        if not folder.exists():
            vertex_world.write_responses(folder, P, prompts, n=n, max_tokens=max_tokens, seed=5, **options)
        flags = ("--input-dir", folder, "--output-dir", tmp_path / "out", "--model2", Q)
        fast = () if "vertex_online" in arguments else ("--set", "backend.poll_interval_s=0.1")
        return run_program("flows.run", *flags, *fast, *arguments, env=vertex_world.environment())

    return run


def tokens_of(folder: Path) -> pl.DataFrame:
    return pl.read_parquet(folder / "out" / "tokens.parquet")


def exact_values(world: VertexWorld, folder: Path, tokens: pl.DataFrame) -> list[float]:
    """The KL of the world's full distributions at every row."""
    values: list[float] = []
    for (source, index), rows in tokens.group_by(["source_file", "response_idx"], maintain_order=True):
        document = json.loads((folder / "in" / str(source)).read_text())
        prefix = ""
        for token in rows["token"]:
            values.append(world.exact_kl(P, Q, document["prompt"], prefix, system=document.get("system")))
            prefix += token
        assert prefix == document["responses"][int(index)]["text"]
    return values


def floor_by_hand(top_p: list[dict[str, Any]], top_q: list[dict[str, Any]]) -> float:
    """Renormalise each list, give its smallest probability to what it lacks, sum over the union."""

    def probabilities(top: list[dict[str, Any]]) -> dict[int, float]:
        weights = {item["token_id"]: math.exp(item["logprob"]) for item in top if item["logprob"] > -1e20}
        total = sum(weights.values())
        return {token: weight / total for token, weight in weights.items()}

    p, q = probabilities(top_p), probabilities(top_q)
    least_p, least_q = min(p.values()), min(q.values())
    return sum(
        p.get(token, least_p) * math.log(p.get(token, least_p) / q.get(token, least_q)) for token in p.keys() | q.keys()
    )


def floors(folder: Path, tokens: pl.DataFrame) -> list[float]:
    scores = pl.read_parquet(folder / "out" / "scores" / "*" / "*.parquet")
    by_list: dict[str, list[dict[str, Any]]] = {}
    for row in scores.iter_rows(named=True):
        pairs = zip(row["token_ids"], row["logprobs"], strict=True)
        by_list[row["key"]] = [{"token_id": token, "logprob": logprob} for token, logprob in pairs]
    from flows.config.comparison import Comparison
    from flows.config.models import RunConfig
    from flows.config.templates import RunValues
    from flows.stages.inputs import find_inputs, read_input

    config = RunConfig(input_dir=folder / "in", output_dir=folder / "out", model2=Q, project_id="stand-in-project")
    comparison = Comparison.of(config, RunValues.of_a_dry_run())
    values: list[float] = []
    for file in find_inputs(config):
        for response in read_input(file).responses:
            request = comparison.request(response, "q")
            for position, key in zip(response.positions, request.keys, strict=True):
                top_p = [{"token_id": item.token_id, "logprob": item.logprob} for item in position.top]
                values.append(floor_by_hand(top_p, by_list[key]))
    assert len(values) == tokens.height
    return values


def test_eight_responses_are_eight_jobs_and_every_number_is_right(run_batch, vertex_world, tmp_path) -> None:
    done = run_batch()
    assert done.code == 0, done.err
    assert vertex_world.rejected == []
    assert len(vertex_world.jobs) == 8
    tokens = tokens_of(tmp_path)
    assert re.search(rf"INFO wave 1: 8 jobs, {tokens.height:,} rows: 8 succeeded$", done.err, re.MULTILINE), done.err
    line = next(line for line in done.err.splitlines() if "contexts scored: 237 of 237" in line)
    assert re.search(r"; 8 jobs: 8 succeeded; 0\.\d{4} of about 0\.\d{4} USD spent$", line)
    assert "batchPredictionJobs" not in done.err, "no line a job"
    assert sum(vertex_world.rows_bought.values()) == len(vertex_world.rows_bought)
    assert tokens["kl_lower"].null_count() == 0
    exact = exact_values(vertex_world, tmp_path, tokens)
    assert all(low <= value + 1e-4 for low, value in zip(tokens["kl_lower"], exact, strict=True))
    assert tokens["kl_floor"].to_list() == pytest.approx(floors(tmp_path, tokens), abs=2e-3)
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    assert run["model2_versions"] == [Q]
    assert len(run["backend_report"]["jobs"]) == 8
    for path in (tmp_path / "in").glob("*.json"):
        result = json.loads((tmp_path / "out" / f"{path.stem}_kl.json").read_text())
        assert None not in result["responses"][0]["kl_per_token"]
        assert (result["model1"], result["model2"]) == (P, Q)


@pytest.mark.parametrize(
    "switches",
    [{"shuffle_rows": True, "shards": 3}, {"shuffle_rows": True, "shards": 3, "drop_keys": True, "mangle_echo": True}],
    ids=["shuffled shards", "shuffled shards without keys"],
)
def test_rows_are_matched_whatever_their_order(switches, run_batch, vertex_world, tmp_path) -> None:
    for name, value in switches.items():
        setattr(vertex_world.faults, name, value)
    done = run_batch()
    assert done.code == 0, done.err
    tokens = tokens_of(tmp_path)
    exact = exact_values(vertex_world, tmp_path, tokens)
    assert all(low <= value + 1e-4 for low, value in zip(tokens["kl_lower"], exact, strict=True))
    assert tokens["kl_floor"].to_list() == pytest.approx(floors(tmp_path, tokens), abs=2e-3)


def test_several_samples_conversations_and_system_texts(run_batch, vertex_world, tmp_path) -> None:
    conversation = [
        {"role": "user", "content": "Hello"},
        {"role": "model", "content": "Hi! \u2028 What now?"},
        {"role": "user", "content": 'Quote "this" \\ and {that}\n\t🙂'},
    ]
    done = run_batch("--quiet", prompts=["One", "Two", conversation], n=3, max_tokens=12, system="Be «brief» 🙂")
    assert (done.code, done.err) == (0, "")
    assert "KL(P‖Q) per token" in done.out
    assert vertex_world.rejected == []
    assert set(vertex_world.rows_bought.values()) == {1}
    tokens = tokens_of(tmp_path)
    exact = exact_values(vertex_world, tmp_path, tokens)
    assert all(low <= value + 1e-4 for low, value in zip(tokens["kl_lower"], exact, strict=True))


def test_a_second_run_buys_nothing(run_batch, vertex_world, tmp_path) -> None:
    assert run_batch(prompts=PROMPTS[:2]).code == 0
    bought, jobs, first = sum(vertex_world.rows_bought.values()), len(vertex_world.jobs), tokens_of(tmp_path)
    vertex_world.ledger.requests.clear()
    again = run_batch()
    assert again.code == 0
    assert (sum(vertex_world.rows_bought.values()), len(vertex_world.jobs)) == (bought, jobs)
    assert vertex_world.requests == []
    assert tokens_of(tmp_path).equals(first)


def test_the_same_responses_under_other_file_names_buy_nothing(run_batch, vertex_world, tmp_path) -> None:
    assert run_batch(prompts=PROMPTS[:2]).code == 0
    bought = sum(vertex_world.rows_bought.values())
    for path in list((tmp_path / "in").glob("*.json")):
        path.rename(path.with_name(f"renamed-{path.name}"))
    assert run_batch().code == 0
    assert sum(vertex_world.rows_bought.values()) == bought


def test_failed_jobs_end_the_wait_with_the_services_words(run_batch, vertex_world, tmp_path) -> None:
    vertex_world.faults.job_outcomes = ["FAILED"] * 4
    done = run_batch("--set", "backend.max_attempts=2", "-v", prompts=PROMPTS[:2])
    assert done.code == 3
    for wave in (1, 2):
        assert re.search(rf"INFO wave {wave}: 2 jobs, \d+ rows: 2 failed$", done.err, re.MULTILINE), done.err
    failed = re.findall(r"WARNING batch job (\S+) ended FAILED with \d+ rows unanswered: .+", done.err)
    assert len(failed) == 4
    assert f"DEBUG batch job {failed[0]}: " in done.err
    assert "not measured" in done.out
    tokens = tokens_of(tmp_path)
    assert tokens["reason"].unique().to_list() == ["job-failed"]
    assert "ended FAILED" in tokens["error"][0]
    result = json.loads((tmp_path / "out" / "prompt_000_kl.json").read_text())
    assert result["responses"][0]["token_details"][0]["error"] == tokens["error"][0]
    assert set(result["responses"][0]["kl_per_token"]) == {None}


def test_the_online_backend_gives_the_same_scores(run_batch, vertex_world, tmp_path) -> None:
    assert run_batch(prompts=PROMPTS[:2], max_tokens=10).code == 0
    batch = tokens_of(tmp_path)
    flags = ("--input-dir", tmp_path / "in", "--output-dir", tmp_path / "online", "--backend", "vertex_online")
    done = run_batch(*flags)
    assert done.code == 0, done.err
    assert pl.read_parquet(tmp_path / "online" / "tokens.parquet").equals(batch)
    assert vertex_world.rejected == []
    record = json.loads((tmp_path / "online" / "run.json").read_text())
    counted = record["spent"]["gemini-2.5-flash"]["input_tokens"]
    assert record["estimate"]["input_tokens"] == counted  # as the service counted the prompts before
    assert record["estimate"]["prompts_counted"] == 2
    assert f"estimated {counted:,} input tokens, the service counted {counted:,}" in done.err


def test_changing_the_backend_half_way_buys_nothing_twice(run_batch, vertex_world, tmp_path) -> None:
    assert run_batch("--max-files", "1", prompts=PROMPTS[:2], max_tokens=10).code == 0
    assert run_batch("--backend", "vertex_online").code == 0
    counts = sorted(vertex_world.rows_bought.values())
    assert counts[:-2] == [1] * (len(counts) - 2)
    assert counts[-2:] == [2, 2], "the tiny requests that prove the model usable, once a run"


@pytest.mark.parametrize("backend", ["vertex_batch", "vertex_online"])
def test_raw_rows_are_read_again_without_a_call(backend, run_batch, vertex_world, tmp_path) -> None:
    assert run_batch("--keep-raw", "--backend", backend, prompts=PROMPTS[:2], max_tokens=10).code == 0
    vertex_world.ledger.requests.clear()
    flags = ("--output-dir", tmp_path / "again", "--reuse-raw", tmp_path / "out", "--backend", backend)
    done = run_batch(*flags)
    assert done.code == 0, done.err
    assert vertex_world.requests == []
    assert pl.read_parquet(tmp_path / "again" / "tokens.parquet").equals(tokens_of(tmp_path))
    assert run_batch("--output-dir", tmp_path / "third", "--reuse-raw", tmp_path / "again").code == 2


def test_a_model_that_cannot_be_used_is_one_line_and_nothing_is_bought(run_batch, vertex_world) -> None:
    done = run_batch("--model2", "gemini-3.5-flash", "--location", "global", prompts=PROMPTS[:1], max_tokens=5)
    assert done.code == 2
    assert len(done.err.strip().splitlines()) == 1, done.err
    assert "gemini-3.5-flash gives no log-probabilities" in done.err
    assert vertex_world.jobs == []
    assert sum(vertex_world.rows_bought.values()) == 1, "a tiny request, accepted without log-probabilities"


def test_a_dry_run_calls_nothing_and_a_limit_on_cost_holds(run_batch, vertex_world, tmp_path) -> None:
    done = run_batch("--dry-run", prompts=PROMPTS[:2], max_tokens=10)
    assert done.code == 0
    assert vertex_world.requests == []
    assert not (tmp_path / "out").exists()
    assert re.search(r"^requests +20 in 2 batch jobs", done.out, re.MULTILINE), done.out
    done = run_batch("--max-cost-usd", "0.00001")
    assert done.code == 2
    assert "is above max_cost_usd = 1e-05" in done.err
    assert vertex_world.requests == []
    assert run_batch("--max-cost-usd", "1").code == 0
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    spent = run["spent"][Q]
    expected = 0.5 * (0.30 * spent["input_tokens"] + 2.50 * spent["output_tokens"]) / 1e6
    assert spent["cost_usd"] == pytest.approx(expected)
    assert spent["output_tokens"] == 20


def test_a_disk_that_refuses_results_stops_the_run_in_one_line(run_batch, vertex_world, tmp_path) -> None:
    """A file stands where the scores of one prompt belong."""
    assert run_batch("--dry-run", prompts=PROMPTS[:2], max_tokens=5).code == 0
    prompt_id = Prompt((Turn("user", PROMPTS[0]),)).prompt_id
    (tmp_path / "out" / "scores").mkdir(parents=True)
    (tmp_path / "out" / "scores" / prompt_id).write_text("in the way")
    done = run_batch("--backend", "vertex_online", "--max-concurrent", "1")  # no other call is in flight when it stops
    assert done.code in (1, 2)
    assert "Traceback" not in done.err
    assert "error: " in done.err.strip().splitlines()[-1]
    (tmp_path / "out" / "scores" / prompt_id).unlink()
    assert run_batch("--backend", "vertex_online").code == 0
    counts = sorted(vertex_world.rows_bought.values())
    assert counts[:-2] == [1] * (len(counts) - 2), "what the first run bought was in its journal"


def test_models_of_other_tokens_are_found_out_before_the_second_response_is_bought(
    run_batch, vertex_world: VertexWorld, tmp_path: Path
) -> None:
    online = ("--backend", "vertex_online")
    vertex_world.write_responses(tmp_path / "in", P, PROMPTS, n=1, max_tokens=40, seed=5)
    for path in (tmp_path / "in").glob("*.json"):
        document = json.loads(path.read_text())
        (response,) = document["responses"]
        for number, item in enumerate(response["logprobs"]["content"]):
            for entry in (item, *item["top_logprobs"]):
                entry["token"], entry["token_id"] = f"~{entry['token']}", 900_000 + entry["token_id"]
            if number == 0:
                first = item
        response["text"] = "".join(item["token"] for item in response["logprobs"]["content"])
        assert first["token"].startswith("~")
        path.write_text(json.dumps(document))
    done = run_batch(*online)
    assert done.code == 2, done.err
    assert "error: the models cannot be compared token by token: only" in done.err
    assert "--force asks for the rest, too" in done.err
    most = json.loads(min((tmp_path / "in").glob("*.json")).read_text())["responses"][0]["logprobs"]["content"]
    n_asked = sum("Continue the row" not in str(call.request) for call in vertex_world.online_calls)
    assert n_asked == len(most)
