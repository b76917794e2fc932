"""The stages of a run as Prefect tasks.

In a module of their own because a deployment loads the flow's module as a script, under a name that workers do not
know.
"""

from __future__ import annotations

import logging
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.runtime import task_run
from prefect.states import State

from flows.folder.members import take_in_moved
from flows.stages.inputs import find_inputs
from flows.stages.measuring import Measured
from flows.stages.open_run import OpenRun
from flows.stages.passes import measure_files
from flows.stages.plan import Group, Plan
from flows.stages.reuse import reuse_raw
from flows.stages.scorers import Answers, Scorer
from flows.stages.scoring import GroupOutcome
from flows.stages.writing import write_results
from flows.watch.ending import RunOutcome, finish_run
from flows.watch.naming import name_run
from flows.watch.report import note_written

logger = logging.getLogger(__name__)


def _group_name() -> str:
    group = task_run.get_parameters()["group"]
    assert isinstance(group, Group)
    return group.name


@task(cache_policy=NO_CACHE)
def read(run: OpenRun) -> Plan:
    """Read all responses, find what is on disk already, and plan what is asked."""
    comparison, scores = run.comparison, run.stores.scores
    recovered = scores.recover() + (take_in_moved(scores.root) if run.member is not None else 0)
    if recovered:
        logger.info("%d scores of a run that was stopped were taken in", recovered)
    scores.prefetch()
    files = find_inputs(comparison.config)
    if comparison.config.reuse_raw is not None:
        reuse_raw(comparison.config.reuse_raw, files, comparison, scores)
    return run.plan(files)


@task(task_run_name=_group_name, cache_policy=NO_CACHE, persist_result=False)
def score(group: Group, scorer: Scorer) -> GroupOutcome | Answers | State[Any]:
    """Ask the backend for one group of responses."""
    return scorer.score(group)


def measure(run: OpenRun, plan: Plan) -> Measured:
    """Turn both models' lists into a table of tokens per input file: one task here, on a cluster one for each part."""
    run.check_lock()
    if run.cluster is None:
        return _measure_here(run, plan, wait_for=run.ended)
    return measure_files(plan.files, run.comparison, run.stores, run.token_parts, run.cluster)


@task(name="measure", cache_policy=NO_CACHE)
def _measure_here(run: OpenRun, plan: Plan) -> Measured:
    return measure_files(plan.files, run.comparison, run.stores, run.token_parts)


@task(cache_policy=NO_CACHE)
def write(run: OpenRun, measured: Measured) -> RunOutcome:
    """Write the results: per file, per token, per response, for the data set, and how they stand to earlier ones."""
    run.check_lock()
    results = write_results(measured, run.comparison, run.record())
    name_run(measured.models_p, run.comparison, results.report.line)  # before the history notes the name
    outcome = finish_run(run.context, results)
    note_written(outcome.report)
    logger.info("%s; the results are in %s", outcome.report.line, run.comparison.folder.path)
    return outcome
