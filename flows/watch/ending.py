"""What follows when the results of a run are on disk: its row in the history, drift, events, the final state."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import polars as pl
from prefect.client.schemas.objects import State
from prefect.runtime import flow_run
from prefect.states import Completed, Failed

from backends.errors import ConfigError, TokenKLError
from backends.storage import as_location, read_bytes, remove_folder, write_bytes_atomic
from flows.config.alert import AlertConfig
from flows.config.comparison import Comparison
from flows.config.folders import SETTINGS
from flows.config.models import RunConfig
from flows.config.templates import RunValues, differs_between_runs, double_brace_warning, has_fields
from flows.folder.finished import ResponseTableFile, q_lists, read_response_table
from flows.folder.output import write_json
from flows.watch.canary import decide_first
from flows.watch.events import DRIFT, VERSION_CHANGED, comparison_resource, emit, run_payload, version_changes
from flows.watch.history import Row, check_history, previous_run, previous_versions, record_row, row_of
from flows.watch.reference import Reference, load_baseline, load_previous
from flows.watch.report import EXIT_COMPLETE, EXIT_DRIFT, EXIT_INCOMPLETE, RunReport
from flows.watch.verdict import Verdict, decide, decide_q, undecided
from kl.finished.between import kl_between
from kl.output.report.page import with_drift
from kl.output.room import refusal_of
from kl.tables.totals import TokenTableError

logger = logging.getLogger(__name__)

DRIFTED = "Drifted"


class DriftedRunError(TokenKLError):
    """A deployment's run that drifted, with ``fail_on_drift``: what its log ends with. The results are complete."""


@dataclass(frozen=True, slots=True)
class DriftContext:
    """What the end of a run needs from its start: what it is compared with, read before anything is overwritten.

    ``baseline`` is the run, or why it cannot be had. ``rolling`` says that each run has an output folder of its own.
    ``emitted`` are the events that an earlier try of this flow run emitted.
    """

    comparison: Comparison
    rolling: bool
    emitted: tuple[str, ...]
    standing: ResponseTableFile | None
    baseline: Reference | str | None

    @property
    def config(self) -> RunConfig:
        """With its folders filled in."""
        return self.comparison.config


@dataclass(frozen=True, slots=True)
class Results:
    """What a run found, for people, and as ``summary.json`` and ``run.json`` are to say it.

    ``again`` is the response table of the positions that were asked twice; None if none was.
    """

    report: RunReport
    summary: dict[str, Any]
    run: dict[str, Any]
    again: pl.DataFrame | None = None


@dataclass(frozen=True, slots=True)
class RunOutcome:
    """The report with what was added to it, and how the flow ends."""

    report: RunReport
    state: State[RunReport]


def drift_context(comparison: Comparison) -> DriftContext:
    """Prove that the history can be written, and read what may be overwritten. The output folder must be locked.

    Raises
    ------
    ConfigError
        If the history cannot be used, or the baseline is no finished run of the same kind.
    """
    written, config = comparison.written, comparison.config
    assert config.history is not None, "resolve_folders gives the history a place"
    for line in filter(None, (double_brace_warning(str(getattr(written, name))) for name in SETTINGS)):
        logger.warning("%s", line)
    earlier_try = check_history(config.history).filter(pl.col("run_id") == flow_run.id)
    emitted = tuple(earlier_try["events"].explode().drop_nulls())
    alert = config.alert
    standing = _standing(config) if alert is not None and alert.compared_with == "previous" else None
    rolling = differs_between_runs(str(written.output_dir))
    return DriftContext(comparison, rolling, emitted, standing, _baseline(config, written))


def _standing(config: RunConfig) -> ResponseTableFile | None:
    try:
        return read_response_table(config.output_dir)
    except (FileNotFoundError, ConfigError):
        return (
            None  # nothing that could be compared with; what the history then asks for is not there, and that is said
        )


def _baseline(config: RunConfig, written: RunConfig) -> Reference | str | None:
    if config.alert is None or config.alert.baseline is None:
        return None
    try:
        return load_baseline(config.alert.baseline, config)
    except ConfigError as error:
        assert written.alert is not None, "the settings are the same"
        if not has_fields(str(written.alert.baseline)):
            raise
        return str(error)  # such as yesterday's run, which failed: no reason not to measure today


