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
from urllib.parse import quote
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
from prefect.settings import get_current_settings

from flows.config.models import RunConfig
from flows.config.templates import RunValues
from flows.runtime.progress import ProgressReporter
from flows.runtime.server import is_temporary
from flows.watch.markdown import escaped, one_line
from flows.watch.report import RunReport

logger = logging.getLogger(__name__)

_SECONDS_BETWEEN_UPDATES = 10.0
_LONGEST_WAIT_S = 20.0  # for the last update, when the run goes on
_LONGEST_KEY = 200
_LONGEST_LINE = 300
_LINES_SHOWN = 20  # of warnings, and of reasons


def artifact_key(config: RunConfig, kind: str) -> str:
    """``nightly-vertex-batch-summary``: the same for every run of a deployment, so that its history is in one place.

    A run without a deployment goes by its model Q.
    """
    name = f"{RunValues.of_this_run().deployment_name or config.model2}-{kind}".lower()
    return re.sub(r"[^a-z0-9]+", "-", name).strip("-")[-_LONGEST_KEY:].strip("-")


@contextmanager
def progress_artifacts(config: RunConfig, progress: ProgressReporter) -> Generator[None]:
    """While work is under way, its share that is done and a table of what else is known, anew every few seconds."""
    if not progress.total or not _has_server():
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
    if not _has_server():
        return
    for artifact in _artifacts(report, config, spent):
        if _tried(f"artifact {artifact.key}", lambda artifact=artifact: artifact.create()) is None:
            return  # nor would the others come through, and each try takes its time


def show_plan(rows: Sequence[tuple[str, str]], config: RunConfig) -> None:
    """Put what a dry run found before whoever looks at it in Prefect."""
    if _has_server():
        key = artifact_key(config, "plan")
        _tried("plan", lambda: TableArtifact(key=key, description="Dry run", table=_table(rows)).create())


def _has_server() -> bool:
    url = get_current_settings().api.url
    return url is not None and not is_temporary(url)


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
    about = f"{_share(report)}, model Q = {_plain(config.model2)}"
    first = [("Before any number", alarm) for alarm in report.alarms]
    table = _table([*first, *report.headline, *_spent_rows(spent)])
    yield TableArtifact(key=artifact_key(config, "summary"), description=about, table=table)
    yield MarkdownArtifact(key=artifact_key(config, "report"), description=about, markdown=markdown_of(report, config))
    link = console_link(str(config.output_dir))
    if link is not None:
        text = str(config.output_dir)
        yield LinkArtifact(key=artifact_key(config, "results"), description=about, link=link, link_text=_plain(text))
    page = next(filter(None, map(page_link, report.paths)), None)
    if page is not None:
        yield LinkArtifact(key=artifact_key(config, "page"), description=about, link=page, link_text="report.html")


def _table(rows: Sequence[tuple[str, str]]) -> list[dict[str, str]]:
    # Cells are Markdown to the user interface, as descriptions are.
    return [{"figure": _plain(label), "value": _plain(text)} for label, text in rows]


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


def _spent_rows(spent: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for model, counts in spent.items():
        cost = counts["cost_usd"]
        price = "price not known" if cost is None else f"{cost:.4f} USD"
        rows.append(
            (f"Asked now: {model}", f"{price}, {counts['input_tokens']:,} + {counts['output_tokens']:,} tokens")
        )
    return rows


def markdown_of(report: RunReport, config: RunConfig) -> str:
    """The report as a page: what was found, what to be careful about, what is missing, where the files are."""
    parts = [
        f"# KL(P‖Q), Q = {_plain(config.model2)}",
        _share(report),
        _section("Before any number", report.alarms),
        "| | |\n|---|---|\n" + "\n".join(f"| {_plain(label)} | {_plain(text)} |" for label, text in report.headline),
        _section("Warnings", [warning for warning in report.warnings if warning not in report.alarms]),
        _section("Positions not measured", _counts(report.missing)),
        _section("Responses or files skipped", _counts(report.skipped)),
        _section("Places in the input repaired", _counts(report.repaired)),
        _section("Results", report.paths),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _share(report: RunReport) -> str:
    return f"{report.n_measured:,} of {report.n_positions:,} positions measured"


def _counts(counts: Mapping[str, int]) -> list[str]:
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return [f"{count:,}: {reason}" for reason, count in ranked]


def _section(title: str, lines: list[str]) -> str:
    if not lines:
        return ""
    shown = [f"- {_plain(line)}" for line in lines[:_LINES_SHOWN]]
    if len(lines) > _LINES_SHOWN:
        shown.append(f"- … and {len(lines) - _LINES_SHOWN:,} more")
    return "\n".join([f"## {title}", *shown])


def _plain(text: str) -> str:
    return escaped(one_line(text, _LONGEST_LINE))
