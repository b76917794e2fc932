"""The program ``tokenkl``: one name for all that ``python -m flows.NAME`` starts.

A script is no module of the folder in which it is started: there may be a ``flows`` of the user's own in that.
"""

from __future__ import annotations

import argparse
import os
import runpy
import sys
from importlib.metadata import version
from typing import NoReturn

from backends.errors import ConfigError, did_you_mean
from flows.commands.arguments import Parser, exit_code_of
from flows.watch.report import EXIT_COMPLETE

COMMANDS = {
    "init": "write the examples into a folder, to start from",
    "run": "compare the responses of P on disk with Q, per token",
    "sample": "let P write responses, with its log-probabilities",
    "pipeline": "sample, run and analyze by one file",
    "analyze": "show a finished run; compare several; the history of a schedule",
    "convert": "write the documented form of responses from what services log",
    "backends": "which backends there are, what they can, need and are told",
    "notify": "say what an event reports, as the deployment drift-alert does",
    "clean": "list or delete the batch files that a bucket still has",
    "completion": 'completion for a shell: eval "$(tokenkl completion bash)", or zsh, or fish',
}
_SHELLS = ("bash", "zsh", "fish")


def main() -> int:
    """Start what the first argument names; returns its exit code."""
    if "_ARGCOMPLETE" in os.environ:
        _complete(os.environ["COMP_LINE"][: int(os.environ["COMP_POINT"])])
    return exit_code_of(lambda: _start(sys.argv[1:]))


def _start(arguments: list[str]) -> int:
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help"):
        _say(_help())
    elif name in ("-V", "--version"):
        _say(f"tokenkl {version('tokenkl')}")
    elif name not in COMMANDS:
        what = "option" if name.startswith("-") else "command"
        meant = did_you_mean(name, [*COMMANDS, "--help", "--version"])
        raise ConfigError(f"tokenkl has no {what} {name!r}.{meant} Known: {', '.join(COMMANDS)}; see tokenkl --help")
    elif name == "completion":
        _completion(arguments[1:])
    else:
        _run(name, arguments[1:])
    return EXIT_COMPLETE


def _run(name: str, arguments: list[str]) -> NoReturn:
    # As python -m does, so that there is one way in: each door ends with the exit code of its program.
    sys.argv = [sys.argv[0], *arguments]
    runpy.run_module(f"flows.{name}", run_name="__main__")
    raise AssertionError(f"flows.{name} ends by itself")


def _completion(arguments: list[str]) -> None:
    from argcomplete import shellcode

    parser = Parser("completion", "Prints what makes a shell complete this program's words.", epilog="")
    parser.add_argument("shell", choices=_SHELLS)
    _say(shellcode(["tokenkl"], shell=parser.parse_args(arguments).shell))


def _complete(line: str) -> None:
    """Answer a shell: the words that may follow a line. Ends this program."""
    from argcomplete import autocomplete, split_line

    *_, words, _ = split_line(line)  # the whole ones, with the program's name
    name = words[1] if len(words) > 1 else ""
    if name in COMMANDS and name != "completion":
        os.environ["_ARGCOMPLETE"] = "2"  # the program's name is two words; its parser answers (commands/arguments.py)
        _run(name, [])
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("command", choices=COMMANDS)
    if name == "completion":
        parser.add_argument("shell", choices=_SHELLS)
    autocomplete(parser)


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = (f"  {name:<{width}}  {text}" for name, text in COMMANDS.items())
    return "\n".join(
        [
            "usage: tokenkl COMMAND …",
            "",
            "KL(P‖Q) per token between two language models.",
            "",
            *lines,
            "",
            "tokenkl COMMAND --help says what each is told. tokenkl --version says which one this is.",
        ]
    )


def _say(text: str) -> None:
    print(text)  # noqa: T201
