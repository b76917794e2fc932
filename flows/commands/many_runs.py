"""Many candidates against one P in one table, the nearest first, as people publish it for quantisations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from backends.errors import ConfigError
from flows.commands.tables import print_table
from flows.commands.texts import WARNING, bound_text, number_text, range_text, signed, warnings_of
from flows.commands.two_runs import comparable_column, measure_name, notes, with_estimate
from flows.folder.finished import Rows, load_run
from flows.runtime.terminal import print_lines
from kl.finished.run import Run
from kl.output.digits import rounded
from kl.statistics.intervals import Estimate
from kl.statistics.ranking import RankedRun, Ranking, rank_runs
from kl.statistics.summary import Summary

COLUMNS = (
    *("rank", "run", "label", "model_p", "model_q", "kl_per_token", "kl_low", "kl_high"),
    *("kl_lower", "kl_median", "kl_99_percent", "same_top_p", "same_top_p_low", "same_top_p_high"),
    *("perplexity_ratio", "perplexity_ratio_low", "perplexity_ratio_high", "n_measured", "n_missing", "n_prompts"),
    *("cost_usd", "above_nearest", "above_nearest_low", "above_nearest_high", "told_apart"),
)


@dataclass(frozen=True, slots=True)
class Candidates:
    """Finished runs over the responses of one P, ranked.

    ``column`` of the token table is what they are ranked by, ``warnings`` what to know of the table.
    """

    runs: list[Run]
    ranking: Ranking
    column: str
    rows: Rows
    warnings: list[str]


def load_candidates(folders: Sequence[Path], labels: Mapping[str, str]) -> Candidates:
    """Rank finished runs.

    Parameters
    ----------
    folders : sequence of Path
        Of two or more runs.
    labels : mapping
        Folder → what is to be said of it in the table, such as a size.

    Raises
    ------
    ConfigError
        If a folder holds no finished run, or is named twice.
    IncomparableRunsError, TokenTableError
        As `kl.statistics.ranking.rank_runs`.
    """
    names = [str(folder) for folder in folders]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"--compare: {name} is named {names.count(name)} times; name each run once.")
    runs = [load_run(folder) for folder in folders]
    summaries = [run.summary for run in runs]
    column = comparable_column(*summaries)
    ranking = rank_runs([with_estimate(run, column) for run in runs], names)
    rows = [
        _row(rank, found, runs[found.number], labels.get(names[found.number], ""))
        for rank, found in enumerate(ranking.runs, start=1)
    ]
    warnings = [*notes(summaries, names, column), *_notes(summaries, ranking), *_warnings_of(summaries, names)]
    return Candidates(runs, ranking, column, rows, warnings)


def _row(rank: int, found: RankedRun, run: Run, label: str) -> dict[str, Any]:
    """One line of the table, unrounded."""
    summary, kl = run.summary, found.per_token
    ratio = summary.perplexity.ratio if summary.perplexity is not None else None
    above = found.above_nearest
    return {
        "rank": rank,
        "run": str(run.folder),
        "label": label or None,
        "model_p": summary.model_p,
        "model_q": summary.model_q,
        "kl_per_token": kl.value,
        "kl_low": kl.ci_low,
        "kl_high": kl.ci_high,
        "kl_lower": summary.kl_per_token.lower.value,
        "kl_median": summary.token_kl["Median KLD"],
        "kl_99_percent": summary.token_kl["99.0% KLD"],
        "same_top_p": summary.same_top_p.value,
        "same_top_p_low": summary.same_top_p.ci_low,
        "same_top_p_high": summary.same_top_p.ci_high,
        "perplexity_ratio": ratio and ratio.value,
        "perplexity_ratio_low": ratio and ratio.ci_low,
        "perplexity_ratio_high": ratio and ratio.ci_high,
        "n_measured": summary.counts.measured,
        "n_missing": summary.counts.missing,
        "n_prompts": kl.n_clusters,
        "cost_usd": _whole_cost(run.record),
        "above_nearest": above and above.value,
        "above_nearest_low": above and above.ci_low,
        "above_nearest_high": above and above.ci_high,
        "told_apart": found.apart,
    }


def _whole_cost(record: Mapping[str, Any]) -> float | None:
    """What the run was charged; None where it took scores from an earlier one, or a price is not known."""
    if record.get("contexts_asked") != record.get("contexts") or record.get("contexts_in_earlier_jobs") != 0:
        return None
    costs = [spent["cost_usd"] for spent in record.get("spent", {}).values()]
    return None if None in costs or not costs else sum(costs)


def _notes(summaries: Sequence[Summary], ranking: Ranking) -> Iterator[str]:
    if ranking.n_left_out:
        yield (
            f"{ranking.n_left_out:,} positions that some of the runs measured and not all take no part in the KL, its "
            "interval and the differences; the other columns are of all that the run measured."
        )
    elif any(summary.counts.measured != ranking.n_positions for summary in summaries):
        yield (
            f"the KL, its interval and the differences are over {ranking.n_positions:,} positions of the responses "
            "that all runs share; the other columns are of all that the run measured."
        )
    others = sorted({summary.model_p or "not stated" for summary in summaries})
    if len(others) > 1:
        yield f"P is called {', '.join(others)}; its responses and log-probabilities are the same in all runs."


def _warnings_of(summaries: Sequence[Summary], names: Sequence[str]) -> Iterator[str]:
    """What the runs warn of, each once, with the runs that do."""
    said: dict[str, list[str]] = {}
    for name, summary in zip(names, summaries, strict=True):
        for text in warnings_of(summary):
            said.setdefault(text, []).append(name)
        if summary.perplexity is not None and summary.perplexity.n_censored:
            left_out = "the ratio of perplexities leaves out the tokens that Q does not list, which makes Q look better"
            said.setdefault(left_out, []).append(name)
    for text, of in said.items():
        yield f"{'all runs' if len(of) == len(names) else ', '.join(of)}: {text}"


def show_candidates(out: Console, found: Candidates) -> dict[str, Any]:
    """Print the table, the differences in words, and what to know of them; gives the same unrounded."""
    ranking = found.ranking
    title = f"{len(found.runs)} candidates for P = {found.runs[0].summary.model_p or 'not stated'}, the nearest first"
    print_table(out, f"{title}; KL in nats per token", _without_empty(list(_cells(found))))
    print_lines(out, [""])
    print_lines(out, [f"warning: {text}" for text in found.warnings], style=WARNING)
    lines = [
        f"Ranked by the {measure_name(found.runs[0].summary, found.column)} over {ranking.n_positions:,} positions "
        "that all runs measured.",
        "Told apart: the interval of the difference from the nearest excludes 0. These intervals hold together for "
        f"all {ranking.n_comparisons} differences between two of {len(found.runs)} runs (each is of "
        f"{100 * ranking.level:.4g} %), because the nearest is chosen by the same data.",
    ]
    print_lines(out, lines)
    return {
        "runs": found.rows,
        "compared_by": found.column,
        "n_positions": ranking.n_positions,
        "n_left_out": ranking.n_left_out,
        "n_comparisons": ranking.n_comparisons,
        "level_of_differences": ranking.level,
        "warnings": found.warnings,
    }


def _cells(found: Candidates) -> Iterator[dict[str, str]]:
    for row, ranked in zip(found.rows, found.ranking.runs, strict=True):
        kl, summary = ranked.per_token, found.runs[ranked.number].summary
        ratio = summary.perplexity.ratio if summary.perplexity is not None else None
        yield {
            "Q": str(row["model_q"]),
            "label": row["label"] or "",
            "KL": _value(kl) if kl.value is not None else f"not known: {kl.no_interval}",
            "95 % CI": _interval(kl),
            "above the nearest": _above(ranked.above_nearest),
            "told apart": {True: "yes", False: "no", None: ""}[ranked.apart],
            "lower": bound_text(row["kl_lower"]),
            "median": number_text(row["kl_median"]),
            "99 %": number_text(row["kl_99_percent"]),
            "same top": "" if row["same_top_p"] is None else f"{row['same_top_p']:.1%}",
            "PPL(Q)/PPL(P)": "" if ratio is None else f"{_value(ratio)} {_in_brackets(_interval(ratio))}",
            "measured": f"{row['n_measured']:,}",
            "USD": number_text(row["cost_usd"] or None),
            "results": str(row["run"]),
        }


def _value(estimate: Estimate) -> str:
    return "" if estimate.value is None else rounded(estimate.value, estimate.se)


def _interval(estimate: Estimate) -> str:
    return range_text(estimate.ci_low, estimate.ci_high, estimate.se)


def _above(above: Estimate | None) -> str:
    if above is None:
        return "the nearest"
    if above.value is None:
        return "not known"
    interval = _interval(above) or f"no interval: {above.no_interval}"
    return f"{signed(above.value, above)} {_in_brackets(interval)}"


def _in_brackets(text: str) -> str:
    return f"({text})" if text else ""


def _without_empty(rows: list[dict[str, str]]) -> Rows:
    """The rows without the columns in which no run has anything."""
    kept = [name for name in rows[0] if any(row[name] for row in rows)]
    return [{name: row[name] for name in kept} for row in rows]
