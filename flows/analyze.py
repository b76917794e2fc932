"""``python -m flows.analyze``: a finished run's numbers again, and two runs side by side.

Works from the files of the output folders alone: asks no backend, starts no flow, writes nothing unless told to.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl
from rich.console import Console

from backends.errors import ConfigError
from backends.storage import as_location
from flows.commands.arguments import Parser, exit_code_of
from flows.commands.csv_files import ENDING, CsvTable, write_csv
from flows.commands.figures import write_figures
from flows.commands.many_runs import COLUMNS as CANDIDATE_COLUMNS
from flows.commands.many_runs import load_candidates, show_candidates
from flows.commands.report_file import open_page, write_report_of
from flows.commands.tables import history_cells, position_cells, print_table, response_cells, token_cells
from flows.commands.texts import ALARM, WARNING, headline_styles, warnings_of
from flows.commands.two_runs import show_comparison
from flows.folder.finished import load_run, with_texts_before, worst_positions, worst_responses
from flows.folder.output import write_json
from flows.runtime.terminal import console, print_lines, print_pairs
from flows.watch.history import load_history
from flows.watch.report import EXIT_COMPLETE
from kl.output.atomic import json_bytes
from kl.output.glance import figures
from kl.output.headline import headline
from kl.output.report.charts import report_charts
from kl.output.report.comparisons import Bar, candidates_chart, history_chart
from kl.output.report.drawing.svg import Chart
from kl.statistics.breakdowns import TOP_ROWS
from kl.statistics.paired import IncomparableRunsError
from kl.tables.totals import TokenTableError

_DESCRIPTION = (
    "Shows a finished run of flows.run from its output folder: the headline, and the worst tokens, positions and "
    "responses. With --compare, which of two models is nearer to P and by how much, from the paired difference of two "
    "runs over the same responses of P; of three or more, a table, the nearest first. With --history, all runs of a "
    "schedule, a line each. docs/reading-the-numbers.md says what each number means."
)
_EXAMPLES = (
    ("a run, and the ten worst of each kind", "results/quickstart --top 10"),
    ("the positions where the models differ most, to go on from", "results/quickstart --threshold 1 --out high.json"),
    ("which of several is nearest to P", "--compare results/int8 results/int4 results/int3 --csv candidates.csv"),
    ("the runs of a schedule", "--history results/nightly"),
)
_EPILOG = "exit codes: 0 shown; 2 a mistake in the call, no finished run in a folder, or runs that cannot be compared"
_DEFAULT_TOP = 20
_STANDARD_OUTPUT = "-"  # in place of a file for --json
_TOKEN_COLUMNS = ("token", "n_measured", "kl_sum", "kl_mean", "kl_share")
_POSITION_COLUMNS = (
    *("source_file", "response_idx", "position", "token", "kl_estimate", "kl_lower", "kl_upper_plausible"),
    *("logprob_p", "logprob_q", "reason", "before"),
)
_RESPONSE_COLUMNS = (
    *("source_file", "response_idx", "n_positions", "n_measured", "n_infinite", "kl_mean_per_token", "kl_sum"),
    *("kl_lower_sum", "max_kl", "max_kl_position", "same_top_rate", "finish_reason"),
)
_SCORE_NAMES = {"kl": "a KL", "lower": "a lower bound of the KL", "normalized": "a KL by the sum of the entropies"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Analyse from the command line; returns the exit code."""
    return exit_code_of(lambda: _analyze(sys.argv[1:] if arguments is None else arguments))


def _analyze(arguments: Sequence[str]) -> int:
    options = _parse(arguments)
    out = console(silent=options.json == _STANDARD_OUTPUT)
    try:
        shown = _shown(out, options)
    except (IncomparableRunsError, TokenTableError) as error:
        raise ConfigError(str(error)) from error
    except (pl.exceptions.PolarsError, OSError) as error:
        raise ConfigError(f"the results cannot be read: {' '.join(str(error).split())}") from error
    if options.report is not None:
        write_report_of(as_location(options.run_dir), as_location(options.report), options.top)
        print_lines(out, ["", options.report])
    if options.open:
        page = None if options.report is None else as_location(options.report)
        print_lines(out, ["", open_page(as_location(options.run_dir), page, options.top)])
    if options.csv is not None:
        print_lines(out, ["", *write_csv(options.csv, shown.tables)])
    if options.figures is not None:
        print_lines(out, ["", *_write_figures(options.figures, shown.charts)])
    if options.json == _STANDARD_OUTPUT:
        sys.stdout.write(json_bytes(shown.payload, indent=2).decode("utf-8") + "\n")
    elif options.json is not None:
        _write_json(as_location(options.json), shown.payload)
    return EXIT_COMPLETE


class _Shown(NamedTuple):
    """What was shown, unrounded: for ``--json``, as the tables of ``--csv``, and the ``charts`` that show it."""

    payload: dict[str, Any]
    tables: list[CsvTable]
    charts: Callable[[], Sequence[Chart | None]]


def _write_figures(place: str, charts: Callable[[], Sequence[Chart | None]]) -> list[str]:
    drawn = [chart for chart in charts() if chart is not None]
    return write_figures(place, drawn) if drawn else ["no figure: nothing has an estimate"]


