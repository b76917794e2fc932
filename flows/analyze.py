"""``python -m flows.analyze``: a finished run's numbers again, and two runs side by side.

Works from the files of the output folders alone: asks no backend, starts no flow, writes nothing unless told to.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

import polars as pl
from rich.console import Console
from rich.table import Table
from rich.text import Text

from backends.errors import ConfigError
from backends.storage import as_location
from flows.commands.arguments import EXIT_COMPLETE, exit_code_of
from flows.commands.tables import history_cells, load_history
from flows.folder.finished import FinishedRun, Rows, load_run, worst_positions, worst_responses
from flows.folder.output import write_json
from flows.runtime.terminal import console, print_lines, print_pairs
from kl.output.headline import headline
from kl.statistics.breakdowns import TOP_ROWS
from kl.statistics.intervals import CONFIDENCE, Estimate
from kl.statistics.paired import IncomparableRunsError, PairedDifference, paired_difference
from kl.statistics.summary import Summary
from kl.tables.totals import INFINITE, TokenTableError

_DESCRIPTION = (
    "Shows a finished run of flows.run from its output folder: the headline, and the worst tokens, positions and "
    "responses. With --compare, which of two models is nearer to P and by how much, from the paired difference of two "
    "runs over the same responses of P. With --history, all runs of a schedule, a line each. "
    "docs/reading-the-numbers.md says what each number means."
)
_EPILOG = (
    "examples: python -m flows.analyze results/quickstart --top 10 | "
    "python -m flows.analyze --compare results/int8 results/int4 | "
    "python -m flows.analyze --history results/nightly | "
    "exit codes: 0 shown; 2 a mistake in the call, no finished run in a folder, or runs that cannot be compared"
)
_DEFAULT_TOP = 20
_PERCENT = f"{100 * CONFIDENCE:.0f} % CI"


def main(arguments: Sequence[str] | None = None) -> int:
    """Analyse from the command line; returns the exit code."""
    return exit_code_of(lambda: _analyze(sys.argv[1:] if arguments is None else arguments))


def _analyze(arguments: Sequence[str]) -> int:
    options = _parse(arguments)
    try:
        payload = _shown(options)
    except (IncomparableRunsError, TokenTableError) as error:
        raise ConfigError(str(error)) from error
    except (pl.exceptions.PolarsError, OSError) as error:
        raise ConfigError(f"the results cannot be read: {' '.join(str(error).split())}") from error
    if options.json is not None:
        _write_json(as_location(options.json), payload)
    return EXIT_COMPLETE


def _shown(options: argparse.Namespace) -> dict[str, Any]:
    if options.history is not None:
        return _show_history(options.history)
    folders = [as_location(folder) for folder in options.compare or [options.run_dir]]
    return _show_comparison(*folders) if options.compare else _show_run(folders[0], options.top)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see {self.prog} --help")


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = _Parser(prog="python -m flows.analyze", description=_DESCRIPTION, epilog=_EPILOG, allow_abbrev=False)
    parser.add_argument("run_dir", nargs="?", metavar="RUN_DIR",
                        help="Output folder of a finished run, local or in a bucket (gs://BUCKET/FOLDER).")  # fmt: skip
    parser.add_argument("--compare", nargs=2, metavar=("A", "B"),
                        help="Output folders of two finished runs over the same responses of P.")  # fmt: skip
    parser.add_argument("--history", metavar="PATH", help="A history.parquet, or the folder that it is in.")
    parser.add_argument("--top", type=int, metavar="N",
                        help=f"Rows of each table of the worst, 1 to {TOP_ROWS}. Default: {_DEFAULT_TOP}.")  # fmt: skip
    parser.add_argument("--json", metavar="FILE", help="Also write what is shown, unrounded, to this file.")
    options = parser.parse_args(arguments)
    if sum(given is not None for given in (options.run_dir, options.compare, options.history)) != 1:
        parser.error("give either RUN_DIR or --compare A B or --history PATH")
    if options.run_dir is None and options.top is not None:
        parser.error(f"--top belongs to RUN_DIR, not to {'--compare' if options.compare else '--history'}")
    options.top = _DEFAULT_TOP if options.top is None else options.top
    if not 1 <= options.top <= TOP_ROWS:
        parser.error(f"--top is {options.top}; it goes from 1 to {TOP_ROWS}")
    return options


def _write_json(path: Path, payload: Mapping[str, Any]) -> None:
    try:
        write_json(path, payload)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror or error}.") from error


# One run.


def _show_run(folder: Path, top: int) -> dict[str, Any]:
    run = load_run(folder)
    summary = run.summary
    tokens, positions, responses = summary.by_token[:top], worst_positions(run, top), worst_responses(run, top)
    rows = [("P", summary.model_p or "not stated"), ("Q", summary.model_q), *headline(summary)]
    out = console()
    print_pairs(out, rows)
    print_lines(out, [f"warning: {warning}" for warning in _warnings(summary)])
    _print_table(out, "Tokens with the largest sum of KL, nats", _token_cells(tokens))
    _print_table(out, "Positions with the largest KL, nats", _position_cells(positions))
    _print_table(out, "Responses with the largest KL per token, nats", _response_cells(responses))
    return {
        "run": str(folder),
        "headline": [list(row) for row in rows],
        "worst_tokens": tokens,
        "worst_positions": positions,
        "worst_responses": responses,
        "summary": summary.to_json(),
    }


def _warnings(summary: Summary) -> list[str]:
    """The run's warnings, and what its alignment diagnostic found."""
    reasons: Sequence[str] = (summary.alignment or {}).get("reasons", ())
    return [*summary.warnings, *(reason for reason in reasons if reason not in " ".join(summary.warnings))]


