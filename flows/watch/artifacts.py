"""What Prefect's user interface shows of a run: progress, headline, warnings, and where the results are.

Only for runs that a Prefect server records: the temporary server of a run by hand has no user interface. An artifact
that cannot be made is an error in the log and nothing more, since the results are on disk by then.
"""

from __future__ import annotations

import contextvars
import logging
import re
import threading
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from uuid import UUID

from httpx import HTTPError
from prefect.artifacts import (
    Artifact,
    LinkArtifact,
    MarkdownArtifact,
    TableArtifact,
    create_progress_artifact,
    update_progress_artifact,
)
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import ArtifactUpdate

from flows.config.models import RunConfig
from flows.config.templates import RunValues
from flows.runtime.progress import ProgressReporter
from flows.runtime.server import has_server
from flows.watch.page import console_link, markdown_of, page_link, plain
from flows.watch.report import RunReport
from kl.output.glance import Figure

logger = logging.getLogger(__name__)

_SECONDS_BETWEEN_UPDATES = 10.0
_LONGEST_WAIT_S = 20.0  # for the last update, when the run goes on
_LONGEST_KEY = 200
_HEADS = ("figure", "estimate", "95 % low", "95 % high", "certainly at least")


def artifact_key(config: RunConfig, kind: str) -> str:
    """``nightly-vertex-batch-summary``: the same for every run of a deployment, so that its history is in one place.

    A run without a deployment goes by its model Q.
    """
    name = f"{RunValues.of_this_run().deployment_name or config.model2}-{kind}".lower()
    return re.sub(r"[^a-z0-9]+", "-", name).strip("-")[-_LONGEST_KEY:].strip("-")


@contextmanager
def progress_artifacts(config: RunConfig, progress: ProgressReporter) -> Generator[None]:
    """While work is under way, its share that is done and a table of what else is known, anew every few seconds."""
    if not progress.total or not has_server():
        yield
        return
    stop = threading.Event()
    # An artifact belongs to the run that it is made in, which a new thread does not know.
    follow = contextvars.copy_context().run
    thread = threading.Thread(target=follow, args=(_follow, config, progress, stop), name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(_LONGEST_WAIT_S)


def _follow(config: RunConfig, progress: ProgressReporter, stop: threading.Event) -> None:
    """Make two artifacts, and update them until the work is over; none more if the first cannot be made."""
    about = f"{progress.what} of {progress.total:,}"
    shown, rows = progress.percent, progress.rows()
    bar = _tried("progress", lambda: create_progress_artifact(shown, artifact_key(config, "progress"), about))
    table = bar and _tried("work", lambda: _work_table(config, about, rows).create())
    while bar is not None:
        stopped = stop.wait(_SECONDS_BETWEEN_UPDATES)
        now, known = progress.percent, progress.rows()
        if now != shown and _tried("progress", lambda now=now: update_progress_artifact(bar, now)) is not None:
            shown = now
        if table is not None and known != rows:
            rows = known
            _tried("work", lambda known=known: _update(table.id, _work_table(config, about, known)))
        if stopped:
            return


def _work_table(config: RunConfig, about: str, rows: Sequence[tuple[str, str]]) -> TableArtifact:
    return TableArtifact(key=artifact_key(config, "work"), description=about, table=_table(rows))


def _update(artifact: UUID, table: TableArtifact) -> bool:
    get_client(sync_client=True).update_artifact(artifact, ArtifactUpdate(data=table.format()))
    return True


def show_report(report: RunReport, config: RunConfig, spent: Mapping[str, Any]) -> None:
    """Put what a run found before whoever looks at it in Prefect.

    Parameters
    ----------
    spent : mapping
        Model → what the service counted in this run, as in ``run.json``.
    """
    if not has_server():
        return
    for artifact in _artifacts(report, config, spent):
        if _tried(f"artifact {artifact.key}", lambda artifact=artifact: artifact.create()) is None:
            return  # nor would the others come through, and each try takes its time


def show_plan(rows: Sequence[tuple[str, str]], config: RunConfig) -> None:
    """Put what a dry run found before whoever looks at it in Prefect."""
    if has_server():
        key = artifact_key(config, "plan")
        _tried("plan", lambda: TableArtifact(key=key, description="Dry run", table=_table(rows)).create())


def _tried(what: str, make: Callable[[], Any]) -> Any:
    """What ``make`` returns; None, and an error in the log, if it fails in whatever way."""
    try:
        return make()
    except HTTPError:  # the server is away; where the request was made is of no interest
        logger.error("the %s is not shown in Prefect; the run goes on", what)
        return None
    except Exception:
        logger.exception("the %s is not shown in Prefect; the run goes on", what)
        return None


def _artifacts(report: RunReport, config: RunConfig, spent: Mapping[str, Any]) -> Iterable[Artifact]:
    about = f"{report.line}; model Q = {plain(config.model2)}"
    yield TableArtifact(key=artifact_key(config, "summary"), description=about, table=summary_table(report, spent))
    yield MarkdownArtifact(key=artifact_key(config, "report"), description=about, markdown=markdown_of(report, config))
    link = console_link(str(config.output_dir))
    if link is not None:
        text = str(config.output_dir)
        yield LinkArtifact(key=artifact_key(config, "results"), description=about, link=link, link_text=plain(text))
    page = next(filter(None, map(page_link, report.paths)), None)
    if page is not None:
        yield LinkArtifact(key=artifact_key(config, "page"), description=about, link=page, link_text="report.html")


def _table(rows: Sequence[tuple[str, str]]) -> list[dict[str, str]]:
    # Cells are Markdown to the user interface, as descriptions are.
    return [{"figure": plain(label), "value": plain(text)} for label, text in rows]


def summary_table(report: RunReport, spent: Mapping[str, Any]) -> list[dict[str, str]]:
    """The figures in columns; below them what is read before any number, the verdict on drift, and what was spent."""
    rows = [figure._asdict() for figure in report.figures]
    words = [
        *(("read first", alarm) for alarm in report.alarms),
        ("positions measured", f"{report.n_measured:,} of {report.n_positions:,}"),
        *report.verdict,
        *_spent_rows(spent),
    ]
    rows += [Figure(label, text, "", "", "")._asdict() for label, text in words]
    heads = dict(zip(Figure._fields, _HEADS, strict=True))
    return [{heads[name]: plain(text) for name, text in row.items()} for row in rows]


def _spent_rows(spent: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for model, counts in spent.items():
        cost = counts["cost_usd"]
        price = "price not known" if cost is None else f"{cost:.4f} USD"
        rows.append(
            (f"Asked now: {model}", f"{price}, {counts['input_tokens']:,} + {counts['output_tokens']:,} tokens")
        )
    return rows
