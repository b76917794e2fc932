"""Two runs over one P, side by side: which model is nearer to it, and by how much."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import polars as pl
from rich.console import Console

from flows.commands.texts import INTERVAL, WARNING, number_text, signed, warnings_of
from flows.folder.finished import load_run
from flows.runtime.terminal import print_lines
from kl.finished.between import Between, QLists, kl_between
from kl.finished.run import Run
from kl.output.digits import rounded
from kl.output.headline import bounded_text
from kl.statistics.intervals import Estimate
from kl.statistics.paired import PairedDifference, paired_difference
from kl.statistics.summary import Summary
from kl.tables.totals import INFINITE


def show_comparison(out: Console, folder_a: Path, folder_b: Path, labels: Mapping[str, str]) -> dict[str, Any]:
    """Print the paired difference of two runs; gives the same unrounded. ``labels`` are as of `load_candidates`."""
    a, b = (load_run(folder, with_lists=True) for folder in (folder_a, folder_b))
    column = comparable_column(a.summary, b.summary)
    difference = paired_difference(with_estimate(a, column), with_estimate(b, column))
    between = _between(a, b)
    answer = verdict(difference.per_token, "token")
    lines = [
        f"P = {a.summary.model_p or 'not stated'}",
        f"A = {_named(a, labels)}: {_value_text(difference.a_per_token)}",
        f"B = {_named(b, labels)}: {_value_text(difference.b_per_token)}",
        answer,
        verdict(difference.per_response, "response"),
        _paired_over(difference, measure_name(a.summary, column)),
        between if isinstance(between, str) else _between_text(between),
        *(f"warning: {note}" for note in notes([a.summary, b.summary], "AB", column)),
        *(f"warning: {side}: {text}" for side, run in (("A", a), ("B", b)) for text in warnings_of(run.summary)),
    ]
    for line in lines:
        style = "bold" if line == answer else WARNING if line.startswith("warning: ") else ""
        print_lines(out, [line], style=style)
    return {
        "a": str(folder_a),
        "b": str(folder_b),
        "compared_by": column,
        "difference_is": "KL(P‖A) - KL(P‖B) in nats: positive where B is nearer to P",
        "lines": lines,
        **asdict(difference),
        "a_against_b": None if isinstance(between, str) else between.to_json(),
    }


def _between(a: Run, b: Run) -> Between | str:
    """How far the two Q are from one another, whatever P says; or why that is not known."""
    lacking = [str(run.folder) for run in (a, b) if run.candidates is None]
    if a.candidates is None or b.candidates is None:
        return f"KL(A‖B) is not known: {' and '.join(lacking)} kept no lists (candidates.parquet)."
    lists = (QLists(name, run.tokens, run.candidates) for name, run in (("A", a), ("B", b)))
    return kl_between(*lists)


def _between_text(found: Between) -> str:
    text = bounded_text(found.per_token, found.lower, found.plausible_upper)
    return f"KL(A‖B) per token, from both lists of {found.n_measured:,} positions: {text}"


def _named(run: Run, labels: Mapping[str, str]) -> str:
    label = labels.get(str(run.folder))
    return f"{run.summary.model_q} ({run.folder}{f'; {label}' if label else ''})"


def comparable_column(*summaries: Summary) -> str:
    """The column of the token table to compare runs by: it means the same in all.

    The exact KL where all have it throughout; else what all report, if by one estimator; else the censored estimate,
    which every run has. Two estimators miss different parts of one KL, and would make two equal models look different.
    """
    if all(map(_exact_throughout, summaries)):
        return "kl_exact"
    return "kl_estimate" if len({summary.estimator for summary in summaries}) == 1 else "kl_censored"


def _exact_throughout(summary: Summary) -> bool:
    infinite = summary.counts.bounds_only_by_reason.get(INFINITE, 0)
    return 0 < summary.counts.measured == summary.kl_per_token.exact.n + infinite


def with_estimate(run: Run, column: str) -> pl.LazyFrame:
    """The token table with another column as its estimate."""
    if column == "kl_estimate":
        return run.tokens
    # Rows without a point estimate keep their reason and stay without one.
    return run.tokens.with_columns(kl_estimate=pl.when(pl.col("error").is_null()).then(column))


def notes(summaries: Sequence[Summary], names: Sequence[str], column: str) -> Iterator[str]:
    """What to know of a comparison by that column."""
    if column == "kl_exact":
        return
    estimators = {name: repr(summary.estimator) for name, summary in zip(names, summaries, strict=True)}
    if column == "kl_censored":
        yield f"{_each(estimators, 'reports the estimator')}; they are compared by their censored estimates."
    elif summaries[0].estimator != "censored":
        which = "both report" if len(summaries) == 2 else "all report"
        yield (
            f"{which} the estimator {summaries[0].estimator!r}, which misses more of a large KL than of a small one; "
            f"the difference is understated. Run {'both' if len(summaries) == 2 else 'all'} with the estimator "
            "'censored'; no score is bought again."
        )
    lengths = {name: f"{summary.top_logprobs}" for name, summary in zip(names, summaries, strict=True)}
    if len(set(lengths.values())) > 1:
        first, *others = lengths.items()
        rest = ", ".join(f"{name} with {length}" for name, length in others)
        yield (
            f"{first[0]} was measured with {first[1]} candidates per position, {rest}; part of the difference may come "
            "from that."
        )


def _each(values: Mapping[str, str], what: str) -> str:
    (first, value), *others = values.items()
    return ", ".join([f"{first} {what} {value}", *(f"{name} {value}" for name, value in others)])


def verdict(difference: Estimate, unit: str) -> str:
    """KL(P‖A) - KL(P‖B) with its interval, in a sentence; ``unit`` is ``token`` or ``response``."""
    value, low, high = difference.value, difference.ci_low, difference.ci_high
    if value is None:
        return f"The difference per {unit} is not known: {difference.no_interval}."
    further, nearer = ("A", "B") if value > 0 else ("B", "A")
    if low is None or high is None:
        return (
            f"{further} is further from P than {nearer} by {number_text(abs(value))} nats per {unit} in these data, "
            f"but without an interval ({difference.no_interval}) chance is not excluded."
            if value
            else f"The means per {unit} are equal, without an interval ({difference.no_interval})."
        )
    if low == high == 0:
        return f"A and B are equally far from P: the difference per {unit} is 0 for every prompt."
    if low <= 0 <= high:
        interval = f"{INTERVAL} {signed(low, difference)} to {signed(high, difference)}"
        return (
            f"A and B cannot be told apart per {unit}: the difference is {signed(value, difference)} nats "
            f"({interval}, {difference.n_clusters:,} prompts; above 0 B is nearer to P)."
        )
    near, far = sorted((abs(low), abs(high)))
    size, near_text, far_text = (rounded(number, difference.se) for number in (abs(value), near, far))
    return (
        f"{further} is further from P than {nearer} by {size} nats per {unit} "
        f"({INTERVAL} {near_text} to {far_text}, {difference.n_clusters:,} prompts)."
    )


def _value_text(estimate: Estimate) -> str:
    if estimate.value is None:
        return f"not known: {estimate.no_interval}"
    text = f"{rounded(estimate.value, estimate.se)} nats per token"
    if estimate.ci_low is None or estimate.ci_high is None:
        return f"{text} (no interval: {estimate.no_interval})"
    return f"{text} ({INTERVAL} {rounded(estimate.ci_low, estimate.se)} to {rounded(estimate.ci_high, estimate.se)})"


def measure_name(summary: Summary, column: str) -> str:
    """What a column of `comparable_column` is called."""
    if column == "kl_exact":
        return "exact KL"
    return f"{summary.estimator if column == 'kl_estimate' else 'censored'} estimate"


def _paired_over(difference: PairedDifference, what: str) -> str:
    text = f"Paired by the {what} over {difference.n_positions:,} positions that both runs measured"
    only = [f"{n:,} only {side} measured" for side, n in (("A", difference.n_only_a), ("B", difference.n_only_b)) if n]
    return f"{text}; left out: {', '.join(only)}." if only else f"{text}."
