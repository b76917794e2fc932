"""A finished run as a notebook shows it: two lines of text, or a table."""

from __future__ import annotations

from pathlib import Path

import polars as pl

from kl.output.digits import at_least, rounded
from kl.output.headline import headline
from kl.output.report.markup import Markup, joined, tag
from kl.output.report.verdict import verdict
from kl.output.report.visible import in_a_line, visible
from kl.statistics.summary import Summary

_FIGURES, _WARNINGS = 8, 5  # shown; all of them stand in the summary
_STYLE = (
    ".tokenkl table{border-collapse:collapse;margin:.4em 0}.tokenkl td,.tokenkl th{text-align:left;padding:.1em .6em;"
    "vertical-align:top;font-weight:normal}.tokenkl td.number{text-align:right;font-variant-numeric:tabular-nums}"
    ".tokenkl caption{text-align:left;font-weight:bold}.tokenkl p{margin:.3em 0}"
)


def text_of(folder: Path, summary: Summary) -> str:
    """Where the run is, between which models, and its headline."""
    measured = f"{summary.counts.measured:,} of {summary.counts.selected:,} positions measured"
    n = len(summary.warnings)
    warned = f", {n} warning{'s' if n > 1 else ''}" if n else ""
    label, text = headline(summary)[0]
    return (
        f"<Run {str(folder)!r}: P {summary.model_p or 'not named'}, Q {summary.model_q}, {measured}{warned}\n"
        f" {label}: {text}>"
    )


def html_of(folder: Path, summary: Summary, worst: pl.DataFrame) -> str:
    """The verdict, the first figures, the warnings and the worst positions; every text is escaped."""
    found = verdict(summary)
    names = f"P {summary.model_p or 'not named'}, Q {summary.model_q} · {folder}"
    figures = [tag("tr", tag("th", label, scope="row"), tag("td", text)) for label, text in headline(summary)]
    parts = [
        tag("style", Markup(_STYLE)),
        tag("p", tag("b", found.sentence)),
        tag("p", visible(names, longest=500)),
        tag("table", tag("tbody", *figures[:_FIGURES])),
        _warnings(summary),
        _worst(worst),
    ]
    return tag("div", joined(parts), class_="tokenkl")


def _warnings(summary: Summary) -> Markup | None:
    if not summary.warnings:
        return None
    shown = [tag("li", visible(text, longest=1_000)) for text in summary.warnings[:_WARNINGS]]
    rest = len(summary.warnings) - len(shown)
    more = tag("p", f"… and {rest} more in .summary.warnings") if rest else None
    return joined([tag("ul", *shown), more])


def _worst(worst: pl.DataFrame) -> Markup | None:
    if not worst.height:
        return None
    heads = ("response, position", "text before", "token", "KL", "certainly", "log p", "log q")
    rows = [
        tag(
            "tr",
            tag("td", visible(f"{row['source_file']}#{row['response_idx']}, {row['position']}")),
            tag("td", in_a_line(visible(row["before"] or " "))),
            tag("td", tag("code", in_a_line(visible(row["token"] or "")))),
            *(
                tag("td", absent if row[name] is None else digits(row[name]), class_="number")
                for name, absent, digits in (
                    ("kl_estimate", "infinite", rounded),
                    ("kl_lower", "not known", at_least),
                    ("logprob_p", "not stated", rounded),
                    ("logprob_q", "not listed", rounded),
                )
            ),
        )
        for row in worst.iter_rows(named=True)
    ]
    head = tag("tr", *(tag("th", text, scope="col") for text in heads))
    return tag("table", tag("caption", "Worst positions"), tag("thead", head), tag("tbody", *rows))
