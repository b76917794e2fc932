"""``python -m flows.sample``: flags in, exit code out."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

from flows.commands.arguments import exit_code_of, make_parser, parse_config, result_of, show_life
from flows.config.models import SampleConfig
from flows.runtime.environment import prepare_environment, start_own_server
from flows.runtime.server import begin_server, load_with_server
from flows.watch.report import EXIT_COMPLETE, EXIT_ERROR

_DESCRIPTION = (
    "Let model P (--model1) write responses to the prompts of the configuration file, one JSON file per prompt, with "
    "its top log-probabilities at every position. Files that are there already are left alone."
)

_EXIT_CODES = "exit codes: 0 all responses are written; 2 a mistake in the settings or the call; 1 anything else"


def main(load_flow: Callable[[], Any], arguments: Sequence[str] | None = None) -> int:
    """Run from the command line, as `flows.commands.run.main`; returns the exit code."""
    return exit_code_of(lambda: _run(load_flow, sys.argv[1:] if arguments is None else arguments))


def _run(load_flow: Callable[[], Any], arguments: Sequence[str]) -> int:
    prepare_environment()
    parser = make_parser(
        "python -m flows.sample", _DESCRIPTION, SampleConfig, skip=("prompts", "sampling"), epilog=_EXIT_CODES
    )
    config = parse_config(parser, SampleConfig, arguments)
    show_life()
    server = begin_server()
    # While it starts.
    from flows.config.backend import resolve_backend

    resolve_backend(config)
    sample_responses = load_with_server(load_flow, server)
    start_own_server()  # if there is none yet
    result = result_of(sample_responses(config, return_state=True))
    if not isinstance(result, list):
        return EXIT_ERROR
    for path in result:
        print(path)  # noqa: T201
    return EXIT_COMPLETE
