"""Two runs over one P, side by side: which model is nearer to it, and by how much."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import polars as pl

from flows.commands.texts import INTERVAL, number_text, signed, warnings_of
from flows.folder.finished import FinishedRun, load_run
from flows.runtime.terminal import console, print_lines
from kl.output.digits import rounded
from kl.statistics.intervals import Estimate
from kl.statistics.paired import PairedDifference, paired_difference
from kl.statistics.summary import Summary
from kl.tables.totals import INFINITE


def show_comparison(folder_a: Path, folder_b: Path) -> dict[str, Any]:
    """Print the paired difference of two runs; gives the same unrounded."""
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
        *(f"warning: {side}: {text}" for side, run in (("A", a), ("B", b)) for text in warnings_of(run.summary)),
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


def _measure_name(summary: Summary, column: str) -> str:
    if column == "kl_exact":
        return "exact KL"
    return f"{summary.estimator if column == 'kl_estimate' else 'censored'} estimate"


def _paired_over(difference: PairedDifference, what: str) -> str:
    text = f"Paired by the {what} over {difference.n_positions:,} positions that both runs measured"
    only = [f"{n:,} only {side} measured" for side, n in (("A", difference.n_only_a), ("B", difference.n_only_b)) if n]
    return f"{text}; left out: {', '.join(only)}." if only else f"{text}."
