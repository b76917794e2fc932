"""``python -m flows.run``: flags in, exit code out."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence, Set
from typing import TYPE_CHECKING, Any, NoReturn

# What says the help, and that a run has begun, loads no more than this: arrays, tables and Prefect take seconds.
from flows.commands.arguments import (
    command_words,
    exit_code_of,
    make_parser,
    parse_config,
    result_of,
    returned,
    show_life,
)
from flows.config.models import RunConfig
from flows.config.templates import RunValues, names_the_run
from flows.runtime.environment import prepare_environment, say, start_own_server
from flows.runtime.server import OwnServer, begin_server, load_with_server
from flows.watch.report import (
    EXIT_COMPLETE,
    EXIT_ERROR,
    EXIT_INCOMPLETE,
    EXIT_INTERRUPTED,
    EXIT_WAITING,
    PendingReport,
    RunReport,
    last_written,
)

if TYPE_CHECKING:
    from flows.folder.layout import OutputFolder

_DESCRIPTION = (
    "KL(P‖Q) per token, response and data set. Model P wrote the responses in --input-dir, with its top "
    "log-probabilities; model Q (--model2) is asked, through a backend, what it would have said at every position. "
    "What was bought stays in OUTPUT_DIR/scores: run the same command again to go on after an interruption."
)
_EXAMPLES = (
    (
        "a small model in this process against itself in four bits",
        "--config examples/quickstart.yaml",
    ),
    ("what would be asked, and what it costs", "--config run.yaml --dry-run"),
    ("the settings of a file, with another model and folder", "--config run.yaml --model2 NAME --output-dir results/b"),
)

# How Prefect says that no server is there when a run begins.
_NO_ANSWER = "Failed to reach API"


def main(load_flow: Callable[[], Any], arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; returns the exit code.

    Parameters
    ----------
    load_flow : callable
        Gives the flow. It is called when the environment is prepared: it loads Prefect, which takes seconds.
    arguments : sequence of str, optional
        Default: those of this program.
    """
    return exit_code_of(lambda: _run(load_flow, sys.argv[1:] if arguments is None else arguments))


def _run(load_flow: Callable[[], Any], arguments: Sequence[str]) -> int:
    prepare_environment()
    skip = ("positions", "noise_floor", "alert")
    parser = make_parser("run", _DESCRIPTION, RunConfig, examples=_EXAMPLES, skip=skip)
    config = parse_config(parser, RunConfig, arguments)
    if config.dry_run:
        return _dry_run(config)
    show_life()
    return _run_flow(config, load_flow, begin_server(), arguments)


def _dry_run(config: RunConfig) -> int:
    from flows.config.comparison import Comparison
    from flows.runtime.terminal import console, print_pairs
    from flows.stages.dry_run import check_cost, check_readable, plan_rows, plan_without_calls

    comparison = Comparison.of(config, RunValues.of_a_dry_run())
    plan = plan_without_calls(comparison)
    print_pairs(console(), plan_rows(plan, comparison))
    check_readable(plan, config.input_dir)
    check_cost(plan, config.max_cost_usd)
    return EXIT_COMPLETE


