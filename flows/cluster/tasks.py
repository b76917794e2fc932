"""The tasks that run in other processes: on the workers of a Dask or Ray cluster.

They are in a module of their own because a deployment loads the flow's module as a script, under a name that workers do
not know. What they are given and return is sent between processes.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.runtime import task_run
from prefect.states import Failed, State

from backends.errors import ConfigError, TokenKLError
from flows.cluster.sessions import WorkerStoppedError, worker_session
from flows.cluster.ticket import Ticket
from flows.config.models import RunConfig, resolve_backend
from flows.runtime.logs import run_logging
from flows.stages.inputs import InputFile
from flows.stages.measuring import Measured, Survey, measure_part, survey_files
from flows.stages.plan import Asker, Group
from flows.stages.scoring import GroupOutcome, Stores
from kl.estimators.censored import SpreadPrior


@dataclass(frozen=True, slots=True)
class Reply:
    """The outcome of a group, and which process it is from."""

    process: str
    outcome: GroupOutcome


def _group_name() -> str:
    group = task_run.get_parameters()["group"]
    assert isinstance(group, Group)
    return group.name


@task(name="score", task_run_name=_group_name, cache_policy=NO_CACHE, persist_result=False)
def score_on_worker(group: Group, ticket: Ticket) -> Reply | State[Reply]:
    """Ask the backend for what the store lacks of one group; every answer is in the store before this returns."""
    with run_logging(flush=True):
        try:
            session = worker_session(ticket)
            return Reply(session.process, session.score(group))
        except (TokenKLError, OSError) as error:
            return Failed(message=str(error) or "the run was stopped", data=portable(error))


@task(name="survey", cache_policy=NO_CACHE, persist_result=False)
def survey_on_worker(files: Sequence[InputFile], config: RunConfig) -> Survey:
    """The first pass over some files."""
    with run_logging(flush=True):
        return survey_files(files, _asker(config), Stores.of(config.output_dir), _nothing)


@task(name="measure", cache_policy=NO_CACHE, persist_result=False)
def measure_on_worker(
    files: Sequence[InputFile], start: int, folder: Path, prior: SpreadPrior | None, config: RunConfig
) -> Measured:
    """The second pass over some files; their tables are in ``folder`` before this returns."""
    with run_logging(flush=True):
        return measure_part(files, start, folder, prior, _asker(config), Stores.of(config.output_dir), _nothing)


def _asker(config: RunConfig) -> Asker:
    backend, options, _ = resolve_backend(config)
    return Asker(config, backend, options)


def _nothing() -> None:
    """Progress is counted where the results arrive."""


def portable(error: Exception) -> Exception:
    """The same error, or if it cannot be sent between processes, one of the nearest kind that can."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # noqa: BLE001 - whatever keeps it from being sent
        kinds: tuple[type[Exception], ...] = (WorkerStoppedError, ConfigError, TokenKLError, OSError)
        kind = next((kind for kind in kinds if isinstance(error, kind)), RuntimeError)
        return kind(str(error))
    return error
