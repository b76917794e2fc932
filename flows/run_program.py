"""``python -m flows.run``: flags in, exit code out."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence

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
from flows.terminal import console, print_lines, print_pairs

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
        print_pairs(console(), plan_rows(plan, config))
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


def show(report: RunReport) -> None:
    """Print the summary table, what is missing, and where the results are."""
    out = console()
    print_pairs(out, report.headline)
    lines = [f"warning: {warning}" for warning in report.warnings]
    lines += _counts("positions not measured", report.missing)
    lines += _counts("responses or files skipped", report.skipped)
    lines += _counts("places in the input repaired", report.repaired)
    print_lines(out, lines + report.paths)


def _counts(what: str, counts: Mapping[str, int]) -> list[str]:
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return [f"{what}: {count:,} ({reason})" for reason, count in ranked]
