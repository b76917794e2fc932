"""Compare the responses of model P on disk with model Q: the flow ``kl-divergence`` and ``python -m flows.run``."""

from __future__ import annotations

if __name__ == "__main__":
    # Prefect reads its settings when it is imported, so that the program prepares them before it loads this module.
    from flows.commands.run import main

    raise SystemExit(main())

import logging
import threading
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from typing import Any

from prefect import flow, task, unmapped
from prefect.cache_policies import NO_CACHE
from prefect.runtime import task_run
from prefect.states import Completed, Failed, State
from prefect.task_runners import ThreadPoolTaskRunner

from backends.base import Backend, BackendOptions
from backends.errors import ConfigError, TokenKLError
from backends.session import SessionClosedError
from backends.storage.files import remove_folder
from flows.cluster.pulse import dismiss_orphans
from flows.cluster.runners import LazyCluster, cluster_of
from flows.cluster.scoring import ClusterScoring, check_workers, joined_reports
from flows.config.models import RunConfig, check_capabilities, resolve_backend
from flows.config.templates import RunValues, folder_record, resolve_folders
from flows.folder.lock import FolderInUseError, run_lock
from flows.folder.output import prepare_output
from flows.progress import ProgressReporter
from flows.runtime.hooks import settle_jobs
from flows.runtime.interrupts import InterruptedRunError, stop_on_signal
from flows.runtime.logs import run_logging
from flows.stages.dry_run import check_cost, plan_rows, plan_without_calls
from flows.stages.inputs import find_inputs
from flows.stages.measuring import Measured
from flows.stages.passes import measure_files
from flows.stages.pending import pending_state, skipped_state, unchanged_state
from flows.stages.plan import Asker, Group, Plan, make_plan, requests_of
from flows.stages.report import PendingReport, RunReport, note_written
from flows.stages.reuse import reuse_raw
from flows.stages.scoring import GroupOutcome, Stores, close_session, score_and_store, session_for, stop_session
from flows.stages.writing import write_results
from flows.watch.artifacts import progress_artifact, show_plan, show_report
from flows.watch.ending import begin_watch, finish_run

logger = logging.getLogger("flows.run")  # a deployment loads this file as a script, under another name

_PROBLEMS_SHOWN = 100
_COUNTED = {"run": "contexts scored", "submit": "contexts in jobs", "collect": "contexts looked at"}


def _group_name() -> str:
    group = task_run.get_parameters()["group"]
    assert isinstance(group, Group)
    return group.name


@task(cache_policy=NO_CACHE)
def read(config: RunConfig) -> Plan:
    """Read all responses, find what is on disk already, and plan what is asked."""
    remove_folder(config.output_dir / ".parts")  # of a run that did not end
    scores = Stores.of(config.output_dir).scores
    recovered = scores.recover()
    if recovered:
        logger.info("%d scores of a run that was stopped were taken in", recovered)
    scores.prefetch()
    backend, options, _ = resolve_backend(config)
    asker = Asker(config, backend, options)
    files = find_inputs(config)
    if config.reuse_raw is not None:
        reuse_raw(config.reuse_raw, files, asker, scores)
    return make_plan(files, asker, scores, session_for(config).backend.in_flight())


@task(task_run_name=_group_name, cache_policy=NO_CACHE)
def score(group: Group, config: RunConfig, progress: ProgressReporter) -> GroupOutcome | State[GroupOutcome]:
    """Ask the backend for one group of responses; every answer is on disk before this returns."""
    backend, options, _ = resolve_backend(config)
    session = session_for(config)
    try:
        asks = list(requests_of(group, Asker(config, backend, options)))
        work = score_and_store(session.backend, asks, Stores.of(config.output_dir), progress.advance, config.stage)
        return session.run(work)
    except (ConfigError, OSError) as error:
        # It holds for every group: no rights, no credentials, a full disk. The others must not go on buying.
        session.cancel()
        return Failed(message=str(error), data=error)
    except TokenKLError as error:
        return Failed(message=str(error), data=error)