def _shown(out: Console, options: argparse.Namespace) -> _Shown:
    if options.history is not None:
        return _show_history(out, options.history)
    if options.compare is not None:
        return _show_comparison(out, options)
    if options.threshold is not None:
        return _show_high(out, as_location(options.run_dir), options)
    return _show_run(out, as_location(options.run_dir), options.top)


def check_arguments(arguments: Sequence[str]) -> None:
    """Refuse a call before anything is shown.

    Raises
    ------
    ConfigError
        In one line.
    """
    _parse(arguments)


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser("analyze", _DESCRIPTION, _EXAMPLES, _EPILOG)
    parser.add_argument("run_dir", nargs="?", metavar="RUN_DIR",
                        help="Output folder of a finished run, local or in a bucket (gs://BUCKET/FOLDER).")  # fmt: skip
    parser.add_argument("--result-dir", metavar="RUN_DIR", help="The same as RUN_DIR.")
    parser.add_argument("--compare", nargs="+", metavar=("A", "B"),
                        help="Output folders of two or more finished runs over the same responses of P.")  # fmt: skip
    parser.add_argument("--label", action="append", default=[], metavar="RUN_DIR=TEXT",
                        help="What --compare says of a run beside its figures, such as its size; "
                        "may be repeated.")  # fmt: skip
    parser.add_argument("--history", metavar="PATH", help="A history.parquet, or the folder that it is in.")
    parser.add_argument("--top", "--top-k", dest="top", type=int, metavar="N",
                        help=f"Rows of each table of the worst, 1 to {TOP_ROWS}. Default: {_DEFAULT_TOP}.")  # fmt: skip
    parser.add_argument("--threshold", type=float, metavar="T",
                        help="Show the positions whose score is at least this, in place of the tables.")  # fmt: skip
    parser.add_argument("--score", choices=tuple(_SCORE_NAMES), default=None,
                        help="What is compared with --threshold: the KL (nats), its certified lower bound, or the KL "
                        "by the sum of both entropies. Default: kl.")  # fmt: skip
    parser.add_argument("--out", metavar="FILE",
                        help="Write the positions of --threshold with prompt, prefix, scores and both lists to this "
                        "file, as JSON: flows.sample goes on from it (continue_from).")  # fmt: skip
    parser.add_argument("--json", metavar="FILE",
                        help="Also write what is shown, unrounded, to this file; - writes it to standard output and "
                        "shows nothing else there.")  # fmt: skip
    parser.add_argument("--csv", metavar="DIR",
                        help="Also write what is shown, unrounded, as CSV files to this folder; where that is one "
                        "table (--compare, --history, --threshold), to this file if it ends with .csv.")  # fmt: skip
    parser.add_argument("--figures", metavar="DIR",
                        help="Also write the charts of what is shown to this folder, as SVG and, with the extra "
                        "figures, as PNG.")  # fmt: skip
    parser.add_argument("--open", action="store_true",
                        help="Open the page of the run (report.html) in the browser.")  # fmt: skip
    parser.add_argument("--report", metavar="FILE",
                        help="Also write the page of RUN_DIR, one HTML file that needs nothing else, to this file; "
                        "--top is how many of the worst responses and positions it shows.")  # fmt: skip
    options = parser.parse_args(arguments)
    if None not in (options.run_dir, options.result_dir):
        parser.error("RUN_DIR and --result-dir are one thing; give one of them")
    options.run_dir = options.run_dir or options.result_dir
    if sum(given is not None for given in (options.run_dir, options.compare, options.history)) != 1:
        parser.error("give either RUN_DIR or --compare A B … or --history PATH")
    if options.compare is not None and len(options.compare) < 2:
        parser.error("--compare takes two or more folders")
    options.label = _labels(parser, options)
    if options.run_dir is None and options.top is not None:
        parser.error(f"--top belongs to RUN_DIR, not to {'--compare' if options.compare else '--history'}")
    if options.threshold is not None and options.figures is not None:
        parser.error("--figures belongs to a run, --compare or --history, not to --threshold")
    if options.threshold is None and (options.score or options.out):
        parser.error("--score and --out belong to --threshold")
    given = {"threshold": options.threshold is not None, "report": options.report is not None, "open": options.open}
    if options.run_dir is None and any(given.values()):
        parser.error(f"--{next(name for name, is_given in given.items() if is_given)} belongs to RUN_DIR")
    if options.run_dir and options.threshold is None and (options.csv or "").endswith(ENDING):
        parser.error(f"--csv {options.csv}: a run is shown as several tables; give a folder")
    options.top = _DEFAULT_TOP if options.top is None else options.top
    if not 1 <= options.top <= TOP_ROWS:
        parser.error(f"--top is {options.top}; it goes from 1 to {TOP_ROWS}")
    return options


def _labels(parser: Parser, options: argparse.Namespace) -> dict[str, str]:
    """Folder of ``--compare`` → its label. A folder's name may hold a "=" itself."""
    labels: dict[str, str] = {}
    for text in options.label:
        folder = next((name for name in options.compare or [] if text.startswith(f"{name}=")), None)
        if folder is None:
            parser.error(f"--label {text}: give RUN_DIR=TEXT with a folder of --compare, written as there")
        labels[str(as_location(folder))] = text.removeprefix(f"{folder}=")
    return labels


