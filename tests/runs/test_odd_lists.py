"""Lists as some services write them, in a whole run of P against itself: refused, repaired, told before any number."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from tests import ROOT
from tests.programs import Run

EXAMPLE = ROOT / "examples" / "responses"


def example(name: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    (path,) = EXAMPLE.glob(f"{name}_*.json")
    document = json.loads(path.read_text())
    return document, document["responses"][0]["logprobs"]["content"]


def write(folder: Path, name: str, document: dict[str, Any]) -> None:
    (folder / name).write_text(json.dumps(document))


@pytest.fixture
def odd(tmp_path: Path) -> Path:
    folder = tmp_path / "in"
    folder.mkdir()
    document, content = example("000")
    for row in content:
        row["logprob"] = 0
        row["top_logprobs"] = [entry | {"logprob": -9999.0} for entry in row["top_logprobs"]]
        row["top_logprobs"][0] |= {"token": row["token"], "token_id": row["token_id"], "logprob": 0}
    write(folder, "degenerate.json", document)
    document, content = example("002")
    for row, mark in zip(content[3:7], (-100.0, None, -9999.0, -1e30), strict=True):
        row["top_logprobs"][-1]["logprob"] = mark
    for row in content:
        row["token_id"] = float(row["token_id"])
    write(folder, "marks.json", document)
    document, content = example("003")
    content[5]["top_logprobs"][2]["logprob"] = 4.0
    write(folder, "wrong.json", document)
    return folder


def test_what_is_no_probability_is_in_no_number_and_comes_first(run_program: Run, odd: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    model = ("--backend", "local", "--model2", "smollm2-135m")
    done = run_program("flows.run", *model, "--input-dir", odd, "--output-dir", output)
    assert done.code == 3, done.err
    first, second, *_ = done.out.splitlines()
    assert "P's lists give one token everything" in first
    assert "P's lists end with a floor in place of probabilities" in second
    for document in ("summary.json", "run.json"):
        warnings = json.loads((output / document).read_text())["warnings"]
        assert [f"warning: {warning}" for warning in warnings[:2]] == [first.strip(), second.strip()]
    tokens = pl.read_parquet(output / "tokens.parquet").partition_by("source_file", as_dict=True)
    refused, marked, wrong = (tokens[f"{name}.json",] for name in ("degenerate", "marks", "wrong"))
    assert set(refused["reason"]) == {"degenerate-p"}
    assert refused["kl_lower"].null_count() == refused.height
    assert marked["error"].null_count() == marked.height
    assert marked["flags"].to_list()[3] == "clipped-p"
    assert marked["kl_estimate"].max() < 1e-3
    assert wrong["reason"].to_list() == [None if t != 5 else "positive-logprob" for t in range(wrong.height)]
    assert "wrong.json, response 0, position 5: the `logprob` of entry 2 of top_logprobs is 4.0" in wrong["error"][5]
    assert wrong["error"][5] in done.err
    assert wrong["kl_estimate"].max() < 1e-3
    asked = json.loads((output / "run.json").read_text())["contexts_asked"]
    assert asked == refused.height + marked.height + wrong.height - 1
    assert "13 (float-id)" in done.out
    assert "1 (null-logprob)" in done.out