def _token_cells(rows: Rows) -> Rows:
    return [
        {
            "token": _quoted(row["token"]),
            "positions": f"{row['n_measured']:,}",
            "sum": _number(row["kl_sum"]),
            "mean": _number(row["kl_mean"]),
            "share": "" if row["kl_share"] is None else f"{row['kl_share']:.1%}",
        }
        for row in rows
    ]


def _position_cells(rows: Rows) -> Rows:
    return [
        {
            "response, position": f"{row['source_file']}#{row['response_idx']}, {row['position']}",
            "text before": _quoted(row["before"] or ""),
            "token": _quoted(row["token"]),
            "KL": "infinite" if row["reason"] == INFINITE else _number(row["kl_estimate"]),
            "lower": _number(row["kl_lower"]),
            "upper": _number(row["kl_upper_plausible"], "not identified"),
            "log p": _number(row["logprob_p"], "not stated"),
            "log q": _number(row["logprob_q"], "not listed"),
        }
        for row in rows
    ]


def _response_cells(rows: Rows) -> Rows:
    return [
        {
            "response": f"{row['source_file']}#{row['response_idx']}",
            "measured": f"{row['n_measured']:,} of {row['n_positions']:,}",
            "per token": _number(row["kl_mean_per_token"], "infinite"),
            "sum": _number(row["kl_sum"], "infinite"),
            "lower sum": _number(row["kl_lower_sum"], "not known"),
            "largest": _number(row["max_kl"], "infinite"),
            "at position": "" if row["max_kl_position"] is None else f"{row['max_kl_position']:,}",
            "same top": "" if row["same_top_rate"] is None else f"{row['same_top_rate']:.1%}",
        }
        for row in rows
    ]


# Many runs.


def _show_history(place: str) -> dict[str, Any]:
    frame = load_history(place)
    _print_table(console(), f"{frame.height:,} runs, the newest last; KL in nats", history_cells(frame))
    return {"history": place, "runs": json.loads(json.dumps(frame.to_dicts(), default=str))}


# Two runs.


def _show_comparison(folder_a: Path, folder_b: Path) -> dict[str, Any]:
    a, b = load_run(folder_a), load_run(folder_b)
    column = comparable_column(a.summary, b.summary)
    difference = paired_difference(_with_estimate(a, column), _with_estimate(b, column))
    lines = [
        f"P = {a.summary.model_p or 'not stated'}",
        f"A = {a.summary.model_q} ({folder_a}): {_value_text(difference.a_per_token)}",
        f"B = {b.summary.model_q} ({folder_b}): {_value_text(difference.b_per_token)}",
        verdict(difference.per_token, "token"),
        verdict(difference.per_response, "response"),
        _paired_over(difference, _measure_name(a.summary, column)),
        *(f"warning: {note}" for note in _notes(a.summary, b.summary, column)),
        *(f"warning: {side}: {text}" for side, run in (("A", a), ("B", b)) for text in _warnings(run.summary)),
    ]
    print_lines(console(), lines)
    return {
        "a": str(folder_a),
        "b": str(folder_b),
        "compared_by": column,
        "difference_is": "KL(P‖A) - KL(P‖B) in nats: positive where B is nearer to P",
        "lines": lines,
        **asdict(difference),
    }


def comparable_column(a: Summary, b: Summary) -> str:
    """The column of the token table to compare two runs by: it means the same in both.

    The exact KL where both have it throughout; else what both report, if by one estimator; else the censored estimate,
    which every run has. Two estimators miss different parts of one KL, and would make two equal models look different.
    """
    if _exact_throughout(a) and _exact_throughout(b):
        return "kl_exact"
    return "kl_estimate" if a.estimator == b.estimator else "kl_censored"


