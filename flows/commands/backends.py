"""``python -m flows.backends``: which backends there are, and what each can do, needs and is told."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict

from backends.registry import check_known, registered
from flows.commands.arguments import Parser, exit_code_of
from flows.config.catalogue import BackendText, describe, full_text, short_text
from flows.watch.report import EXIT_COMPLETE, EXIT_ERROR

_DESCRIPTION = (
    "Which backends are installed, from where, what each can be (P writes responses, Q is asked about them), what it "
    "needs, and its options with their bounds. Nothing is asked of any service."
)
_EXAMPLES = (("the options of one", "vertex_batch"), ("everything, for a program", "--json"))
_EPILOG = "exit codes: 0 all can be used; 1 one that was named, or a plugin, cannot be loaded; 2 a mistake in the call"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; returns the exit code."""
    return exit_code_of(lambda: _run(sys.argv[1:] if arguments is None else arguments))


def _run(arguments: Sequence[str]) -> int:
    parser = Parser("backends", _DESCRIPTION, _EXAMPLES, _EPILOG)
    parser.add_argument("names", nargs="*", metavar="NAME", help="Describe these in full. Default: all, in short.")
    parser.add_argument("--json", action="store_true", help="Everything, as JSON.")
    called = parser.parse_args(arguments)
    known = registered()
    for name in called.names:
        check_known(name, known)
    found = [describe(name, known[name]) for name in called.names or sorted(known)]
    if called.json:
        lines: Iterator[str] = iter([json.dumps([_record(each) for each in found], indent=2, ensure_ascii=False)])
    else:
        lines = (line for each in found for line in (full_text(each) if called.names else short_text(each)))
    print("\n".join(lines))  # noqa: T201
    return EXIT_ERROR if any(each.problem for each in found) else EXIT_COMPLETE


def _record(each: BackendText) -> dict[str, object]:
    can = None if each.capabilities is None else each.capabilities._asdict()
    return asdict(each) | {"roles": each.roles, "capabilities": can}
