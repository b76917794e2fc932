"""Compare the responses of model P on disk with model Q: the flow ``kl-divergence`` and ``python -m flows.run``."""

from __future__ import annotations

if __name__ == "__main__":
    # Prefect reads its settings when it is imported, so that the program prepares them before it loads this module.
    from flows.run_program import main

    raise SystemExit(main())

import logging
import shutil
from dataclasses import asdict
from datetime import UTC, datetime

from prefect import flow, task, unmapped
from prefect.cache_policies import NO_CACHE
from prefect.runtime import task_run
from prefect.states import Failed, State
from prefect.task_runners import ThreadPoolTaskRunner

from backends.base import Backend, BackendOptions
from backends.errors import ConfigError, TokenKLError
from backends.session import SessionClosedError
from flows.config import RunConfig, check_capabilities, resolve_backend
from flows.dry_run import check_cost
from flows.inputs import find_inputs
from flows.interrupts import InterruptedRunError, stop_on_signal
from flows.measuring import Measured, measure_files
from flows.output_folder import prepare_output
from flows.plan import Asker, Group, Plan, make_plan, requests_of
from flows.progress import ProgressReporter
from flows.report import RunReport
from flows.reuse import reuse_raw
from flows.scoring import GroupOutcome, Stores, close_session, run_lock, score_and_store, session_for
from flows.writing import write_results

logger = logging.getLogger(__name__)

_PROBLEMS_SHOWN = 100


def _group_name() -> str:
    group = task_run.get_parameters()["group"]
    assert isinstance(group, Group)
    return group.name


@task(cache_policy=NO_CACHE)
def read(config: RunConfig) -> Plan:
    """Read all responses, find what is on disk already, and plan what is asked."""
    shutil.rmtree(config.output_dir / ".parts", ignore_errors=True)  # of a run that did not end
    scores = Stores.of(config.output_dir).scores
    recovered = scores.recover()
    if recovered:
        logger.info("%d scores of a run that was stopped were taken in", recovered)
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
        work = score_and_store(session.backend, asks, Stores.of(config.output_dir), progress.advance)
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
    return write_results(measured, config, record)


@flow(name="kl-divergence")
def kl_divergence(config: RunConfig) -> RunReport | State[RunReport]:
    """KL(P‖Q) per token, response and data set, from P's responses on disk and a backend that asks Q.

    Ends as Failed, with one line, if nothing could be asked at all; positions that could not be measured are part of a
    result and counted in it.
    """
    try:
        prepare_output(config.output_dir, inside="scores")
        with run_lock(config.output_dir):
            return _run(config)
    except (TokenKLError, OSError) as error:
        return Failed(message=str(error), data=error)


def _run(config: RunConfig) -> RunReport:
    started = datetime.now(UTC)
    backend, options, notes = resolve_backend(config)
    check_capabilities(config, backend)
    for note in notes:
        logger.warning("%s", note)
    session = session_for(config)
    try:
        plan = read(config)
        check_cost(plan, config.max_cost_usd)
        buys = plan.n_to_ask > plan.n_in_flight
        proven = session.run(session.backend.preflight(config.model2)) if buys and config.preflight else None
        _log_plan(plan)
        with stop_on_signal(session) as stopped:
            outcomes = _score_all(plan, config)
            if stopped.is_set():
                raise InterruptedRunError(session.interrupt() or "nothing goes on elsewhere.")
        record = _record(plan, outcomes, started, proven) | {"backend_report": session.backend.report()}
    finally:
        close_session(config)
    Stores.of(config.output_dir).scores.compact_all()
    record["spent"] = _spent(outcomes, backend, options)
    return write(measure(plan, config), config, record)


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


def _score_all(plan: Plan, config: RunConfig) -> list[GroupOutcome]:
    workers = min(len(plan.groups), session_for(config).backend.parallel_groups())
    if not workers:
        return []
    with ProgressReporter("contexts scored", plan.n_to_ask) as progress, ThreadPoolTaskRunner(workers) as runner:
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