def _run_flow(
    config: RunConfig, load_flow: Callable[[], Any], server: OwnServer | None, arguments: Sequence[str]
) -> int:
    # While the server's process loads; it makes nothing until all this is right.
    from flows.config.comparison import Comparison
    from flows.config.folders import pinning_flags
    from flows.folder.layout import OutputFolder
    from flows.stages.inputs import find_inputs

    comparison = Comparison.of(config, RunValues.of_a_dry_run())
    comparison.check()
    if not names_the_run(str(config.input_dir)):
        find_inputs(comparison.config)
    kl_divergence = load_with_server(load_flow, server)

    from httpx import HTTPError

    from flows.folder.room import NoRoomError
    from flows.runtime.interrupts import InterruptedRunError

    before = last_written()
    try:
        start_own_server()  # if there is none yet
        state = kl_divergence(config, return_state=True)
    except (HTTPError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not str(error).startswith(_NO_ANSWER):
            raise
        _leave_without_server(error, comparison.folder, server)
    stopped = returned(state)
    if isinstance(stopped, InterruptedRunError | NoRoomError):
        command = _command(arguments, pinning_flags(config, stopped.config))
    if isinstance(stopped, NoRoomError):
        say(f"error: {stopped} Go on with: {command}")
        return EXIT_ERROR
    if isinstance(stopped, InterruptedRunError):
        folder = OutputFolder(stopped.config.output_dir, stopped.config.scores_dir)
        stored = f"every answer that arrived is in {folder.scores}"
        say(f"stopped: {stored}; {stopped} Go on with: {command}")
        return EXIT_INTERRUPTED
    if isinstance(stopped, PendingReport):
        return _pending(stopped, config, arguments)
    if isinstance(stopped, RunReport) and state.is_failed():
        show(stopped)  # complete results; the state alone says that they are not as they should be
        return stopped.exit_code
    written = last_written()
    result = result_of(state) if stopped is not None or written is before else written
    if not isinstance(result, RunReport):
        return EXIT_ERROR
    show(result)
    return result.exit_code


def _leave_without_server(error: Exception, folder: OutputFolder, server: OwnServer | None) -> NoReturn:
    """The Prefect server answers no more: say what is on disk all the same, and end."""
    from prefect.settings import PREFECT_API_URL

    url = "of this run" if server is not None else PREFECT_API_URL.value() or "of this run"
    gone = f"the Prefect server {url} does not answer ({' '.join(str(error).split()) or type(error).__name__})"
    report = last_written()
    if report is None:
        kept = f"What was bought before is in {folder.scores}"
        todo = "Start the server, or unset PREFECT_API_URL to have one for the run; then run the same command again."
        say(f"error: {gone}. {kept}. {todo}")
        code = EXIT_ERROR
    else:
        show(report)
        say(f"warning: {gone}; it shows this run as running. The results above are whole.")
        code = report.exit_code
    sys.stdout.flush()
    sys.stderr.flush()
    # The usual end would offer every event of the run to the server again, for seconds each.
    os._exit(code)


def _pending(report: PendingReport, config: RunConfig, arguments: Sequence[str]) -> int:
    """Say what is waited for, and what comes next."""
    from flows.config.folders import pinning_flags
    from flows.runtime.terminal import console, print_lines

    lines = report.lines
    if report.name == "Submitted":
        assert report.config is not None, "a run that submitted has one"
        command = _command(arguments, [*pinning_flags(config, report.config), "--stage", "collect"])
        lines = [*lines, f"Collect with: {command}"]
    print_lines(console(), lines)
    if report.name in ("Submitted", "Unchanged"):
        return EXIT_COMPLETE if report.complete else EXIT_INCOMPLETE
    return EXIT_WAITING


def _command(arguments: Sequence[str], changes: Sequence[str]) -> str:
    """The call of this program with other values of some settings: flags, each followed by its value."""
    names = {flag.removeprefix("--").replace("-", "_") for flag in changes[::2]}
    return shlex.join([*command_words("run"), *without_settings(arguments, names), *changes])


def without_settings(arguments: Sequence[str], names: Set[str]) -> list[str]:
    """The arguments without what they say of some settings, by flag or by ``--set``, which would win over a flag."""
    kept: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        flag, equals, value = argument.partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        if flag == "--set" or name in names:
            value = value if equals else next(rest, "")
            name = value.partition("=")[0].strip() if flag == "--set" else name
            kept += [] if name in names else [f"{flag}={value}"] if equals else [flag, value]
        else:
            kept.append(argument)
    return kept


def show(report: RunReport) -> None:
    """Print what must be read first, the summary table, what is missing, and where the results are."""
    from flows.commands.texts import ALARM, WARNING, headline_styles
    from flows.runtime.terminal import console, print_lines, print_pairs

    out = console()
    print_lines(out, [f"warning: {alarm}" for alarm in report.alarms], style=ALARM)
    styles = headline_styles(report.figures, alarms=bool(report.alarms), whole=report.complete, verdict=report.verdict)
    print_pairs(out, report.headline, styles)
    others = [f"warning: {warning}" for warning in report.warnings if warning not in report.alarms]
    print_lines(out, others, style=WARNING)
    lines = _counts("positions not measured", report.missing)
    lines += _counts("responses or files skipped", report.skipped)
    lines += _counts("places in the input repaired", report.repaired)
    print_lines(out, lines + report.paths)


def _counts(what: str, counts: Mapping[str, int]) -> list[str]:
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return [f"{what}: {count:,} ({reason})" for reason, count in ranked]
