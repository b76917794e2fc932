"""What a run found, as a page of Markdown, and where a browser finds its files."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from importlib.metadata import metadata
from urllib.parse import quote

from flows.config.models import RunConfig
from flows.watch.markdown import escaped, one_line
from flows.watch.report import Excerpt, RunReport

_LONGEST_LINE = 300
_POSITION_HEADS = ("nats", "before", "token", "log p", "log q", "response, position")
_LONGEST_FILE = 24  # of its name, so that the table is not cut
_LINES_SHOWN = 20  # of warnings, and of reasons


def console_link(address: str) -> str | None:
    """Where a browser shows a folder ``gs://…``; None for any other place."""
    bucket_and_folder = address.removeprefix("gs://")
    if bucket_and_folder == address:
        return None
    return f"https://console.cloud.google.com/storage/browser/{quote(bucket_and_folder.strip('/'))}"


def page_link(address: str) -> str | None:
    """Where a browser opens a page ``gs://…/NAME.html``, for those who may read the bucket; None for anything else."""
    bucket_and_name = address.removeprefix("gs://")
    if bucket_and_name == address or not address.endswith(".html"):
        return None
    return f"https://storage.cloud.google.com/{quote(bucket_and_name)}"


def markdown_of(report: RunReport, config: RunConfig) -> str:
    """The report as a page: what was found and where, what to be careful about, what is missing, where the files are.

    The figures themselves are the summary's.
    """
    excerpt = report.excerpt
    parts = [
        f"# KL(P‖Q), Q = {plain(config.model2)}",
        f"**{plain(report.line)}**",
        _section("Before any number", report.alarms),
        _picture(excerpt.picture),
        _table(
            "Largest positions",
            ("nats", "before", "token", "log p", "log q", "response, position"),
            _positions(excerpt),
        ),
        _table("Tokens with the most KL", ("token", "positions", "mean nats", "share of the KL"), _tokens(excerpt)),
        _section("Drift", [f"{label}: {text}" for label, text in report.verdict]),
        _section("Warnings", [warning for warning in report.warnings if warning not in report.alarms]),
        _section("Positions not measured", _counts(report.missing)),
        _section("Responses or files skipped", _counts(report.skipped)),
        _section("Places in the input repaired", _counts(report.repaired)),
        "## Results\n" + "\n".join(f"- {_linked(path)}" for path in report.paths),
        f"What each figure means: {_docs()}.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _picture(svg: str | None) -> str:
    if svg is None:
        return ""
    return f"![estimate, interval and bounds](data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()})"


def _positions(excerpt: Excerpt) -> list[list[str]]:
    return [
        [
            "infinite" if row["kl_estimate"] is None else f"{row['kl_estimate']:.4g}",
            *(plain(repr(row[name] or "")[1:-1]) for name in ("before", "token")),
            *("not listed" if row[name] is None else f"{row[name]:.2f}" for name in ("logprob_p", "logprob_q")),
            plain(f"{one_line(row['source_file'], _LONGEST_FILE)}#{row['response_idx']}, {row['position']}"),
        ]
        for row in excerpt.positions
    ]


def _tokens(excerpt: Excerpt) -> list[list[str]]:
    return [
        [
            plain(repr(row["token"])[1:-1]),
            f"{row['n_measured']:,}",
            "" if row["kl_mean"] is None else f"{row['kl_mean']:.4g}",
            "" if row["kl_share"] is None else f"{row['kl_share']:.1%}",
        ]
        for row in excerpt.tokens
    ]


def _table(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join([f"## {title}", "", *(f"| {' | '.join(line)} |" for line in lines)])


def _linked(path: str) -> str:
    link = page_link(path)
    return plain(path) if link is None else f"[{plain(path)}]({link})"


def _docs() -> str:
    """The document on the figures: at the address that the project's metadata has, else by its name."""
    urls = dict(line.split(", ", 1) for line in metadata("tokenkl").get_all("Project-URL") or [])
    place = "docs/reading-the-numbers.md"
    base = urls.get("Documentation")
    return f"`{place}`" if base is None else f"[{place}]({base.rstrip('/')}/reading-the-numbers.md)"


def _counts(counts: Mapping[str, int]) -> list[str]:
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return [f"{count:,}: {reason}" for reason, count in ranked]


def _section(title: str, lines: list[str]) -> str:
    if not lines:
        return ""
    shown = [f"- {plain(line)}" for line in lines[:_LINES_SHOWN]]
    if len(lines) > _LINES_SHOWN:
        shown.append(f"- … and {len(lines) - _LINES_SHOWN:,} more")
    return "\n".join([f"## {title}", *shown])


def plain(text: str) -> str:
    """A text from outside as Markdown that shows it, on one line and not too long."""
    return escaped(one_line(text, _LONGEST_LINE))
