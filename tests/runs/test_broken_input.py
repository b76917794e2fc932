"""Broken files beside good ones: each is named, the good ones are measured, nobody sees a traceback."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl

from tests import ROOT
from tests.programs import Run

GOOD = json.loads((ROOT / "examples/responses/000_why-is-the-sky-blue.json").read_text())


def changed(change: Callable[[dict[str, Any], list[dict[str, Any]]], object]) -> bytes:
    document = json.loads(json.dumps(GOOD))
    change(document, document["responses"][0]["logprobs"]["content"])
    return json.dumps(document).encode()


BROKEN: dict[str, bytes] = {
    "empty": b"",
    "no-json": b"{ not json",
    "cut": json.dumps(GOOD).encode()[:500],
    "list": b"[1, 2]",
    "utf16": json.dumps(GOOD).encode("utf-16"),
    "no-prompt": changed(lambda document, content: document.pop("prompt")),
    "no-responses": changed(lambda document, content: document.pop("responses")),
    "no-logprobs": changed(lambda document, content: document["responses"][0].pop("logprobs")),
    "other-text": changed(lambda document, content: document["responses"][0].update(text="something else")),
    "positive": changed(lambda document, content: content[2].update(logprob=0.5)),
    "nan": changed(lambda document, content: content[1].update(logprob=float("nan"))),
    "mass": changed(lambda document, content: [item.update(logprob=-0.1) for item in content[0]["top_logprobs"]]),
    "no-list": changed(lambda document, content: content[3].pop("top_logprobs")),
    "token-number": changed(lambda document, content: content[0].update(token=7)),
}


def test_each_broken_file_is_named_and_the_good_ones_are_measured(run_program: Run, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for name, data in BROKEN.items():
        (folder / f"{name}.json").write_bytes(data)
    (folder / "good.json").write_text(json.dumps(GOOD))
    mixed = json.loads(json.dumps(GOOD))
    mixed["responses"].insert(0, {"text": "no logprobs"})
    (folder / "mixed.json").write_text(json.dumps(mixed))
    output = tmp_path / "out"

    arguments = ("--backend", "local", "--model2", "smollm2-135m@int8")
    done = run_program("flows.run", "--input-dir", folder, "--output-dir", output, *arguments)

    assert done.code == 3, done.err
    assert "Traceback" not in done.out + done.err
    tokens = pl.read_parquet(output / "tokens.parquet")
    assert set(tokens["source_file"]) == {"good.json", "mixed.json"}
    assert tokens["kl_lower"].null_count() == 0
    responses = pl.read_parquet(output / "responses.parquet")
    for name in BROKEN:
        rows = responses.filter(pl.col("source_file") == f"{name}.json")
        assert rows.height == 1, name
        assert f"{name}.json" in rows["error"][0]
        result = json.loads((output / f"{name}_kl.json").read_text())
        assert result.get("error") or result["responses"][0]["error"]
        assert f"{name}.json" in done.err, "each is named while the run is on"
    result = json.loads((output / "mixed_kl.json").read_text())
    assert [response["num_tokens"] for response in result["responses"]] == [0, 6]
    assert result["responses"][0]["error"]


def test_nothing_usable_at_all_is_a_mistake_in_one_line_and_asks_nothing(run_program: Run, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "bad.json").write_bytes(b"{")
    output = tmp_path / "out"
    arguments = ("--backend", "local", "--model2", "smollm2-135m@int8")
    done = run_program("flows.run", "--input-dir", folder, "--output-dir", output, *arguments)
    assert done.code == 2, done.err
    assert done.out == ""
    (line,) = [line for line in done.err.splitlines() if "bad.json" in line]
    assert line.startswith(f"error: nothing in {folder} can be used, and nothing was asked: bad.json: not JSON: ")
    assert not output.exists()


def usage_mistake(run: Run, *arguments: object) -> str:
    done = run("flows.run", *arguments)
    assert done.code == 2, done.err
    assert done.out == ""
    assert len(done.err.strip().splitlines()) == 1, done.err
    return done.err


def test_usage_mistakes_are_one_line_and_exit_code_2(run_program: Run, run_process: Run, tmp_path: Path) -> None:
    output = tmp_path / "out"
    local = ("--backend", "local", "--output-dir", output, "--model2", "smollm2-135m")
    examples = ROOT / "examples/responses"
    assert "input_dir is not set" in usage_mistake(run_process)
    assert "does not exist" in usage_mistake(run_program, "--input-dir", tmp_path / "nowhere", *local)
    assert "matches '*.jsonl'" in usage_mistake(run_program, "--input-dir", examples, "--pattern", "*.jsonl", *local)
    assert "no Google Cloud project" in usage_mistake(
        run_program, "--input-dir", examples, "--output-dir", output, "--model2", "gemini-2.5-flash"
    )
    assert "smollm2-135m" in usage_mistake(run_program, "--input-dir", examples, *local[:-1], "smollm-135m")
    assert "no Google credentials" in usage_mistake(  # looked for beyond this machine, which no test may do
        run_process, "--input-dir", examples, "--output-dir", output, "--model2", "m", "--project-id", "p"
    )