def finish_run(context: DriftContext, results: Results) -> RunOutcome:
    """History row, drift and events, in this order, then ``run.json``, last and once.

    Every other result is on disk before, and stays whatever happens here.

    Raises
    ------
    ConfigError, OSError
        If the history cannot be written; with where the results are.
    """
    config, place = context.config, context.comparison.folder
    concluded: dict[str, Any] = {}
    try:
        outcome = _concluded(context, results, concluded)
    except ConfigError as error:
        raise ConfigError(f"the results are in {config.output_dir}, but {error}") from error
    except OSError as error:
        if refusal_of(error) is not None:
            raise
        raise OSError(
            f"the results are in {config.output_dir}, but not their row in {config.history}: {error}"
        ) from error
    finally:
        write_json(place.run, results.run | concluded)
        remove_folder(place.unfinished)
    return outcome


def _concluded(context: DriftContext, results: Results, concluded: dict[str, Any]) -> RunOutcome:
    """What the run means beside earlier ones; ``concluded`` gets what ``run.json`` says of that."""
    config, report = context.config, results.report
    responses = read_response_table(config.output_dir)
    row = row_of(results.summary, results.run) | _identity(responses, report)
    row["events"] = list(context.emitted)
    history = config.history
    assert history is not None, "resolve_folders gives the history a place"
    before = record_row(history, row)
    verdict = _verdict(context, row, before, responses, results.again)
    if verdict is not None:
        concluded["drift"] = verdict.to_json()
        write_json(context.comparison.folder.summary, results.summary | concluded)
    drifted = verdict is not None and verdict.decision == "drift"
    row["events"] = _emit_all(context, verdict, row, before)
    row |= _drift_columns(verdict)
    if drifted and config.fail_on_drift:
        row["exit_status"] = EXIT_DRIFT
    record_row(history, row)
    concluded["recorded"] = True
    if verdict is None:
        return RunOutcome(report, Completed(message=report.line, data=report))
    page = context.comparison.folder.report
    if str(page) in report.paths:
        _tell_page(page, concluded["drift"])
    report = replace(_with_verdict(report, verdict), failed_on_drift=drifted and config.fail_on_drift)
    return RunOutcome(report, _state(report, verdict, config))


def _tell_page(page: Path, drift: dict[str, Any]) -> None:
    """Add what was decided to the page of the run. That is in the other files, so that a page is not worth the run."""
    try:
        told = with_drift(read_bytes(page).decode(), drift)
        write_bytes_atomic(page, told.encode(errors="replace"))  # a folder may be named by any bytes
    except OSError as error:
        if refusal_of(error) is not None:
            raise
        logger.error("%s does not say what the alert decided: %s", page, error)


def _identity(responses: ResponseTableFile, report: RunReport) -> Row:
    run = RunValues.of_this_run()
    return {
        "run_id": run.flow_run_id,
        "flow_run_name": run.flow_run_name,
        "deployment": run.deployment_name,
        "scheduled_for": run.scheduled_for,
        "responses_sha256": responses.sha256,
        "exit_status": EXIT_COMPLETE if report.complete else EXIT_INCOMPLETE,
    }


def _verdict(
    context: DriftContext, row: Row, before: pl.DataFrame, responses: ResponseTableFile, again: pl.DataFrame | None
) -> Verdict | None:
    alert = context.config.alert
    if alert is None:
        return None
    reference = None if alert.test == "permutation" else _reference(context, alert, row, before)
    if alert.test == "permutation":
        found = decide_first(context.config, alert, row, before)
    elif isinstance(reference, Verdict):
        found = reference
    elif alert.of == "q" and reference is not None:
        found = then_against_now(context, alert, reference, row, again)
    else:
        found = decide(alert, responses.table, reference)
    verdict = replace(found, noise_floor=row["noise_floor"])
    if alert.compared_with is not None and row["contexts_asked"] == 0 and context.config.stage != "collect":
        hint = "" if context.rolling else "; give each day a folder, such as --output-dir 'results/{date}'"
        verdict.warnings.append(
            "drift: nothing was asked in this run, as every answer was on disk, so that a change of the models since "
            f"then cannot show{hint}"
        )
    return verdict


def _reference(context: DriftContext, alert: AlertConfig, row: Row, before: pl.DataFrame) -> Reference | Verdict | None:
    """The run to compare with, None if none is asked for; a verdict where there is none."""
    if isinstance(context.baseline, str):
        return undecided(alert, context.baseline)
    if alert.compared_with != "previous":
        return context.baseline
    found = previous_run(before, row, other_folders_only=context.rolling)
    if found is None:
        # As it is on the first day: nothing is wrong.
        return undecided(alert, f"{context.config.history} has no earlier run to compare with", warn=False)
    try:
        return load_previous(found, context.config.output_dir, context.standing)
    except (ConfigError, OSError) as error:  # this run's own results stand, whatever became of the former one's
        return undecided(alert, str(error))


