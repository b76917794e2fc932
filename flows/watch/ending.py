"""What follows when the results of a run are on disk: its row in the history, drift, events, the final state."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, replace

import polars as pl
from prefect.client.schemas.objects import State
from prefect.runtime import flow_run
from prefect.states import Completed, Failed

from backends.errors import ConfigError, TokenKLError
from backends.storage.files import read_bytes
from flows.commands.arguments import EXIT_COMPLETE, EXIT_DRIFT, EXIT_INCOMPLETE
from flows.config.alert import AlertConfig
from flows.config.models import RunConfig
from flows.config.templates import SETTINGS, RunValues, differs_between_runs, doubtful_braces, has_fields
from flows.folder.output import write_json
from flows.stages.report import RunReport
from flows.watch.events import DRIFT, VERSION_CHANGED, comparison_resource, emit, run_payload, version_changes
from flows.watch.history import Row, check_history, previous_run, previous_versions, record_row, row_of
from flows.watch.reference import Reference, ResponseFile, load_baseline, load_previous, read_response_table
from flows.watch.verdict import Verdict, decide, undecided

logger = logging.getLogger(__name__)

DRIFTED = "Drifted"


class DriftedRunError(TokenKLError):
    """A deployment's run that drifted, with ``fail_on_drift``: what its log ends with. The results are complete."""


@dataclass(frozen=True, slots=True)
class Watch:
    """What the end of a run needs from its start: what it is compared with, read before anything is overwritten.

    ``baseline`` is the run, or why it cannot be had. ``rolling`` says that each run has an output folder of its own.
    ``emitted`` are the events that an earlier try of this flow run emitted.
    """

    config: RunConfig
    rolling: bool
    emitted: tuple[str, ...]
    standing: ResponseFile | None
    baseline: Reference | str | None


@dataclass(frozen=True, slots=True)
class Ending:
    """The report with what was added to it, and what the flow returns."""

    report: RunReport
    outcome: RunReport | State[RunReport]


def begin_watch(config: RunConfig, written: RunConfig) -> Watch:
    """Prove that the history can be written, and read what may be overwritten. The output folder must be locked.

    Parameters
    ----------
    config, written : RunConfig
        With its folders filled in (`flows.config.templates.resolve_folders`), and as it was written.

    Raises
    ------
    ConfigError
        If the history cannot be used, or the baseline is no finished run of the same kind.
    """
    assert config.history is not None, "resolve_folders gives the history a place"
    for line in filter(None, (doubtful_braces(str(getattr(written, name))) for name in SETTINGS)):
        logger.warning("%s", line)
    earlier_try = check_history(config.history).filter(pl.col("run_id") == flow_run.id)
    emitted = tuple(earlier_try["events"].explode().drop_nulls())
    alert = config.alert
    standing = None
    if alert is not None and alert.compared_with == "previous":
        standing = _standing(config)
    return Watch(config, differs_between_runs(str(written.output_dir)), emitted, standing, _baseline(config, written))


def _standing(config: RunConfig) -> ResponseFile | None:
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


def finish_run(watch: Watch, report: RunReport) -> Ending:
    """History row, drift, events, in this order; every result is on disk before, and stays whatever happens here.

    Raises
    ------
    ConfigError, OSError
        If the history cannot be written; with where the results are.
    """
    config = watch.config
    try:
        return _finish(watch, report)
    except ConfigError as error:
        raise ConfigError(f"the results are in {config.output_dir}, but {error}") from error
    except OSError as error:
        raise OSError(
            f"the results are in {config.output_dir}, but not their row in {config.history}: {error}"
        ) from error


def _finish(watch: Watch, report: RunReport) -> Ending:
    config = watch.config
    documents = {name: json.loads(read_bytes(config.output_dir / name)) for name in ("summary.json", "run.json")}
    responses = read_response_table(config.output_dir)
    row = row_of(documents["summary.json"], documents["run.json"]) | _identity(responses, report)
    row["events"] = list(watch.emitted)
    history = config.history
    assert history is not None, "resolve_folders gives the history a place"
    before = record_row(history, row)
    verdict = _verdict(watch, row, before, responses)
    if verdict is not None:
        for name, document in documents.items():
            write_json(config.output_dir / name, document | {"drift": verdict.to_json()})
    drifted = verdict is not None and verdict.decision == "drift"
    row["events"] = _emit_all(watch, verdict, row, before)
    row |= _drift_columns(verdict)
    if drifted and config.fail_on_drift:
        row["exit_status"] = EXIT_DRIFT
    record_row(history, row)
    told = {} if verdict is None else {"drift": verdict.to_json()}
    write_json(config.output_dir / "run.json", documents["run.json"] | told | {"recorded": True})
    if verdict is None:
        return Ending(report, report)
    report = _with_verdict(report, verdict)
    return Ending(report, _state(report, verdict, config) if drifted else report)


