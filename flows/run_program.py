"""``python -m flows.run``: flags in, exit code out."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from flows.cli import (
    EXIT_COMPLETE,
    EXIT_ERROR,
    EXIT_INCOMPLETE,
    EXIT_INTERRUPTED,
    exit_code_of,
    make_parser,
    parse_config,
    result_of,
)
from flows.config import RunConfig, check_capabilities, resolve_backend
from flows.dry_run import check_cost, plan_rows, plan_without_calls
from flows.environment import prepare_environment
from flows.inputs import find_inputs
from flows.interrupts import InterruptedRunError
from flows.report import RunReport

_DESCRIPTION = (
    "KL(P‖Q) per token, response and data set. Model P wrote the responses in --input-dir, with its top "
    "log-probabilities; model Q (--model2) is asked, through a backend, what it would have said at every position. "
    "What was bought stays in OUTPUT_DIR/scores: run the same command again to go on after an interruption."
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; returns the exit code."""
    return exit_code_of(lambda: _run(sys.argv[1:] if arguments is None else arguments))


def _run(arguments: Sequence[str]) -> int:
    prepare_environment()
    parser = make_parser("python -m flows.run", _DESCRIPTION, RunConfig, skip=("positions",))
    config = parse_config(parser, RunConfig, arguments)
    backend, _, _ = resolve_backend(config)
    check_capabilities(config, backend)
    find_inputs(config)
    if config.dry_run:
        plan = plan_without_calls(config)
        show_rows(plan_rows(plan, config))
        check_cost(plan, config.max_cost_usd)
        return EXIT_COMPLETE
    # Imported late: it loads Prefect, whose settings were prepared above, and takes seconds.
    from flows.run import kl_divergence

    state = kl_divergence(config, return_state=True)
    stopped = state.result(raise_on_failure=False)
    if isinstance(stopped, InterruptedRunError):
        command = shlex.join(["python", "-m", "flows.run", *arguments])
        stored = f"every answer that arrived is in {config.output_dir / 'scores'}"
        print(f"stopped: {stored}; {stopped} Go on with: {command}", file=sys.stderr)  # noqa: T201
        return EXIT_INTERRUPTED
    result = result_of(state)
    if not isinstance(result, RunReport):
        return EXIT_ERROR
    show(result)
    return EXIT_COMPLETE if result.complete else EXIT_INCOMPLETE


def show_rows(rows: Sequence[tuple[str, str]]) -> None:
    """Print (label, text) rows as a table."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for label, text in rows:
        table.add_row(Text(label), Text(text))
    Console(highlight=False).print(table)


def show(report: RunReport) -> None:
    """Print the summary table, what is missing, and where the results are."""
    show_rows(report.headline)
    console = Console(highlight=False)
    for warning in report.warnings:
        console.print(Text(f"warning: {warning}"), soft_wrap=True)
    _counts(console, "not measured", "positions", report.missing)
    _counts(console, "skipped", "responses or files", report.skipped)
    _counts(console, "repaired", "places in the input", report.repaired)
    for path in report.paths:
        console.print(Text(path), soft_wrap=True)


def _counts(console: Console, label: str, unit: str, counts: dict[str, int]) -> None:
    for reason, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        console.print(Text(f"{label}: {count} {unit} ({reason})"), soft_wrap=True)