def _exact_throughout(summary: Summary) -> bool:
    infinite = summary.counts.bounds_only_by_reason.get(INFINITE, 0)
    return 0 < summary.counts.measured == summary.kl_per_token.exact.n + infinite


def _with_estimate(run: FinishedRun, column: str) -> pl.LazyFrame:
    if column == "kl_estimate":
        return run.tokens
    # Rows without a point estimate keep their reason and stay without one.
    return run.tokens.with_columns(kl_estimate=pl.when(pl.col("error").is_null()).then(column))


def _notes(a: Summary, b: Summary, column: str) -> Iterator[str]:
    if column == "kl_exact":
        return
    if column == "kl_censored":
        yield (
            f"A reports the estimator {a.estimator!r}, B {b.estimator!r}; they are compared by their censored "
            "estimates."
        )
    elif a.estimator != "censored":
        yield (
            f"both report the estimator {a.estimator!r}, which misses more of a large KL than of a small one; the "
            "difference is understated. Run both with the estimator 'censored'; no score is bought again."
        )
    if a.top_logprobs != b.top_logprobs:
        yield (
            f"A was measured with {a.top_logprobs} candidates per position, B with {b.top_logprobs}; part of the "
            "difference may come from that."
        )


def verdict(difference: Estimate, unit: str) -> str:
    """KL(P‖A) - KL(P‖B) with its interval, in a sentence; ``unit`` is ``token`` or ``response``."""
    value, low, high = difference.value, difference.ci_low, difference.ci_high
    if value is None:
        return f"The difference per {unit} is not known: {difference.no_interval}."
    further, nearer = ("A", "B") if value > 0 else ("B", "A")
    if low is None or high is None:
        return (
            f"{further} is further from P than {nearer} by {_number(abs(value))} nats per {unit} in these data, but "
            f"without an interval ({difference.no_interval}) chance is not excluded."
            if value
            else f"The means per {unit} are equal, without an interval ({difference.no_interval})."
        )
    if low == high == 0:
        return f"A and B are equally far from P: the difference per {unit} is 0 for every prompt."
    if low <= 0 <= high:
        interval = f"{_PERCENT} {_signed(low, difference)} to {_signed(high, difference)}"
        return (
            f"A and B cannot be told apart per {unit}: the difference is {_signed(value, difference)} nats "
            f"({interval}, {difference.n_clusters:,} prompts; above 0 B is nearer to P)."
        )
    near, far = sorted((abs(low), abs(high)))
    size, near_text, far_text = (_rounded(number, difference) for number in (abs(value), near, far))
    return (
        f"{further} is further from P than {nearer} by {size} nats per {unit} "
        f"({_PERCENT} {near_text} to {far_text}, {difference.n_clusters:,} prompts)."
    )


def _value_text(estimate: Estimate) -> str:
    if estimate.value is None:
        return f"not known: {estimate.no_interval}"
    text = f"{_rounded(estimate.value, estimate)} nats per token"
    if estimate.ci_low is None or estimate.ci_high is None:
        return f"{text} (no interval: {estimate.no_interval})"
    return f"{text} ({_PERCENT} {_rounded(estimate.ci_low, estimate)} to {_rounded(estimate.ci_high, estimate)})"


def _measure_name(summary: Summary, column: str) -> str:
    if column == "kl_exact":
        return "exact KL"
    return f"{summary.estimator if column == 'kl_estimate' else 'censored'} estimate"


def _paired_over(difference: PairedDifference, what: str) -> str:
    text = f"Paired by the {what} over {difference.n_positions:,} positions that both runs measured"
    only = [f"{n:,} only {side} measured" for side, n in (("A", difference.n_only_a), ("B", difference.n_only_b)) if n]
    return f"{text}; left out: {', '.join(only)}." if only else f"{text}."


# Texts.


def _rounded(value: float, estimate: Estimate) -> str:
    """With two digits of the standard error."""
    if not estimate.se:
        return _number(value)
    return f"{value:,.{max(0, 1 - math.floor(math.log10(estimate.se)))}f}"


def _signed(value: float, estimate: Estimate) -> str:
    return _rounded(value, estimate) if value <= 0 else f"+{_rounded(value, estimate)}"


def _number(value: float | None, unknown: str = "") -> str:
    if value is None:
        return unknown
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"


def _quoted(text: str) -> str:
    # As a literal, so that spaces, line breaks and control characters are seen and the terminal is left alone.
    return repr(text)


def _print_table(out: Console, title: str, rows: Rows) -> None:
    out.print()
    out.print(Text(title, style="bold"))
    if not rows:
        out.print("none: nothing has an estimate")
        return
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for name in rows[0]:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row.values()))
    out.print(table)


if __name__ == "__main__":
    raise SystemExit(main())
