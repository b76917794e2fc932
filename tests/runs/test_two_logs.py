"""Two logged sides and no model: P from one set of files, Q from another, in the forms in which they were logged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from tests import ROOT
from tests.late_server import told_twice
from tests.programs import Run

EXAMPLES = sorted((ROOT / "examples/responses").glob("*.json"))[:3]


def raw_rows() -> list[dict[str, Any]]:
    """P's examples as the rows of an OpenAI batch, with their requests."""
    rows: list[dict[str, Any]] = []
    for path in EXAMPLES:
        document = json.loads(path.read_text())
        response = document["responses"][0]
        choice = {"index": 0, "finish_reason": "stop", "message": {"content": response["text"]}}
        answer = {"model": document["model"], "choices": [choice | {"logprobs": response["logprobs"]}]}
        request = {"messages": [{"role": "user", "content": document["prompt"]}], "temperature": 1, "top_p": 1}
        rows.append({"custom_id": path.stem, "request": {"body": request}, "response": {"body": answer}})
    return rows


def flattened(document: dict[str, Any], last: int | None = None) -> dict[str, Any]:
    """The same with all values of a list nearer to each other, and only so many positions."""
    response = document["responses"][0]
    content = response["logprobs"]["content"][:last]
    for row in content:
        for entry in row["top_logprobs"]:
            entry["logprob"] = entry["logprob"] * 0.9 - 0.5
        row["logprob"] = row["logprob"] * 0.9 - 0.5
    text = "".join(row["token"] for row in content) if last else response["text"]
    return document | {"model": "q", "responses": [{"text": text, "logprobs": {"content": content}}]}


@pytest.fixture
def logs(tmp_path: Path) -> Path:
    for name in ("p", "q"):
        (tmp_path / name).mkdir()
    (tmp_path / "p/log.jsonl").write_text("\n".join(map(json.dumps, raw_rows())))
    documents = [json.loads(path.read_text()) for path in EXAMPLES]
    (tmp_path / "q/all.json").write_text(json.dumps([flattened(documents[0]), flattened(documents[1], last=5)]))
    return tmp_path


def test_two_logs_are_compared_as_far_as_both_go(run_program: Run, logs: Path) -> None:
    arguments = ("--input-dir", logs / "p", "--output-dir", logs / "out", "--pattern", "*.jsonl", "--backend", "files",
                 "--model2", "q", "--set", f"backend.dir={logs / 'q'}")  # fmt: skip
    done = run_program("flows.run", *arguments)
    assert done.code == 3, done.err
    tokens = pl.read_parquet(logs / "out/tokens.parquet")
    n = dict(tokens.group_by("source_file").len().sort("source_file").rows())
    assert list(n) == ["log.jsonl#0", "log.jsonl#1", "log.jsonl#2"]
    measured = tokens.filter(pl.col("error").is_null())
    assert dict(measured.group_by("source_file").len().sort("source_file").rows()) == {
        "log.jsonl#0": n["log.jsonl#0"], "log.jsonl#1": 5}  # fmt: skip
    assert (measured["kl_lower"] > 0).any()
    assert measured["logprob_q"].null_count() == 0, "Q's log has a value of each token, in its list or not"
    assert measured["logprob_q"].to_list() == pytest.approx((measured["logprob_p"] * 0.9 - 0.5).to_list())
    assert measured["logratio_k1"].null_count() == 0, "the settings of the request are known"
    missing = tokens.filter(pl.col("error").is_not_null())
    assert set(missing["reason"]) == {"not-in-files"}
    assert "has this prompt. Give P and Q the same prompts." in done.err
    result = json.loads((logs / "out/log.jsonl#1_kl.json").read_text())
    assert result["prompt"] == json.loads(EXAMPLES[1].read_text())["prompt"]
    run = json.loads((logs / "out/run.json").read_text())
    assert run["backend_report"]["contexts"] == {"answered": measured.height, "not-in-files": missing.height}
    assert all(spent["cost_usd"] == 0 for spent in run["spent"].values())

    again = run_program("flows.run", *arguments)
    assert "0 to ask" in again.err
    document = flattened(json.loads(EXAMPLES[2].read_text())) | {"rendered_prompt_sha256": "0" * 64}
    (logs / "q/more.json").write_text(json.dumps(document))
    rows = [row | {"rendered_prompt_sha256": "1" * 64} for row in raw_rows()]
    (logs / "p/log.jsonl").write_text("\n".join(map(json.dumps, rows)))
    more = run_program("flows.run", *arguments)
    assert more.code == 3
    assert "P and Q were given different texts for the same prompt in 1 of 1 files (log.jsonl#2)" in more.out + more.err
    tokens = pl.read_parquet(logs / "out/tokens.parquet")
    assert tokens.filter(pl.col("source_file") == "log.jsonl#2")["error"].null_count() == n["log.jsonl#2"]


def test_one_log_against_itself_differs_nowhere(run_program: Run, logs: Path) -> None:
    model = json.loads(EXAMPLES[0].read_text())["model"]
    done = run_program("flows.run", "--input-dir", logs / "p", "--output-dir", logs / "same", "--pattern", "*.jsonl",
                       "--backend", "files", "--model2", model, "--set", f"backend.dir={logs / 'p'}")  # fmt: skip
    assert done.code == 0, done.err
    tokens = pl.read_parquet(logs / "same/tokens.parquet")
    assert tokens["kl_lower"].max() == tokens["kl_estimate"].max() == 0


def test_results_are_shown_where_the_server_is_told_of_the_end_twice(
    run_program: Run, logs: Path, prefect_api: str
) -> None:
    model = json.loads(EXAMPLES[0].read_text())["model"]
    with told_twice(prefect_api) as (api, told):
        done = run_program("flows.run", "--input-dir", logs / "p", "--output-dir", logs / "same", "--backend", "files",
                           "--pattern", "*.jsonl", "--model2", model, "--set", f"backend.dir={logs / 'p'}",
                           env={"PREFECT_API_URL": api})  # fmt: skip
    assert len(told) == 1
    assert done.code == 0, done.err
    assert "KL(P‖Q) per token" in done.out