def _identity(responses: ResponseFile, report: RunReport) -> Row:
    run = RunValues.of_this_run()
    return {
        "run_id": run.flow_run_id,
        "flow_run_name": run.flow_run_name,
        "deployment": run.deployment_name,
        "scheduled_for": run.scheduled_for,
        "responses_sha256": responses.sha256,
        "exit_status": EXIT_COMPLETE if report.complete else EXIT_INCOMPLETE,
    }


def _verdict(watch: Watch, row: Row, before: pl.DataFrame, responses: ResponseFile) -> Verdict | None:
    alert = watch.config.alert
    if alert is None:
        return None
    verdict = _compared(watch, alert, row, before, responses)
    if alert.compared_with == "previous" and row["contexts_asked"] == 0 and watch.config.stage != "collect":
        hint = "" if watch.rolling else "; give each day a folder, such as --output-dir 'results/{date}'"
        verdict.warnings.append(
            "drift: nothing was asked in this run, as every answer was on disk, so that a change of the models since "
            f"then cannot show{hint}"
        )
    return verdict


def _compared(watch: Watch, alert: AlertConfig, row: Row, before: pl.DataFrame, responses: ResponseFile) -> Verdict:
    if isinstance(watch.baseline, str):
        return undecided(alert, watch.baseline)
    if alert.compared_with != "previous":
        return decide(alert, responses.table, watch.baseline)
    found = previous_run(before, row, other_folders_only=watch.rolling)
    if found is None:
        # As it is on the first day: nothing is wrong.
        return undecided(alert, f"{watch.config.history} has no earlier run to compare with", warn=False)
    try:
        reference = load_previous(found, watch.config.output_dir, watch.standing)
    except (ConfigError, OSError) as error:  # this run's own results stand, whatever became of the former one's
        return undecided(alert, str(error))
    return decide(alert, responses.table, reference)


def _emit_all(watch: Watch, verdict: Verdict | None, row: Row, before: pl.DataFrame) -> list[str]:
    """The names of the events of this run: those that are emitted now, and those of an earlier try."""
    history = str(watch.config.history)
    resource, about = comparison_resource(row, history), run_payload(row, history)
    due = [
        (VERSION_CHANGED, change["which"], change) for change in version_changes(row, previous_versions(before, row))
    ]
    for _, _, change in due:
        logger.warning("%s", change["message"])
    if verdict is not None and verdict.decision == "drift":
        due.append((DRIFT, "", verdict.to_json()))
    emitted = set(watch.emitted)
    for name, which, payload in due:
        if name not in watch.emitted and emit(name, which, resource, payload | about, row["run_id"]):
            emitted.add(name)
    return sorted(emitted)


def _drift_columns(verdict: Verdict | None) -> Row:
    if verdict is None:
        return {}
    found = verdict.to_json()
    return {
        "drift": found["decision"],
        "drift_difference": found["difference"],
        "drift_low": found["difference_low"],
        "drift_high": found["difference_high"],
        "drift_level": found["level"],
        "drift_threshold": found["threshold"],
        "drift_reference": None if verdict.reference is None else verdict.reference.folder,
    }


def _with_verdict(report: RunReport, verdict: Verdict) -> RunReport:
    rows = [*report.headline, ("Drift", verdict.message)]
    return replace(report, headline=rows, warnings=[*report.warnings, *verdict.warnings])


def _state(report: RunReport, verdict: Verdict, config: RunConfig) -> State[RunReport]:
    if not config.fail_on_drift:
        return Completed(name=DRIFTED, message=verdict.message, data=report)
    # The process of a deployment's run ends with what a failed state holds as its error; elsewhere it is the result.
    by_hand = RunValues.of_this_run().deployment_name is None
    data = report if by_hand else DriftedRunError(verdict.message)
    return Failed(name=DRIFTED, message=verdict.message, data=data)
