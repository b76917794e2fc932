"""A backend that somebody else wrote: the example of docs/writing-a-backend.md, through the real command line."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import polars as pl

from tests.documents import WRITING_A_BACKEND, code_blocks, install_example
from tests.programs import Done, Run


def requests_of(done: Done) -> int:
    """How many requests a dry run would send."""
    assert done.code == 0, done.err
    match = re.search(r"^requests +([\d,]+) in", done.out, re.MULTILINE)
    assert match, done.out
    return int(match[1].replace(",", ""))


def test_the_command_of_the_document_measures_every_position(run_process: Run, tmp_path: Path) -> None:
    plugins, output = tmp_path / "plugins", tmp_path / "out"
    plugins.mkdir()
    install_example(plugins)
    arguments = shlex.split(code_blocks(WRITING_A_BACKEND, "sh")[0])[3:]
    arguments[arguments.index("--output-dir") + 1] = str(output)
    environment = {"PYTHONPATH": str(plugins)}

    done = run_process("flows.run", *arguments, env=environment)
    assert done.code == 0, done.err
    tokens = pl.read_parquet(output / "tokens.parquet")
    assert tokens["error"].null_count() == tokens.height > 0
    assert tokens["kl_lower"].min() > 0
    run = json.loads((output / "run.json").read_text())
    assert run["config"]["backend"]["name"] == "bigram"
    assert run["model_versions_now"] == ["bigram 1"]

    again = run_process("flows.run", *arguments, "--dry-run", env=environment)
    assert requests_of(again) == 0
    other = run_process("flows.run", *arguments, "--set", "backend.smoothing=2", "--dry-run", env=environment)
    assert requests_of(other) == run["contexts_asked"] > 0
