"""What becomes of remote jobs when a flow run is cancelled, crashes or fails.

Prefect calls these hooks in the flow's process or, when that was killed, in another one, which knows only the flow, the
run and its state. Everything is read from the run's parameters and from what is on record in its output folder; a hook
that is called again finds nothing left to do.
"""

from __future__ import annotations

from datetime import UTC
from typing import Any

from prefect import Flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun, State
from prefect.logging.loggers import flow_run_logger

from backends.base import Backend
from backends.errors import ConfigError, TokenKLError
from backends.session import BackendSession
from flows.config.comparison import Comparison
from flows.config.models import RunConfig
from flows.config.reading import validate
from flows.config.templates import RunValues
from flows.folder.lock import FolderInUseError, run_lock


def settle_jobs(flow: Flow[..., Any], flow_run: FlowRun, state: State[Any]) -> None:
    """Leave or cancel the remote jobs that the run made or waited for, as its backend's settings say."""
    logger = flow_run_logger(flow_run, flow)
    try:
        comparison = _comparison_of(flow, flow_run)
        settled = None if comparison is None else _settle(comparison, str(flow_run.id))
    except FolderInUseError as error:
        logger.info("the batch jobs of this run are left to the run that uses them now: %s", error)
    except (TokenKLError, OSError) as error:
        logger.warning("the batch jobs of this run were left as they are: %s", error)
    else:
        if settled is not None:
            logger.warning("%s", settled)


def _comparison_of(flow: Flow[..., Any], flow_run: FlowRun) -> Comparison | None:
    """What the run was about; None if it never was a valid one."""
    values = flow_run.parameters.get("config")
    if not isinstance(values, dict):
        return None
    try:
        config = validate(RunConfig, values)
    except ConfigError:
        return None  # Prefect says why the run failed, and it made nothing
    return Comparison.of(config, _values_of(flow, flow_run))


def _values_of(flow: Flow[..., Any], flow_run: FlowRun) -> RunValues:
    """What the fields in the names of folders stood for in the run, whose context is gone."""
    scheduled = flow_run.expected_start_time or flow_run.created
    assert scheduled is not None, "a run on the server has both"
    deployment = None
    if flow_run.deployment_id is not None:
        with get_client(sync_client=True) as client:
            deployment = client.read_deployment(flow_run.deployment_id).name
    return RunValues(scheduled.astimezone(UTC), str(flow_run.id), flow_run.name, flow.name, deployment)


def _settle(comparison: Comparison, run_id: str) -> str | None:
    # A collect waits for nothing: its jobs are meant to go on without it.
    if comparison.config.stage == "collect" or comparison.backend.abandoned is Backend.abandoned:
        return None
    if not comparison.build_backend().in_flight():
        return None
    # A run that holds the folder has attached to the jobs by now. What is on record is read when nobody else writes it.
    with run_lock(comparison.folder), BackendSession(comparison.build_backend(run_id)) as session:
        return session.run(session.backend.abandoned(run_id))
