"""The documents are true: their code runs, and their tables name what the code has."""

from __future__ import annotations

import importlib
import inspect
import os
import re
import shlex
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

import backends.errors
import backends.hookspecs
from backends.base import Backend, Capabilities
from backends.contract import CHECKS, ContractBreach, Subject, checks_for
from backends.registry import ENTRY_POINT_GROUP, build_targets, load_backend, parse_options
from flows.commands.arguments import make_parser, parse_config
from flows.config.backend import resolve_backend
from flows.config.models import RunConfig
from flows.config.reading import build_config
from kl.records import Score
from tests.documents import ROOT, WRITING_A_BACKEND, code_blocks, install_example

TEXT = WRITING_A_BACKEND.read_text(encoding="utf-8")


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The example of the document, importable and announced."""
    install_example(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    monkeypatch.delitem(sys.modules, "tokenkl_bigram", raising=False)
    return tmp_path


def run_arguments() -> list[str]:
    """What the document types after ``python -m flows.run``."""
    (command,) = (shlex.split(line) for block in code_blocks(WRITING_A_BACKEND, "sh") for line in block.splitlines())
    assert command[:3] == ["python", "-m", "flows.run"]
    return command[3:]


def test_the_example_is_found_through_its_entry_point(installed: Path) -> None:
    assert build_targets()["bigram"] == "tokenkl_bigram:BigramBackend"
    backend = load_backend("bigram")
    assert parse_options("bigram", backend, {"smoothing": 0.5}) == backend.Options.model_validate({"smoothing": 0.5})


def test_the_example_is_about_twenty_lines() -> None:
    source = code_blocks(WRITING_A_BACKEND, "python")[0]
    body = source[source.index("class BigramBackend") : source.index("@hookimpl")]
    assert 15 <= len([line for line in body.splitlines() if line.strip()]) <= 25


def test_the_example_keeps_the_contract(installed: Path) -> None:
    backend = load_backend("bigram")
    subject = Subject(backend, "bigram", "no-such-model", changed_options=[{"smoothing": 3.0}])
    for check in checks_for(subject):
        check.run(subject)


def test_the_documents_own_test_runs_every_check_that_applies(installed: Path) -> None:
    (installed / "test_contract.py").write_text(code_blocks(WRITING_A_BACKEND, "python")[1], encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": f"{installed}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_contract.py"]
    done = subprocess.run(command, cwd=installed, env=environment, capture_output=True, text=True, timeout=120)
    subject = Subject(load_backend("bigram"), "bigram", "no-such-model")
    assert f"{len(checks_for(subject))} passed" in done.stdout, done.stdout + done.stderr
    assert done.returncode == 0


def test_the_breach_that_the_document_shows_is_what_renormalising_gives(installed: Path) -> None:
    bigram = load_backend("bigram")

    class BigramBackend(bigram):
        async def score(self, requests):
            async for score in super().score(requests):
                mass = sum(2.718281828459045**candidate.logprob for candidate in score.top)
                top = [candidate._replace(logprob=candidate.logprob / mass) for candidate in score.top]
                yield Score(score.key, tuple(top) if len(top) > 1 else (top[0]._replace(logprob=0.0),))

    (shown,) = code_blocks(WRITING_A_BACKEND, "text")
    check = next(check for check in CHECKS if check.name == "a shorter list is the beginning of the longer one")
    with pytest.raises(ContractBreach) as raised:
        check.run(Subject(BigramBackend, "bigram", None))
    numbers = re.compile(r"-?\d+\.\d+")
    seen = f"ContractBreach: {raised.value}".splitlines()[:2]
    assert [numbers.sub("#", line) for line in shown.splitlines()] == [numbers.sub("#", line) for line in seen]


def test_the_command_and_the_configuration_file_of_the_document_say_the_same(installed: Path, tmp_path: Path) -> None:
    (settings,) = code_blocks(WRITING_A_BACKEND, "yaml")
    file = tmp_path / "run.yaml"
    file.write_text(settings, encoding="utf-8")
    assert yaml.safe_load(settings)["backend"] == {"name": "bigram", "smoothing": 0.5}
    by_file = build_config(RunConfig, file, {})
    by_flags = parse_config(make_parser("run", "", RunConfig), RunConfig, run_arguments())
    assert by_file == by_flags
    _, options, notes = resolve_backend(by_flags)
    assert options.model_dump()["smoothing"] == 0.5
    assert not notes


# What the tables and texts list.


def table_after(heading: str) -> list[str]:
    """The names in backticks of the first column of the table below a heading."""
    section = TEXT.split(f"\n{heading}\n", 1)[1]
    rows = section[section.index("\n|") :].split("\n\n", 1)[0]
    return [name for row in rows.splitlines()[3:] for name in re.findall(r"`(\w+)`", row.split("|")[1])]


def test_the_hook_is_described_with_its_arguments() -> None:
    name, hook = next((name, item) for name, item in vars(backends.hookspecs).items() if hasattr(item, "tokenkl_spec"))
    arguments = list(inspect.signature(hook).parameters)
    described = re.findall(r"`(\w+)\(([\w, ]*)\)`", TEXT.split("\n## Registration\n", 1)[1])[0]
    assert described == (name, ", ".join(arguments))
    assert table_after("## Registration") == arguments
    (written,) = re.findall(r"^def (\w+)\(([\w, ]*)\):", code_blocks(WRITING_A_BACKEND, "python")[0], re.MULTILINE)
    assert written == (name, ", ".join(arguments))


def test_there_is_one_hook() -> None:
    assert len([item for item in vars(backends.hookspecs).values() if hasattr(item, "tokenkl_spec")]) == 1


def test_every_capability_is_described() -> None:
    assert table_after("### Capabilities") == list(Capabilities._fields)


def test_every_field_of_a_score_is_described() -> None:
    assert table_after("### score") == [
        "key", "top", "sampled", "model_version", "finish_reason", "input_tokens", "output_tokens", "n_dropped",
        "full_logprobs", "exact", "wanted",
    ]  # fmt: skip
    assert set(table_after("### score")) == {field.name for field in fields(Score)}


def test_every_error_is_described() -> None:
    kinds = {
        name
        for name, item in vars(backends.errors).items()
        if isinstance(item, type) and issubclass(item, backends.errors.TokenKLError)
    }
    assert set(table_after("### Errors")) == kinds


def test_every_method_of_a_backend_is_described() -> None:
    parts = [name for name in vars(Backend) if not name.startswith("_")]
    assert "interrupted" in parts
    assert [name for name in parts if not re.search(rf"(`|### |def ){name}\b", TEXT)] == []


def test_the_group_of_entry_points_is_the_one_that_is_read() -> None:
    assert f"`{ENTRY_POINT_GROUP}`" in TEXT
