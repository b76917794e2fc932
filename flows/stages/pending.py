"""Runs that only make jobs, or only look at them: ``--stage submit`` and ``--stage collect``.

No process waits in between. What is pending then is said in the state of the flow run and on the terminal, and nothing
but scores is written: results only when every context is answered or finally failed, as by one run.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from prefect.states import Completed, Failed, State

from backends.base import NOT_SUBMITTED, WAITING
from backends.errors import BackendError, TokenKLError
from backends.storage import read_bytes
from flows.config.comparison import Comparison
from flows.config.models import RunConfig
from flows.stages.plan import Plan
from flows.stages.scoring import GroupOutcome
from flows.watch.report import PendingReport


def pending_state(
    config: RunConfig, plan: Plan, outcomes: Iterable[GroupOutcome], backend_report: Mapping[str, Any]
) -> State[PendingReport] | None:
    """How a run ends that has nothing to measure yet; None if it measures.

    Parameters
    ----------
    config : RunConfig
        With its folders filled in.
    plan : Plan
    outcomes : iterable of GroupOutcome
    backend_report : mapping
        ``jobs`` are counted, if there are any.
    """
    stage = config.stage
    if stage == "run":
        return None
    outcomes = list(outcomes)
    failures = Counter[str]()
    for outcome in outcomes:
        failures.update(outcome.failures)
    n_scored = sum(outcome.n_scored for outcome in outcomes)
    # A group whose task failed has no outcome: nobody knows yet what became of its jobs.
    unknown = plan.n_to_ask - n_scored - failures.total()
    not_submitted, waiting = failures.pop(NOT_SUBMITTED, 0), failures.pop(WAITING, 0)
    report = PendingReport(
        "Submitted" if stage == "submit" else "Waiting",
        n_on_disk=plan.n_stored + n_scored,
        n_waiting=waiting if stage == "submit" else waiting + unknown,
        n_not_submitted=not_submitted,
        n_jobs=len(backend_report.get("jobs", ())),
        failures=_refused(failures, unknown) if stage == "submit" else {},
        config=config,
    )
    if stage == "collect" and not (report.n_waiting or report.n_not_submitted):
        return None
    if report.failures and not report.n_waiting:
        message = " ".join(report.lines[1:])
        return Failed(message=message, data=BackendError(f"nothing was submitted: {message}"))
    return Completed(name=report.name, message=" ".join(report.lines), data=report)


def unchanged_state(
    comparison: Comparison, plan: Plan, outcomes: Iterable[GroupOutcome]
) -> State[PendingReport] | None:
    """How a collect ends that found nothing new since an earlier one measured; None if there is something to measure.

    A schedule goes on collecting. Measuring the same answers again would add a row to the history each time, and an
    alert where one was raised. What has no answer, and no job any more that may have one, is nothing new either.
    """
    config = comparison.config
    if config.stage != "collect" or any(outcome.n_scored or outcome.n_final for outcome in outcomes):
        return None
    run = _finished(comparison)
    if not run.get("recorded"):  # none, or its history and alert are missing
        return None
    on_disk = run["contexts_on_disk"] + run["contexts_scored_now"] + run.get("contexts_refused_now", 0)
    before, now = run["config"], json.loads(config.model_dump_json())
    same = all(before.get(name) == value for name, value in now.items() if name != "stage")
    if not (same and plan.n_contexts == run["contexts"] and plan.n_stored == on_disk):
        return None
    report = PendingReport(
        "Unchanged", n_on_disk=plan.n_stored, n_missing=plan.n_to_ask, reason=str(run["finished_at"]), config=config
    )
    return Completed(name=report.name, message=report.lines[0], data=report)


def _finished(comparison: Comparison) -> dict[str, Any]:
    """The record of an earlier run that ended here; empty if there is none."""
    try:
        return json.loads(read_bytes(comparison.folder.run))
    except FileNotFoundError:
        return {}


def _refused(failures: Counter[str], unknown: int) -> dict[str, int]:
    return dict(failures) | ({"group-failed": unknown} if unknown else {})


def skipped_state(error: TokenKLError) -> State[PendingReport]:
    """How a collect ends that found the folder in use: the run that uses it takes in the same jobs."""
    report = PendingReport("Skipped", reason=str(error))
    return Completed(name="Skipped", message=report.lines[0], data=report)
