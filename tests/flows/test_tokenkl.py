"""The program ``tokenkl``: each of its words, and what a shell completes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

from flows.doors.tokenkl import COMMANDS, main
from tests import ROOT
from tests.programs import as_a_new_process, clean_environment

Answer = Callable[..., tuple[int, str, str]]


@pytest.fixture
def tokenkl(tmp_path: Path) -> Answer:
    def call(*arguments: str) -> tuple[int, str, str]:
        with as_a_new_process(clean_environment(tmp_path / "home"), ["/usr/bin/tokenkl", *arguments]) as (out, err):
            try:
                code = main()
            except SystemExit as ended:
                code = int(str(ended.code or 0))
        return code, out.getvalue(), err.getvalue()

    return call


def test_every_command_has_a_door() -> None:
    assert all(find_spec(f"flows.{name}") for name in COMMANDS if name != "completion")


def test_without_a_command_it_says_which_there_are(tokenkl: Answer) -> None:
    assert tokenkl() == tokenkl("--help")
    code, out, _ = tokenkl()
    assert code == 0
    assert [line.split()[0] for line in out.splitlines() if line.startswith("  ")] == list(COMMANDS)


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("rnu", "command 'rnu'. Did you mean 'run'?"),
        ("--versoin", "option '--versoin'. Did you mean '--version'?"),
        ("--verbose", "option '--"),
    ],
)
def test_what_is_no_command_is_refused_in_a_line(tokenkl: Answer, word: str, said: str) -> None:
    code, out, err = tokenkl(word)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"error: tokenkl has no {said}")


def test_a_command_is_named_as_it_was_called(tokenkl: Answer) -> None:
    code, _, err = tokenkl("convert", "--in", "x")
    assert code == 2
    assert err.endswith("see tokenkl convert --help\n")
    # Its settings are a class of a module that is not the one that is started: pydantic finds their types there.
    code, out, err = tokenkl("clean", "--older-than", "7")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: older_than: must be a whole number with a unit")
    code, out, _ = tokenkl("backends", "files")
    assert code == 0
    assert out.startswith("files")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("tokenkl ", set(COMMANDS)),
        ("tokenkl  run --input-dir 'my  responses' --output", {"--output-dir"}),
    ],
)
def test_a_shell_is_told_which_words_may_follow(line: str, expected: set[str], tmp_path: Path) -> None:
    answer = tmp_path / "answer"
    asked = {"COMP_LINE": line, "COMP_POINT": str(len(line)), "_ARGCOMPLETE": "1", "_ARGCOMPLETE_IFS": "\n"}
    environment = os.environ | asked | {"_ARGCOMPLETE_STDOUT_FILENAME": str(answer)}
    call = [sys.executable, "-c", "from flows.doors.tokenkl import main; main()"]
    subprocess.run(call, cwd=ROOT, env=environment, check=True, timeout=60)
    assert {word.strip() for word in answer.read_text().split("\n")} >= expected


def test_init_writes_what_is_tracked_and_nothing_else(tokenkl: Answer, tmp_path: Path) -> None:
    listed = ["git", "ls-files", "examples", "automations", "prefect.yaml"]
    done = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("not a checkout")
    assert tokenkl("init", str(tmp_path / "demo"))[0] == 0
    written = {path.relative_to(tmp_path / "demo").as_posix() for path in (tmp_path / "demo").rglob("*.*")}
    assert {name for name in written if (tmp_path / "demo" / name).is_file()} == set(done.stdout.split())


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_completion_of_a_shell_is_printed(tokenkl: Answer, shell: str) -> None:
    code, out, _ = tokenkl("completion", shell)
    assert code == 0
    assert "tokenkl" in out