@task(cache_policy=NO_CACHE)
def measure(plan: Plan, config: RunConfig) -> Measured:
    """Turn both models' lists into one table of tokens per input file."""
    backend, options, _ = resolve_backend(config)
    return measure_files(plan.files, Asker(config, backend, options), Stores.of(config.output_dir))


@task(cache_policy=NO_CACHE)
def write(measured: Measured, config: RunConfig, record: dict[str, object]) -> RunReport:
    """Write the results: per file, per token, per response, and for the data set."""
    report = write_results(measured, config, record)
    note_written(report)
    logger.info("the results are in %s", config.output_dir)
    return report


@flow(name="kl-divergence", on_cancellation=[settle_jobs], on_crashed=[settle_jobs], on_failure=[settle_jobs])
def kl_divergence(config: RunConfig) -> RunReport | State[RunReport] | State[PendingReport]:
    """KL(P‖Q) per token, response and data set, from P's responses on disk and a backend that asks Q.

    Ends as Failed, with one line, if nothing could be asked at all; positions that could not be measured are part of a
    result and counted in it.
    """
    try:
        written, config = config, resolve_folders(config, RunValues.of_this_run())
        if config.dry_run:
            with run_logging():
                return _dry_run(config)
        prepare_output(config.output_dir, inside="scores")
        with run_lock(config.output_dir, partial(stop_session, config)) as check_lock:
            dismiss_orphans(config.output_dir)
            with run_logging(), cluster_of(config.task_runner) as cluster:
                return _run(config, written, check_lock, cluster)
    except (TokenKLError, OSError) as error:
        if isinstance(error, FolderInUseError) and config.stage == "collect":
            return skipped_state(error)
        return Failed(message=str(error), data=error)


def _dry_run(config: RunConfig) -> State[RunReport]:
    plan = plan_without_calls(config)
    rows = plan_rows(plan, config)
    for label, text in rows:
        logger.info("%s: %s", label, text)
    show_plan(rows, config)
    check_cost(plan, config.max_cost_usd)
    return Completed(message="dry run: nothing was asked")


def _run(
    config: RunConfig, written: RunConfig, check_lock: Callable[[], None], cluster: LazyCluster | None
) -> RunReport | State[RunReport] | State[PendingReport]:
    started = datetime.now(UTC)
    backend, options, notes = resolve_backend(config)
    check_capabilities(config, backend)
    for note in notes:
        logger.warning("%s", note)
    watch = begin_watch(config, written)
    session = session_for(config)
    try:
        plan = read(config)
        # A collect makes follow-up jobs at most, for what was within the limit when it was submitted.
        if config.stage != "collect":
            check_cost(plan, config.max_cost_usd)
        if cluster is not None and plan.groups:
            check_workers(config, cluster.get(), plan)
        buys = plan.n_to_ask > plan.n_in_flight and config.stage != "collect"
        proven = session.run(session.backend.preflight(config.model2)) if buys and config.preflight else None
        _log_plan(plan)
        with stop_on_signal(session) as stopped:
            outcomes, report = _score_all(plan, config, cluster, stopped)
            if stopped.is_set():
                raise InterruptedRunError(session.interrupt() or "nothing goes on elsewhere.", config)
        record = _record(plan, outcomes, started, proven) | {"backend_report": report}
    finally:
        close_session(config)
    check_lock()
    Stores.of(config.output_dir).scores.compact_all()
    pending = pending_state(config, plan, outcomes, report) or unchanged_state(config, plan)
    if pending is not None:
        remove_folder(config.output_dir / ".parts")
        return pending
    record["spent"] = _spent(outcomes, backend, options)
    record["folders"] = folder_record(written, config)
    measured = measure(plan, config) if cluster is None else _measure_on(cluster, plan, config)
    check_lock()
    ending = finish_run(watch, write(measured, config, record))
    show_report(ending.report, config, record["spent"])
    return ending.outcome


