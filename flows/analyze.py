"""``python -m flows.analyze``: a finished run's numbers again, and two runs side by side.

Works from the files of the output folders alone; asks no backend, starts no flow and writes nothing unless asked to.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl
from rich.console import Console
from rich.table import Table
from rich.text import Text

from backends.errors import ConfigError
from flows.cli import EXIT_COMPLETE, exit_code_of
from kl.breakdowns import TOP_ROWS
from kl.headline import headline
from kl.intervals import CONFIDENCE, Estimate
from kl.paired import IncomparableRunsError, PairedDifference, paired_difference
from kl.response_table import RESPONSES
from kl.results import write_json_atomic
from kl.schemas import TOKENS
from kl.summary import FORMAT, Counts, DeltaP, Divergence, Identification, SampledToken, Summary
from kl.token_table import INFINITE, IS_INFINITE, MEASURED, TokenTableError

Rows = list[dict[str, Any]]

_NEEDED = ("tokens.parquet", "responses.parquet", "summary.json", "run.json")
_UNFINISHED = ".parts"  # put there when a run begins to measure, removed when everything is written
_CONTEXT_TOKENS = 8  # shown before a position
_DESCRIPTION = (
    "Shows a finished run of flows.run from its output folder: the headline, and the worst tokens, positions and "
    "responses. With --compare, how much nearer to P one of two models is, from the paired difference of two runs "
    "over the same responses."
)
_EPILOG = (
    "examples: python -m flows.analyze results/quickstart --top 10; "
    "python -m flows.analyze --compare results/int8 results/int4. "
    "exit codes: 0 shown; 2 a mistake in the call, or a folder that holds no finished run, or runs that cannot be "
    "compared. docs/reading-the-numbers.md says what each number means."
)


class Run(NamedTuple):
    """A finished run: where it is, its summary, its token table and its response table (both lazy)."""

    folder: Path
    summary: Summary
    tokens: pl.LazyFrame
    responses: pl.LazyFrame


def main(arguments: Sequence[str] | None = None) -> int:
    """Analyse from the command line; returns the exit code."""
    return exit_code_of(lambda: _analyze(sys.argv[1:] if arguments is None else arguments))


def _analyze(arguments: Sequence[str]) -> int:
    options = _parse(arguments)
    try:
        payload = _show_comparison(*options.compare) if options.compare else _show_run(options.run_dir, options.top)
    except (IncomparableRunsError, TokenTableError, pl.exceptions.PolarsError) as error:
        raise ConfigError(" ".join(str(error).split())) from error
    if options.json is not None:
        _write_json(options.json, payload)
    return EXIT_COMPLETE


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise ConfigError(f"{message}; see {self.prog} --help")


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = _Parser(prog="python -m flows.analyze", description=_DESCRIPTION, epilog=_EPILOG, allow_abbrev=False)
    parser.add_argument("run_dir", nargs="?", type=Path, metavar="RUN_DIR", help="Output folder of a finished run.")
    parser.add_argument(
        "--compare",
        nargs=2,
        type=Path,
        metavar=("A", "B"),
        help="Output folders of two runs over the same responses of P, with different models Q (or settings).",
    )
    parser.add_argument(
        "--top", type=int, metavar="N", help=f"Rows of each table of worst ones, 1 to {TOP_ROWS}. Default: 20."
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="Also write what is shown, in full, to this file.")
    options = parser.parse_args(arguments)
    if (options.run_dir is None) == (options.compare is None):
        parser.error("give either RUN_DIR or --compare A B")
    if options.compare and options.top is not None:
        parser.error("--top belongs to RUN_DIR, not to --compare")
    options.top = 20 if options.top is None else options.top
    if not 1 <= options.top <= TOP_ROWS:
        parser.error(f"--top is {options.top}; it goes from 1 to {TOP_ROWS}")
    return options


def _write_json(path: Path, payload: Mapping[str, Any]) -> None:
    try:
        write_json_atomic(path, payload)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}.") from error


# Loading.


def load_run(folder: Path) -> Run:
    """A finished run from its output folder.

    Raises
    ------
    ConfigError
        If there is no finished run, or its files were written by another version or do not belong together.
    """
    if not folder.is_dir():
        raise ConfigError(f"{folder} is no folder; give the output folder of a run.")
    if (folder / _UNFINISHED).exists():
        raise ConfigError(f"the run in {folder} is not finished: run the same command again, or wait for it to end.")
    missing = [name for name in _NEEDED if not (folder / name).is_file()]
    if missing:
        raise ConfigError(f"{folder} holds no finished run: {', '.join(missing)} not found. Run flows.run to its end.")
    summary = _load_summary(folder / "summary.json")
    tokens, responses = (_scan(folder / f"{name}.parquet") for name in ("tokens", "responses"))
    _check_columns(folder, tokens, responses)
    n_rows = int(tokens.select(pl.len()).collect().item())
    if n_rows != summary.counts.positions:
        raise ConfigError(
            f"the files in {folder} are not of one run: summary.json speaks of {summary.counts.positions:,} positions, "
            f"tokens.parquet holds {n_rows:,}. Run the same command again."
        )
    return Run(folder, summary, tokens, responses)


def _scan(path: Path) -> pl.LazyFrame:
    # A bracket or "=" in a folder's name is neither a pattern nor a partition.
    return pl.scan_parquet(path, glob=False, hive_partitioning=False)


def _check_columns(folder: Path, tokens: pl.LazyFrame, responses: pl.LazyFrame) -> None:
    for name, frame, schema in (("tokens", tokens, TOKENS), ("responses", responses, RESPONSES)):
        try:
            absent = [column for column in schema if column not in frame.collect_schema()]
        except (pl.exceptions.PolarsError, OSError) as error:
            detail = " ".join(str(error).split())
            raise ConfigError(f"{folder / name}.parquet cannot be read: {detail}") from error
        if absent:
            raise _other_version(folder / f"{name}.parquet", f"it lacks the columns {', '.join(absent)}")


def _load_summary(path: Path) -> Summary:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}. Run the same command again.") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise _other_version(path, f"its format is not {FORMAT}")
    try:
        return summary_from_json(data)
    except (KeyError, TypeError) as error:
        raise _other_version(path, str(error)) from error


def _other_version(path: Path, why: str) -> ConfigError:
    return ConfigError(f"{path} was written by another version ({why}). Run the same command again; scores are kept.")


def summary_from_json(data: Mapping[str, Any]) -> Summary:
    """The inverse of `Summary.to_json`.

    Raises
    ------
    KeyError, TypeError
        If a field is absent or unknown.
    """
    estimates = (
        *("reverse_kl_per_token", "reverse_kl_lower_per_token", "js_per_token", "js_lower_per_token"),
        *("tv_lower_per_token", "same_top_p"),
    )
    sampled, delta = data["sampled_token"], data["delta_p"]
    typed = {name: Estimate(**data[name]) for name in estimates} | {
        name: Divergence(**{key: Estimate(**value) for key, value in data[name].items()})
        for name in ("kl_per_token", "kl_per_response")
    }
    means = ("k1_per_token", "k1_per_response", "k3_per_token", "k3_per_response")
    known = {name: None if sampled[name] is None else Estimate(**sampled[name]) for name in means}
    return Summary(
        **{
            **data,
            **typed,
            "counts": Counts(**data["counts"]),
            "identification": Identification(**data["identification"]),
            "delta_p": DeltaP(**(delta | {"mean": Estimate(**delta["mean"])})),
            "sampled_token": SampledToken(**(sampled | known)),
        }
    )


# One run.


def _show_run(folder: Path, top: int) -> dict[str, Any]:
    run = load_run(folder)
    console = Console(highlight=False)
    rows = headline(run.summary)
    _print_pairs(console, [("P", run.summary.model_p or "not stated"), ("Q", run.summary.model_q), *rows])
    for warning in run.summary.warnings:
        console.print(Text(f"warning: {warning}"), soft_wrap=True)
    tokens, positions, responses = run.summary.by_token[:top], worst_positions(run, top), worst_responses(run, top)
    _print_table(console, "Tokens with the largest sum of KL", _token_cells(tokens))
    _print_table(console, "Positions with the largest KL", _position_cells(positions))
    _print_table(console, "Responses with the largest KL per token", _response_cells(responses))
    return {
        "run": str(folder),
        "headline": [list(row) for row in rows],
        "worst_tokens": tokens,
        "worst_positions": positions,
        "worst_responses": responses,
        "summary": run.summary.to_json(),
    }


def worst_positions(run: Run, top: int) -> Rows:
    """The measured positions with the largest KL, infinite ones first, each with the text before it.

    ``kl_estimate`` is ``None`` where the KL is infinite (``reason`` is ``infinite``).
    """
    columns = ("source_file", "response_idx", "position", "token")
    values = ("kl_estimate", "kl_lower", "kl_upper_plausible", "logprob_p", "logprob_q", "reason")
    order = pl.when(IS_INFINITE).then(float("inf")).otherwise("kl_estimate")
    ranked = run.tokens.with_columns(order.alias("order")).filter(MEASURED & pl.col("order").is_not_null())
    worst = ranked.select(*columns, *values, "order").sort(
        ["order", *columns[:3]], descending=[True, False, False, False]
    )
    found = worst.head(top).drop("order").collect()
    return found.join(
        _texts_before(run.tokens, found), on=columns[:3], how="left", maintain_order="left"
    ).to_dicts()


def _texts_before(tokens: pl.LazyFrame, places: pl.DataFrame) -> pl.DataFrame:
    """``before``: the last few tokens before each place, joined."""
    keys = ("source_file", "response_idx")
    wanted = places.select(*keys, pl.col("position").alias("at")).lazy()
    near = tokens.select(*keys, "position", "token").join(wanted, on=keys, how="inner")
    near = near.filter(pl.col("position").is_between(pl.col("at") - _CONTEXT_TOKENS, pl.col("at") - 1))
    joined = near.sort("position").group_by(*keys, "at").agg(pl.col("token").str.join("").alias("before"))
    return joined.collect().rename({"at": "position"})


def worst_responses(run: Run, top: int) -> Rows:
    """The responses with the largest mean KL per token, those with an infinite one first."""
    chosen = (
        *("source_file", "response_idx", "n_positions", "n_measured", "n_infinite", "kl_mean_per_token", "kl_sum"),
        *("kl_lower_sum", "max_kl", "max_kl_position", "same_top_rate", "finish_reason"),
    )
    order = pl.when(pl.col("n_infinite") > 0).then(float("inf")).otherwise("kl_mean_per_token")
    ranked = run.responses.with_columns(order.alias("order")).filter(pl.col("order").is_not_null())
    by = ["order", "source_file", "response_idx"]
    return ranked.sort(by, descending=[True, False, False]).head(top).select(chosen).collect().to_dicts()


def _token_cells(rows: Rows) -> list[dict[str, str]]:
    return [
        {
            "token": _quoted(row["token"]),
            "positions": f"{row['n_measured']:,}",
            "KL, sum": _number(row["kl_sum"]),
            "KL, mean": _number(row["kl_mean"]),
            "share of the KL": "" if row["kl_share"] is None else f"{row['kl_share']:.1%}",
        }
        for row in rows
    ]


def _position_cells(rows: Rows) -> list[dict[str, str]]:
    return [
        {
            "where": f"{row['source_file']}#{row['response_idx']} position {row['position']}",
            "text before": _quoted(row["before"] or ""),
            "token": _quoted(row["token"]),
            "KL": "infinite" if row["reason"] == INFINITE else _number(row["kl_estimate"]),
            "lower": _number(row["kl_lower"]),
            "upper": "not identified" if row["kl_upper_plausible"] is None else _number(row["kl_upper_plausible"]),
            "log p": _number(row["logprob_p"]),
            "log q": "not listed" if row["logprob_q"] is None else _number(row["logprob_q"]),
        }
        for row in rows
    ]


def _response_cells(rows: Rows) -> list[dict[str, str]]:
    return [
        {
            "response": f"{row['source_file']}#{row['response_idx']}",
            "measured": f"{row['n_measured']:,} of {row['n_positions']:,}",
            "KL per token": "infinite" if row["n_infinite"] else _number(row["kl_mean_per_token"]),
            "KL, sum": "infinite" if row["n_infinite"] else _number(row["kl_sum"]),
            "largest": "infinite" if row["n_infinite"] else _number(row["max_kl"]),
            "at position": "" if row["max_kl_position"] is None else f"{row['max_kl_position']}",
            "same top": "" if row["same_top_rate"] is None else f"{row['same_top_rate']:.1%}",
        }
        for row in rows
    ]


# Two runs.


def _show_comparison(folder_a: Path, folder_b: Path) -> dict[str, Any]:
    a, b = load_run(folder_a), load_run(folder_b)
    column = _comparable_column(a.summary, b.summary)
    difference = paired_difference(_with_estimate(a.tokens, column), _with_estimate(b.tokens, column))
    lines = [*_notes(a.summary, b.summary, column), *comparison_lines(difference, a.summary.model_q, b.summary.model_q)]
    console = Console(highlight=False)
    for line in lines:
        console.print(Text(line), soft_wrap=True)
    return {
        "a": str(folder_a),
        "b": str(folder_b),
        "compared_by": column,
        "lines": lines,
        "difference": {
            "note": "KL(P‖A) - KL(P‖B), nats; positive: B is nearer to P",
            "per_token": difference.per_token._asdict() if False else _as_dict(difference.per_token),
            "per_response": _as_dict(difference.per_response),
            "a_per_token": _as_dict(difference.a_per_token),
            "b_per_token": _as_dict(difference.b_per_token),
            "n_positions": difference.n_positions,
            "n_only_a": difference.n_only_a,
            "n_only_b": difference.n_only_b,
        },
    }
