"""``python -m flows.notify``: the flow ``drift-alert`` by hand, as a trigger in ``prefect.yaml`` starts it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

from flows.commands.arguments import Parser, add_levels, exit_code_of, take_level
from flows.runtime.environment import prepare_environment, say, start_own_server
from flows.runtime.server import begin_server, load_with_server
from flows.watch.report import EXIT_COMPLETE, EXIT_ERROR

_DESCRIPTION = (
    "Runs the flow drift-alert by hand: it says in the log, in its final state and in an artifact what an event "
    "reports. Deployed (prefect.yaml, docs/deploying.md), it is started by the events tokenkl.drift.detected and "
    "tokenkl.model-version.changed, with what they carry. By hand it shows what that looks like, and sets off what you "
    "have follow from it."
)
_EXAMPLES = (("an alert as a run that drifted sends it", "tokenkl.drift.detected model2=NAME results=results/nightly"),)
_EPILOG = "exit codes: 0 it is said; 2 a mistake in the call; 1 anything else"


def main(load_flow: Callable[[], Any], arguments: Sequence[str] | None = None) -> int:
    """Run from the command line, as `flows.commands.run.main`; returns the exit code."""
    return exit_code_of(lambda: _run(load_flow, sys.argv[1:] if arguments is None else arguments))


def _run(load_flow: Callable[[], Any], arguments: Sequence[str]) -> int:
    prepare_environment()
    parser = Parser("notify", _DESCRIPTION, _EXAMPLES, _EPILOG)
    parser.add_argument("event", metavar="EVENT", help="Name of the event.")
    parser.add_argument("payload", metavar="NAME=VALUE", nargs="*", help="What the event carries.")
    add_levels(parser)
    called = parser.parse_args(arguments)
    take_level(called.level)
    pairs = [text.partition("=") for text in called.payload]
    for name, equals, _ in pairs:
        if not (name and equals):
            parser.error(f"{name or equals} is not NAME=VALUE")
    drift_alert = load_with_server(load_flow, begin_server())
    start_own_server()  # if there is none yet
    state = drift_alert(called.event, {name: value for name, _, value in pairs}, return_state=True)
    if state.is_completed():
        print(state.message)  # noqa: T201
        return EXIT_COMPLETE
    say(f"error: {state.message}")
    return EXIT_ERROR