def _write_json(path: Path, payload: Mapping[str, Any]) -> None:
    try:
        write_json(path, payload)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror or error}.") from error


def _show_run(out: Console, folder: Path, top: int) -> _Shown:
    run = load_run(folder)
    summary = run.summary
    tokens, positions, responses = summary.by_token[:top], worst_positions(run, top), worst_responses(run, top)
    rows = [("P", summary.model_p or "not stated"), ("Q", summary.model_q), *headline(summary)]
    print_lines(out, [f"warning: {alarm}" for alarm in summary.alarms], style=ALARM)
    print_pairs(
        out, rows, headline_styles(figures(summary), alarms=bool(summary.alarms), whole=summary.counts.complete)
    )
    others = [f"warning: {warning}" for warning in warnings_of(summary) if warning not in summary.alarms]
    print_lines(out, others, style=WARNING)
    print_table(out, "Tokens with the largest sum of KL, nats", token_cells(tokens))
    print_table(out, "Positions with the largest KL, nats", position_cells(positions))
    print_table(out, "Responses with the largest KL per token, nats", response_cells(responses))
    payload = {
        "run": str(folder),
        "headline": [list(row) for row in rows],
        "worst_tokens": tokens,
        "worst_positions": positions,
        "worst_responses": responses,
        "summary": summary.to_json(),
    }
    tables = [
        CsvTable("headline", ("figure", "text"), [{"figure": label, "text": text} for label, text in rows]),
        CsvTable("summary", ("figure", "value"), list(_leaves("", summary.to_json()))),
        CsvTable("worst_tokens", _TOKEN_COLUMNS, tokens),
        CsvTable("worst_positions", _POSITION_COLUMNS, positions),
        CsvTable("worst_responses", _RESPONSE_COLUMNS, responses),
    ]
    return _Shown(payload, tables, lambda: report_charts(summary, run.tokens, run.responses))


def _leaves(path: str, values: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The figures of a summary, each with its way through ``summary.json``, without its tables and lists."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(f"{path}{name}.", value)
        elif not isinstance(value, list):
            yield {"figure": f"{path}{name}", "value": value}


def _show_high(out: Console, folder: Path, options: argparse.Namespace) -> _Shown:
    from flows.commands.positions import continuations, high_positions  # late: only this needs the run's backend

    run, score = load_run(folder, with_lists=options.out is not None), options.score or "kl"
    rows = high_positions(run, options.threshold, score)
    shown = with_texts_before(run.tokens, rows[: options.top])
    count = f"{len(rows):,} of {run.summary.counts.measured:,} measured positions"
    title = f"{count} with {_SCORE_NAMES[score]} of at least {options.threshold:g}, the highest first"
    if rows:
        print_table(out, title, position_cells(shown))
    else:
        print_lines(out, [title])
    if options.out is not None:
        _write_json(as_location(options.out), continuations(run, rows))
        print_lines(out, [f"{len(rows):,} positions are in {options.out}"])
    columns = ("score", *_POSITION_COLUMNS[:-1])
    high = [{name: row[name] for name in columns} for row in rows]
    payload = {
        "run": str(folder),
        "score": score,
        "threshold": options.threshold,
        "n_positions": len(rows),
        # JSON has no infinity: null, and the reason says so.
        "positions": [row | {"score": None if math.isinf(row["score"]) else row["score"]} for row in high],
    }
    return _Shown(payload, [CsvTable("high_positions", columns, high)], list)


def _show_comparison(out: Console, options: argparse.Namespace) -> _Shown:
    folders = [as_location(folder) for folder in options.compare]
    if len(folders) == 2:
        payload = show_comparison(out, folders[0], folders[1], options.label)
        if options.csv is None and options.figures is None:
            return _Shown(payload, [], list)
        found = load_candidates(folders, options.label)
    else:
        found = load_candidates(folders, options.label)
        payload = show_candidates(out, found)
    bars = [
        Bar(" ".join(filter(None, (row["model_q"], row["label"]))), row["kl_per_token"], row["kl_low"], row["kl_high"])
        for row in found.rows
    ]
    return _Shown(payload, [CsvTable("candidates", CANDIDATE_COLUMNS, found.rows)], lambda: [candidates_chart(bars)])


def _show_history(out: Console, place: str) -> _Shown:
    frame = load_history(place)
    print_table(out, f"{frame.height:,} runs, the newest last; KL in nats", history_cells(frame))
    runs = frame.to_dicts()
    payload = {"history": place, "runs": json.loads(json.dumps(runs, default=str))}
    bars = [
        Bar(f"{run['started_at']:%Y-%m-%d}", run["kl_per_token"], run["kl_per_token_low"], run["kl_per_token_high"])
        for run in runs
    ]
    return _Shown(payload, [CsvTable("history", frame.columns, runs)], lambda: [history_chart(bars)])


if __name__ == "__main__":
    raise SystemExit(main())
