"""The page: one file that needs nothing else, in which nothing but its own script runs."""

from __future__ import annotations

import re
from base64 import b64encode
from collections.abc import Callable, Collection, Mapping
from hashlib import sha256
from importlib.resources import files
from pathlib import Path
from typing import Any, cast

from kl.finished.run import Run
from kl.output.atomic import json_bytes, write_atomic
from kl.output.report import sections
from kl.output.report.charts import report_charts
from kl.output.report.lists import read_lists
from kl.output.report.markup import joined, tag
from kl.output.report.movers import Movers
from kl.output.report.payload import lists_of, table_of, texts_of
from kl.output.report.selection import select
from kl.records import Prompt

DEFAULT_TOP = 20
_SCRIPTS = ("report.js", "reader.js")
_PLACE = re.compile(r"\{\{(\w+)\}\}")
_NO_DRIFT = "<!-- nothing was compared with an earlier run -->"  # no text from outside can hold it

Prompts = Callable[[Collection[str]], Mapping[str, str]]


def write_report(run: Run, target: Path, *, prompts: Prompts | None = None, top: int = DEFAULT_TOP) -> None:
    """Write the page of a run, whole or not at all.

    Cost grows linearly with the positions; memory and the size of the file do not (`kl.output.report.selection`), but
    for a row per response.

    Parameters
    ----------
    run : Run
        Without candidates the page says that there are none; of its record it needs nothing.
    target : Path
        On a local disk.
    prompts : callable, optional
        Gives the prompts of some source files, by file.
    top : int
        How many of the worst responses and positions are shown.

    Raises
    ------
    TokenTableError, ValueError
        If the tables contradict themselves or each other.
    """
    page = _page(run, prompts, top)
    write_atomic(target, lambda path: path.write_text(page, encoding="utf-8", errors="replace"))


def with_drift(page: str, drift: Mapping[str, Any]) -> str:
    """A page that was written before the run was compared with an earlier one, with what came of that.

    Parameters
    ----------
    drift : mapping
        As it stands in ``run.json``.
    """
    return page.replace(_NO_DRIFT, sections.drift_part(drift), 1)


def prompt_text(prompt: Prompt) -> str:
    """A prompt as it is shown: of one turn of a user its text, otherwise each turn after its role."""
    turns = [(turn.role, turn.content) for turn in prompt.turns]
    if prompt.system is not None:
        turns.insert(0, ("system", prompt.system))
    if [role for role, _ in turns] == ["user"]:
        return turns[0][1]
    return "\n\n".join(f"{role}: {content}" for role, content in turns)


def _page(run: Run, prompts: Prompts | None, top: int) -> str:
    summary, tokens = run.summary, run.tokens
    charts = {chart.name: chart for chart in report_charts(summary, tokens, run.responses)}
    chosen = select(tokens, run.responses, top)
    movers, lists = Movers(), None
    if run.candidates is not None:
        wanted = cast(list[int], chosen.tokens.filter("listed")["row"].to_list())
        lists = read_lists(tokens, run.candidates, wanted, movers)
    names = set(cast(list[str], chosen.windows["source_file"].to_list()))
    told: Mapping[str, str] = {} if prompts is None else prompts(names)
    worst = sections.worst_places(chosen, lists)
    assets = files("kl.output.report") / "assets"
    script = "\n".join((assets / name).read_text(encoding="utf-8") for name in _SCRIPTS)
    style = (assets / "report.css").read_text(encoding="utf-8")
    models = [tag("b", summary.model_p or "not stated"), " (P) against ", tag("b", summary.model_q), " (Q)"]
    parts = {
        "policy": _policy(script, style),
        "title": tag("title", f"KL(P‖Q): {summary.model_p or 'P'} against {summary.model_q}"),
        "style": style,
        "script": script,
        "models": joined(models),
        "verdict": sections.verdict_part(summary, charts.pop("certainty", None), worst),
        "drift": sections.drift_part(drift) if (drift := run.record.get("drift")) else _NO_DRIFT,
        "about": sections.about(summary, run.record),
        "charts": joined(map(sections.figure, charts.values())),
        "movers": sections.movers_part(movers, chosen, tokens),
        "contributors": sections.contributors(summary, worst),
        "counts": sections.counts(summary, chosen),
        "table": _data(json_bytes(table_of(chosen)).decode()),
        "texts": _data(texts_of(chosen, told)),
        "lists": _data("null" if lists is None else lists_of(chosen, lists)),
    }
    template = (assets / "report.html").read_text(encoding="utf-8")
    return _PLACE.sub(lambda place: parts[place[1]], template)


def _policy(script: str, style: str) -> str:
    """What the page may do: run its own script, use its own style, and ask nobody anything."""
    allowed = {"script-src": _hash(script), "style-src": _hash(style), "img-src": "data:"}
    nothing = dict.fromkeys(("default-src", "base-uri", "form-action"), "'none'")
    return "; ".join(f"{kind} {source}" for kind, source in (nothing | allowed).items())


def _hash(text: str) -> str:
    return f"'sha256-{b64encode(sha256(text.encode()).digest()).decode()}'"


def _data(json: str) -> str:
    """JSON in which no HTML can begin."""
    return json.replace("<", "\\u003c")
