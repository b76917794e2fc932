"""Flags: what the help of each program says of them, and that nothing names one that does not exist."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import pytest

from flows.doors.tokenkl import COMMANDS, main
from tests import ROOT
from tests.programs import as_a_new_process, clean_environment

# Other programs' flags, which our messages name beside those programs: servers, installers, dask.
IN_MESSAGES = {
    *("--max-logprobs", "--logprobs-mode"),
    *("--extra", "--inexact", "--no-config", "--torch-backend", "--reinstall", "--no-cache"),
    *("--no-deps", "--force-reinstall", "--no-cache-dir"),
    *("--host", "--kl-divergence"),
}
# And those that the documents name: also of Prefect, gcloud, docker, check-jsonschema.
IN_DOCUMENTS = IN_MESSAGES | {
    *("--all-extras", "--compile", "--group", "--index-url", "--no-default-groups", "--project"),
    *("--all", "--from-file", "--id", "--interval", "--no-prompt", "--param", "--pool", "--state", "--type", "--watch"),
    *("--image", "--region", "--rm", "--service-account", "--set-env-vars"),
    *("--nthreads", "--nworkers", "--port", "--schemafile", "--from"),
}
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*")
OURS = re.compile(r"(?:python -m flows\.|\btokenkl )([a-z]+)\b([^`|\n]*)")


def answer(*arguments: str, columns: int = 80) -> tuple[int, str, str]:
    environment = clean_environment(Path("/nowhere"), COLUMNS=str(columns))
    with as_a_new_process(environment, ["/usr/bin/tokenkl", *arguments]) as (out, err):
        try:
            code = main()
        except SystemExit as ended:
            code = int(str(ended.code or 0))
    return code, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def helps() -> dict[str, str]:
    """The help of each program."""
    found = {name: answer(name, "--help") for name in COMMANDS}
    assert {code for code, _, _ in found.values()} == {0}
    return {name: out for name, (_, out, _) in found.items()}


@pytest.fixture(scope="module")
def flags(helps: dict[str, str]) -> dict[str, set[str]]:
    """The flags that each program takes, as the list in its help has them."""
    return {name: flags_of(text) for name, text in helps.items()}


def flags_of(text: str) -> set[str]:
    lines = re.findall(r"^  (?:-\w(?: \S+)?, )?(--.*)$", text, re.MULTILINE)
    return {flag for line in lines for part in re.split(r",? ", line.split("  ")[0]) for flag in FLAG.findall(part)}


def texts_of(path: Path) -> list[str]:
    """The strings of a module, with what an f-string has between its values; none of one that names no flag."""
    source = path.read_text(encoding="utf-8")
    tree = ast.parse(source if FLAG.search(source) else "")
    return [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]


def named_in(text: str) -> set[str]:
    return set(FLAG.findall(text))


def test_no_message_names_a_flag_that_does_not_exist(flags: dict[str, set[str]]) -> None:
    known = set().union(*flags.values()) | {"--version"} | IN_MESSAGES
    wrong = {
        (str(path.relative_to(ROOT)), flag)
        for room in ("flows", "backends", "kl")
        for path in (ROOT / room).rglob("*.py")
        for text in texts_of(path)
        for flag in named_in(text) - known
    }
    assert wrong == set()


def test_no_document_names_a_flag_that_does_not_exist(flags: dict[str, set[str]]) -> None:
    benchmarks = {
        flag for path in (ROOT / "benchmarks").glob("*.py") for text in texts_of(path) for flag in named_in(text)
    }
    known = set().union(*flags.values()) | {"--version"} | IN_DOCUMENTS | benchmarks
    wrong: set[tuple[str, str, str]] = set()
    for path in (
        ROOT / "README.md",
        *(ROOT / "docs").glob("*.md"),
        *(ROOT / "examples").glob("*.yaml"),
        *(ROOT / "automations").glob("*.yaml"),
        ROOT / "prefect.yaml",
    ):
        text = path.read_text(encoding="utf-8")
        wrong |= {(path.name, "", flag) for flag in named_in(text) - known}
        for name, call in OURS.findall(text.replace("\\\n", " ")):
            taken = flags.get(name, set()) | {"--help", "--version"}
            wrong |= {(path.name, name, flag) for flag in named_in(call.partition("#")[0]) - taken}
    assert wrong == set()


def test_a_help_names_the_flags_of_its_program_alone(helps: dict[str, str], flags: dict[str, set[str]]) -> None:
    for name, text in helps.items():
        others = {flag for other, call in OURS.findall(text) for flag in named_in(call) & flags.get(other, set())}
        of_another = {"--threshold"} if name == "sample" else set()  # flows.analyze --threshold
        assert named_in(text) - flags[name] - others - of_another <= {"--help"}, name


def test_a_help_has_its_examples_as_lines(helps: dict[str, str], flags: dict[str, set[str]]) -> None:
    for name in COMMANDS.keys() - {"completion"}:
        lines = helps[name].partition("\nexamples:\n")[2].splitlines()
        calls = [line.strip() for line in lines if not line.startswith("  #")]
        assert calls, name
        for call in filter(None, calls):
            words = shlex.split(call)
            assert words[:2] == ["tokenkl", name]
            assert {word for word in words if word.startswith("--")} <= flags[name]


def entry(text: str, flag: str) -> str:
    """What a help says of a flag."""
    found = re.search(rf"^  {re.escape(flag)}(?![\w-])(.*?)(?=^  \S|^\S|\Z)", text, re.MULTILINE | re.DOTALL)
    assert found is not None, flag
    return " ".join(found[1].split())


@pytest.mark.parametrize(
    ("name", "required"),
    [("run", {"--input-dir", "--output-dir", "--model2"}), ("sample", {"--model1", "--output-dir"}), ("clean", set())],
)
def test_what_is_required_is_marked(name: str, required: set[str], helps: dict[str, str]) -> None:
    alone = re.findall(r"^  (--[a-z0-9-]+)", helps[name], re.MULTILINE)
    marked = {flag for flag in alone if "Required, here or in the file." in entry(helps[name], flag)}
    assert marked == required


def test_a_choice_and_the_settings_that_a_program_takes_are_in_its_help(helps: dict[str, str]) -> None:
    assert entry(helps["run"], "--task-runner").startswith("{threads,dask,ray} ")
    assert "task_runner.address, task_runner.workers" in entry(helps["run"], "--task-runner")
    assert "positions.fraction" in entry(helps["run"], "--set")
    for text in ("positions", "--backend", "poll_interval_s", "older_than"):
        assert text not in entry(helps["clean"], "--set")
    assert "backend.retry_deadline_s=600" in entry(helps["clean"], "--set")
    assert entry(helps["clean"], "--output-dir").startswith("DIR ")


@pytest.mark.parametrize("name", ["run", "analyze", "clean"])
def test_no_line_of_a_help_breaks_within_a_flag(name: str, helps: dict[str, str]) -> None:
    assert re.findall(r"--\w\S*-$", helps[name], re.MULTILINE) == []


@pytest.mark.parametrize(
    ("call", "said"),
    [
        ("run --modle2 x", "see tokenkl run --help. Did you mean '--model2'?"),
        ("run --max-cost=1", "see tokenkl run --help. Did you mean '--max-cost-usd'?"),
        ("run --positions.fraction .5", "write it in the file, or as --set positions.fraction=VALUE."),
        ("sample --prompts hello", "write it in the file, or as --set prompts=VALUE."),
        ("sample --seed 7", "or as --set dataset.seed=VALUE or --set sampling.seed=VALUE."),
        ("sample --dataset x", "or as --set dataset.NAME=VALUE."),
        ("analyze results --tpo 3", "Did you mean '--top'?"),
        ("notify x --whatever", "unrecognized arguments: --whatever; see tokenkl notify --help"),
        ("notify x value", "value is not NAME=VALUE; see tokenkl notify --help"),
        ("run --set modle2=x", "unknown setting 'modle2'. Did you mean 'model2'?"),
        ("run --set positions.fractoin=.1", "unknown setting 'positions.fractoin'. Did you mean 'fraction'?"),
    ],
)
def test_a_misspelt_flag_is_answered_with_what_was_meant(call: str, said: str) -> None:
    code, out, err = answer(*call.split())
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert said in err
