"""The parts of the page that stand in the file as HTML: they are read and printed without the script."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any, NamedTuple, cast

import polars as pl

from kl.output.digits import at_least, rounded
from kl.output.headline import headline
from kl.output.report.drawing.svg import Chart
from kl.output.report.markup import Markup, joined, link_to, table, tag
from kl.output.report.movers import Mover, Movers
from kl.output.report.selection import Selection, texts_before
from kl.output.report.verdict import verdict
from kl.output.report.visible import in_a_line, visible
from kl.statistics.summary import Summary

_CONTEXT_TOKENS = 8  # before a position
_NAMED = 3  # positions under the verdict
_SCALE = (
    "A nat is 1.44 bits. For scale, a model of 135M parameters against itself: weights rounded to eight bits "
    "0.002 nats a token, another system prompt 0.09, four bits 0.45, three bits 2.0."
)
_REFERENCE = {"folder": "Compared with", "finished_at": "Finished"}
_READ_AS = {
    "certainty": "The dot is the estimate, the bar its interval over prompts: other prompts of the kind would have "
    "given something inside. The shaded band is what the lists of top tokens leave open; its left end is certain "
    "where all positions were asked.",
    "distribution": "A small median under a large maximum: Q is nearly P nearly everywhere. The marks are percentiles, "
    "as llama.cpp prints them.",
    "by-position": "Whether Q drifts away from P along the response.",
    "by-prompt": "Whether a few prompts make the difference.",
    "entropy": "Low on the left, high on the right: Q differs where P itself was undecided. High on the left: Q "
    "contradicts P where it was sure.",
}


class Place(NamedTuple):
    """A position named on the page: its row of the token table, the text before it, what each side says first."""

    row: Mapping[str, Any]
    before: str
    says: Mapping[str, tuple[str, float]]


def worst_places(chosen: Selection, lists: pl.DataFrame | None) -> list[Place]:
    """The positions with the largest KL."""
    before, says = texts_before(chosen, _CONTEXT_TOKENS), dict[int, dict[str, tuple[str, float]]]()
    if lists is not None:
        of_worst = lists.filter(pl.col("row").is_in(chosen.worst["row"].implode()))
        for side in "pq":
            first = of_worst.drop_nulls(f"logprob_{side}").sort(f"logprob_{side}", descending=True, maintain_order=True)
            for row in first.unique("row", keep="first").iter_rows(named=True):
                says.setdefault(row["row"], {})[side] = row["shown"], math.exp(row[f"logprob_{side}"])
    return [
        Place(
            row,
            "".join(visible(token["token"] or "") for token in before.get(row["row"], [])),
            says.get(row["row"], {}),
        )
        for row in chosen.worst.iter_rows(named=True)
    ]


def figure(chart: Chart) -> Markup:
    """A chart with how to read it."""
    drawing = tag("div", Markup(chart.svg(standalone=False)), class_="drawing")
    return tag("figure", tag("h3", chart.title), drawing, tag("figcaption", _READ_AS[chart.name]))


def verdict_part(summary: Summary, chart: Chart | None, worst: list[Place]) -> Markup:
    """The verdict, how sure it is, and where the two part most."""
    found = verdict(summary)
    most = None
    if worst and found.level != "same":
        items = (tag("li", _link(place), _says(place)) for place in worst[:_NAMED])
        most = tag("div", tag("h3", "They part most here"), tag("ul", *items), class_="most")
    return joined(
        [
            tag("p", found.sentence, class_=f"verdict {found.level}"),
            *(tag("p", sentence) for sentence in found.more),
            tag("p", _SCALE, class_="muted"),
            None if chart is None else figure(chart),
            most,
        ]
    )


def _link(place: Place) -> Markup:
    """A position with the text before it and its KL."""
    row = place.row
    size = "infinite" if row["kl_estimate"] is None else f"{rounded(row['kl_estimate'])} nats"
    bound = "" if row["kl_lower"] is None else f", certainly {at_least(row['kl_lower'])}"
    return tag(
        "a",
        tag("span", place.before.replace("\n", "⏎"), class_="before", dir="auto"),
        tag("mark", in_a_line(visible(row["token"] or ""))),
        tag("span", f" {size}{bound}", class_="muted"),
        href=link_to(row["source_file"], row["response_idx"], row["position"]),
    )


def _says(place: Place) -> Markup | None:
    """What each side finds most probable there."""
    if not place.says:
        return None
    parts: list[Markup | str] = []
    for side, (token, mass) in place.says.items():
        parts += [f"{'; ' if parts else ''}{side.upper()} first: ", tag("code", in_a_line(token)), f" {_percent(mass)}"]
    return tag("span", *parts, class_="says")


def drift_part(drift: Mapping[str, Any]) -> Markup:
    """What an alert decided, and which run this one was compared with."""
    reference = cast(dict[str, Any], drift.get("reference") or {})
    facts = [(label, str(reference[name])) for name, label in _REFERENCE.items() if reference.get(name) is not None]
    kind = "alarm" if drift["decision"] == "drift" else "notice"
    shown = _pairs(facts) if facts else None
    return tag("div", tag("h3", "Since an earlier run"), tag("p", drift["message"]), shown, class_=kind)


def about(summary: Summary, record: Mapping[str, Any]) -> Markup:
    """Warnings, what is missing and why, all figures with n, models, versions and settings."""
    warnings = cast(list[str], record.get("warnings", summary.warnings))
    loud = [text for text in warnings if text in summary.alarms]
    quiet = [text for text in warnings if text not in summary.alarms]
    missing = [(reason, f"{n:,}") for reason, n in summary.counts.missing_by_reason.items()]
    return joined(
        [
            _warnings("Read before any number", loud, "alarm"),
            _warnings("Warnings", quiet, "warning"),
            table(("Positions not measured, by reason", "n"), missing, "Missing positions", numbers=[1])
            if missing
            else None,
            tag("details", tag("summary", "All figures, with n"), _pairs(headline(summary))),
            tag("details", tag("summary", "Models, versions and settings"), _pairs(_facts(summary, record))),
        ]
    )


def _warnings(title: str, lines: list[str], kind: str) -> Markup | None:
    if not lines:
        return None
    return tag("div", tag("h3", title), tag("ul", *(tag("li", text) for text in lines)), class_=kind)


def _pairs(rows: list[tuple[str, str]]) -> Markup:
    cells = (tag("div", tag("dt", label.strip()), tag("dd", text)) for label, text in rows)
    return tag("dl", *cells)


def _facts(summary: Summary, record: Mapping[str, Any]) -> list[tuple[str, str]]:
    finished = record.get("finished_at")
    rows = [
        ("P", summary.model_p or "not stated"),
        ("Versions of P", ", ".join(record.get("model1_versions") or ["not stated"])),
        ("Q", summary.model_q),
        ("Versions of Q", ", ".join(record.get("model2_versions") or ["not stated"])),
        ("Finished", f"{datetime.fromisoformat(finished):%Y-%m-%d %H:%M} UTC" if finished else "not stated"),
        ("Estimator", summary.estimator),
        ("Top log-probabilities", f"{summary.top_logprobs:,}"),
        ("Alignment of the two vocabularies", str((summary.alignment or {}).get("verdict", "not known"))),
        ("P's sampling", "; ".join(_listed(item) for item in summary.sampling) or "not stated"),
    ]
    config = cast(dict[str, Any], record.get("config", {}))
    rows += [(f"Setting {name}", _setting(value)) for name, value in config.items() if value is not None]
    return rows + [(f"Version of {name}", str(value)) for name, value in record.get("versions", {}).items()]


def _setting(value: Any) -> str:
    return _listed(cast(dict[str, Any], value)) if isinstance(value, dict) else str(value)


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items() if value is not None)


def movers_part(movers: Movers, chosen: Selection, tokens: pl.LazyFrame) -> Markup:
    """The tokens that Q promotes and those that it demotes."""
    if not movers.n_positions:
        return tag("p", "Not known: this run kept no lists (candidates.parquet).", class_="muted")
    up, down = movers.ranked()
    rows = {example.row for mover in (*up, *down) for example in mover.examples}
    places = _places(tokens, rows)
    shown = set(chosen.tokens["row"].to_list())
    note = (
        f"From both lists at {movers.n_positions:,} positions. Δ is the mean of log q − log p, weighted by the mass "
        "that the two give the token; ≥ or ≤ where a side does not list it at some of them."
    )
    both = (("Q promotes", up), ("Q demotes", down))
    tables = (_mover_table(title, ranked, places, shown) for title, ranked in both)
    return joined([tag("p", note, class_="muted"), tag("div", *tables, class_="pair")])


def _places(tokens: pl.LazyFrame, rows: set[int]) -> dict[int, dict[str, Any]]:
    wanted = tokens.select("source_file", "response_idx", "position").with_row_index("row")
    found = wanted.filter(pl.col("row").is_in(sorted(rows))).collect(engine="streaming")
    return {row["row"]: row for row in found.to_dicts()}


def _mover_table(title: str, ranked: list[Mover], places: Mapping[int, dict[str, Any]], shown: set[int]) -> Markup:
    def example(mover: Mover) -> Iterator[Markup]:
        for row, p, q in mover.examples:
            place, words = places[row], f"{_percent(p)} → {_percent(q)}"
            address = link_to(place["source_file"], place["response_idx"], place["position"])
            yield tag("a", words, href=address) if row in shown else tag("span", words)

    rows = [
        (
            tag("code", in_a_line(mover.token)),
            f"{'≥ ' if mover.n_bound and mover.delta > 0 else '≤ ' if mover.n_bound else ''}{mover.delta:+.2f}",
            f"{mover.n:,}",
            f"{_percent(mover.p)} → {_percent(mover.q)}",
            joined(tag("span", item, class_="example") for item in example(mover)),
        )
        for mover in ranked
    ]
    heads = ("Token", "Δ, nats", "n", "mean p → q", "Examples")
    return table(heads, rows, title, numbers=[1, 2, 3])


def _percent(share: float) -> str:
    return "not listed" if share == 0 else f"{100 * share:.2g} %" if share < 0.1 else f"{100 * share:.0f} %"


def contributors(summary: Summary, worst: list[Place]) -> Markup:
    """The tokens and the positions that hold most of the KL."""
    by_token = [
        (tag("code", in_a_line(visible(row["token"] or ""))), f"{row['n_measured']:,}", rounded(row["kl_sum"]),
         rounded(row["kl_mean"]), "" if row["kl_share"] is None else f"{100 * row['kl_share']:.1f} %")
        for row in summary.by_token[: max(len(worst), 1)]
    ]  # fmt: skip
    by_place = [
        (joined([_link(place), _says(place)]), f"{place.row['source_file']}#{place.row['response_idx']}",
         str(place.row["position"]))
        for place in worst
    ]  # fmt: skip
    heads = ("Token", "n", "Σ KL", "mean KL", "of all")
    return tag(
        "div",
        table(heads, by_token, "Tokens with the largest sum of KL", numbers=[1, 2, 3, 4]),
        table(("Text, and token", "Response", "At"), by_place, "Positions with the largest KL", numbers=[2]),
        class_="pair",
    )


def counts(summary: Summary, chosen: Selection) -> Markup:
    """How much of the run is in the file."""
    shown, n = chosen.windows.height, summary.counts.responses
    listed = int(chosen.tokens["listed"].sum())
    words = (
        f"{n:,} responses. The text of {shown:,} is in this file"
        + ("." if shown == n else ": the worst, those with the worst positions, and an even sample of the others.")
        + f" {listed:,} of the {chosen.tokens.height:,} positions shown have room for their lists."
    )
    if chosen.table.height < n:
        words += f" The table has {chosen.table.height:,} of them: the worst half, and an even sample."
    return tag("p", words, class_="muted")