def then_against_now(
    context: DriftContext, alert: AlertConfig, reference: Reference, row: Row, again: pl.DataFrame | None
) -> Verdict:
    """The verdict of an alert of Q, from the lists of two runs on disk; undecided if they cannot tell."""
    folder = context.config.output_dir
    if reference.folder == str(folder):
        return undecided(alert, f"the lists of the earlier run in {folder} were overwritten; give each run its folder")
    try:
        then = q_lists(as_location(reference.folder), f"the {reference.kind} run")
        between = kl_between(then, q_lists(folder, "this run"), context.config.estimator)
    except (ConfigError, OSError, TokenTableError) as error:  # as above
        return undecided(alert, str(error))
    except pl.exceptions.PolarsError as error:
        reason = f"the lists in {reference.folder} or {folder} cannot be read: {' '.join(str(error).split())}"
        return undecided(alert, reason)
    found = decide_q(alert, between, again, reference)
    if found.change is None:
        return found
    if again is None and context.config.noise_floor is not None:
        return found.left_open("the noise floor of Q was asked for and none was measured")
    if found.decision == "no drift" and _mostly_old(context, row):
        return found.left_open(
            f"{row['contexts_on_disk']:,} of {row['contexts']:,} answers were on disk before this run, and what Q said "
            "then shows no change since; give each run its folder, such as --output-dir 'results/{date}'"
        )
    return found


def _mostly_old(context: DriftContext, row: Row) -> bool:
    """Whether most answers may be of any earlier day; those in a folder of this run's own are this run's."""
    if context.rolling or context.config.stage == "collect":
        return False
    return 2 * row["contexts_on_disk"] > row["contexts"]


def _emit_all(context: DriftContext, verdict: Verdict | None, row: Row, before: pl.DataFrame) -> list[str]:
    """The names of the events of this run: those that are emitted now, and those of an earlier try."""
    history = str(context.config.history)
    resource, about = comparison_resource(row, history), run_payload(row, history)
    due = [
        (VERSION_CHANGED, change["which"], change) for change in version_changes(row, previous_versions(before, row))
    ]
    for _, _, change in due:
        logger.warning("%s", change["message"])
    if verdict is not None and verdict.decision == "drift":
        due.append((DRIFT, "", verdict.to_json()))
    emitted = set(context.emitted)
    for name, which, payload in due:
        if name not in context.emitted and emit(name, which, resource, payload | about, row["run_id"]):
            emitted.add(name)
    return sorted(emitted)


def _drift_columns(verdict: Verdict | None) -> Row:
    if verdict is None:
        return {}
    found, between = verdict.to_json(), verdict.between
    then_now = None if between is None else between.per_token
    canary = verdict.canary
    return {
        "drift_of": found["of"],
        "then_now": None if then_now is None else then_now.value,
        "then_now_low": None if then_now is None else then_now.ci_low,
        "then_now_high": None if then_now is None else then_now.ci_high,
        "then_now_certified_lower": None if between is None else between.lower.value,
        "then_now_contexts": None if between is None else between.n_measured,
        "canary_distance": None if canary is None else canary.distance,
        "canary_limit": None if canary is None else canary.limit,
        "canary_p": None if canary is None else canary.p_value,
        "drift": found["decision"],
        "drift_difference": found["difference"],
        "drift_low": found["difference_low"],
        "drift_high": found["difference_high"],
        "drift_level": found["level"],
        "drift_threshold": found["threshold"],
        "drift_reference": None if verdict.reference is None else verdict.reference.folder,
    }


def _with_verdict(report: RunReport, verdict: Verdict) -> RunReport:
    rows = [*report.headline, *verdict.rows]
    return replace(report, headline=rows, verdict=verdict.rows, warnings=[*report.warnings, *verdict.warnings])


def _state(report: RunReport, verdict: Verdict, config: RunConfig) -> State[RunReport]:
    if verdict.decision != "drift":
        return Completed(message=f"{report.line}; {verdict.message}", data=report)
    message = f"{verdict.message}; KL(P‖Q) {report.line}"
    if not config.fail_on_drift:
        return Completed(name=DRIFTED, message=message, data=report)
    # The process of a deployment's run ends with what a failed state holds as its error; elsewhere it is the result.
    by_hand = RunValues.of_this_run().deployment_name is None
    data = report if by_hand else DriftedRunError(message)
    return Failed(name=DRIFTED, message=message, data=data)
