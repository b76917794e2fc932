"""``python -m flows.sample``: flags in, exit code out."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from flows.commands.arguments import (
    command_words,
    exit_code_of,
    make_parser,
    parse_config,
    result_of,
    returned,
    show_life,
)
from flows.config.sampling import SampleConfig
from flows.config.templates import RunValues
from flows.runtime.environment import prepare_environment, say, start_own_server
from flows.runtime.server import begin_server, load_with_server
from flows.watch.report import EXIT_COMPLETE, EXIT_ERROR, EXIT_INCOMPLETE, EXIT_INTERRUPTED

if TYPE_CHECKING:
    from flows.sampling.asking import SampleReport

_DESCRIPTION = (
    "Let one model or several write responses to the prompts of the configuration file, one JSON file per prompt, with "
    "the top log-probabilities at every position: what flows.run reads as P. Responses that are there already are left "
    "alone, and each is on disk when it comes: run the same command again to go on after an interruption."
)
_EXIT_CODES = (
    "exit codes: 0 all responses are written; 3 some are missing, each with its reason; 2 a mistake in the settings or "
    "the call; 130 stopped by a signal; 1 anything else"
)
_EXAMPLES = (
    ("the prompts and settings of a file", "--config examples/sample.yaml --output-dir responses"),
    (
        "without a file of settings; a prompt a line",
        "--backend local --model1 smollm2-135m --output-dir responses "
        "--set dataset.file=examples/prompts.txt --dry-run",
    ),
    ("go on from the positions where two models differ most", "--config sample.yaml --continue-from high.json"),
)
NO_FLAGS = ("models", "prompts", "dataset", "sampling", "output", "api")


def main(load_flow: Callable[[], Any], arguments: Sequence[str] | None = None) -> int:
    """Run from the command line, as `flows.commands.run.main`; returns the exit code."""
    return exit_code_of(lambda: _run(load_flow, sys.argv[1:] if arguments is None else arguments))


def _run(load_flow: Callable[[], Any], arguments: Sequence[str]) -> int:
    prepare_environment()
    parser = make_parser(
        "sample",
        _DESCRIPTION,
        SampleConfig,
        examples=_EXAMPLES,
        epilog=_EXIT_CODES,
        skip=NO_FLAGS,
        required=("model1", "output_dir"),
    )
    config = parse_config(parser, SampleConfig, arguments)
    if config.dry_run:
        return _dry_run(config)
    show_life()
    server = begin_server()
    # While its process loads; it makes nothing until all this is right.
    from flows.sampling.plan import check_sampling

    check_sampling(config)
    sample_responses = load_with_server(load_flow, server)
    start_own_server()  # if there is none yet

    from flows.folder.room import NoRoomError
    from flows.runtime.interrupts import InterruptedRunError

    state = sample_responses(config, return_state=True)
    stopped = returned(state)
    if isinstance(stopped, InterruptedRunError | NoRoomError):
        command = shlex.join([*command_words("sample"), *arguments])
    if isinstance(stopped, NoRoomError):
        say(f"error: {stopped} Go on with: {command}")
        return EXIT_ERROR
    if isinstance(stopped, InterruptedRunError):
        say(f"stopped: every response that arrived is on disk; {stopped} Go on with: {command}")
        return EXIT_INTERRUPTED
    report: SampleReport | None = result_of(state)
    if report is None:
        return EXIT_ERROR
    return show(report)


def _dry_run(config: SampleConfig) -> int:
    from flows.runtime.terminal import console, print_pairs
    from flows.sampling.plan import check_cost, plan_rows, plan_sampling, with_folder

    plan = plan_sampling(with_folder(config, RunValues.of_a_dry_run()), make_identity=False)
    print_pairs(console(), plan_rows(plan))
    check_cost(plan)
    return EXIT_COMPLETE


def show(report: SampleReport) -> int:
    """Print the files, and on standard error how many they are and what is missing; returns the exit code."""
    for path in report.paths:
        print(path)  # noqa: T201
    left_alone = (
        f", {report.n_left_alone:,} of them were there already and are left alone" if report.n_left_alone else ""
    )
    lines = [f"{report.n_responses:,} responses in {len(report.paths):,} files{left_alone}"]
    lines += [f"responses missing: {count:,} ({reason})" for reason, count in report.missing.items()]
    if report.unreadable:
        lines.append(f"responses that flows.run would skip: {report.unreadable:,}")
    if report.n_unusable_prompts:
        lines.append(f"prompts that cannot be used: {report.n_unusable_prompts:,}")
    for line in lines:
        say(line)
    return EXIT_COMPLETE if report.complete else EXIT_INCOMPLETE