def _log_plan(plan: Plan) -> None:
    defects = [problem for problem in plan.problems if not problem.repaired]
    for problem in defects[:_PROBLEMS_SHOWN]:
        logger.warning("%s", problem.message)
    if len(defects) > _PROBLEMS_SHOWN:
        logger.warning("… and %d more; responses.parquet names them all", len(defects) - _PROBLEMS_SHOWN)
    logger.info(
        "%d responses in %d files: %d positions, %d contexts, %d of them on disk, %d to ask in %d groups",
        plan.n_responses, len(plan.files), plan.n_positions, plan.n_contexts, plan.n_stored, plan.n_to_ask,
        len(plan.groups),
    )  # fmt: skip


def _score_all(
    plan: Plan, config: RunConfig, cluster: LazyCluster | None, stopped: threading.Event
) -> tuple[list[GroupOutcome], dict[str, Any]]:
    """The outcome of each group that was asked, and what the backend says of its work."""
    session = session_for(config)
    if cluster is None or not plan.groups:
        return _score_in_threads(plan, config), session.backend.report()
    with ProgressReporter(_COUNTED[config.stage], plan.n_to_ask) as progress, progress_artifact(config, progress):
        scoring = ClusterScoring(config, cluster.get(), session, stopped)
        outcomes = scoring.run(plan, progress)
    return outcomes, joined_reports([session.backend.report(), *scoring.reports])


def _measure_on(cluster: LazyCluster, plan: Plan, config: RunConfig) -> Measured:
    backend, options, _ = resolve_backend(config)
    return measure_files(plan.files, Asker(config, backend, options), Stores.of(config.output_dir), cluster)


def _score_in_threads(plan: Plan, config: RunConfig) -> list[GroupOutcome]:
    workers = min(len(plan.groups), session_for(config).backend.parallel_groups())
    if not workers:
        return []
    with (
        ProgressReporter(_COUNTED[config.stage], plan.n_to_ask) as progress,
        progress_artifact(config, progress),
        ThreadPoolTaskRunner(workers) as runner,
    ):
        futures = runner.map(score, {"group": plan.groups, "config": unmapped(config), "progress": unmapped(progress)})
        futures.wait()
        states = [future.state for future in futures]
    failed = [state for state in states if not state.is_completed()]
    for state in failed:
        error = state.result(raise_on_failure=False)
        if isinstance(error, SessionClosedError):
            continue  # the user stopped the run, or another group has the reason
        if isinstance(error, ConfigError | OSError):
            raise error
        logger.error("a group of responses was not scored: %s", state.message)
    return [state.result() for state in states if state.is_completed()]


def _record(
    plan: Plan, outcomes: list[GroupOutcome], started: datetime, proven_version: str | None
) -> dict[str, object]:
    return {
        "started_at": started.isoformat(timespec="seconds"),
        "contexts": plan.n_contexts,
        "contexts_on_disk": plan.n_stored,
        "contexts_in_earlier_jobs": plan.n_in_flight,
        "contexts_asked": plan.n_to_ask,
        "contexts_scored_now": sum(outcome.n_scored for outcome in outcomes),
        "estimate": asdict(plan.estimate),
        "preflight_version": proven_version,
        "model_versions_now": sorted({version for outcome in outcomes for version in outcome.versions}),
    }


def _spent(outcomes: list[GroupOutcome], backend: type[Backend], options: BackendOptions) -> dict[str, object]:
    """What this run was charged for, by the service's own counts; answers that failed are not among them."""
    spent: dict[str, object] = {}
    for model in sorted({model for outcome in outcomes for model in outcome.tokens}):
        counts = [outcome.tokens[model] for outcome in outcomes if model in outcome.tokens]
        n_in, n_out = sum(count[0] for count in counts), sum(count[1] for count in counts)
        cost = backend.cost_usd(options, model, n_in, n_out)
        spent[model] = {"input_tokens": n_in, "output_tokens": n_out, "cost_usd": cost}
    return spent
