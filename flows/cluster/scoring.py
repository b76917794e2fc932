"""The scoring stage of a run on a cluster: groups of responses mapped over worker processes."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from prefect.runtime import flow_run

from backends.errors import ConfigError
from backends.session import BackendSession, SessionClosedError
from backends.storage.files import files_in, read_bytes
from flows.cluster.mapping import map_on_cluster
from flows.cluster.pulse import Order, RunPulse
from flows.cluster.runners import Cluster
from flows.cluster.sessions import REPORTS, WorkerStoppedError, check_worker
from flows.cluster.tasks import Reply, score_on_worker
from flows.cluster.ticket import Ticket, absolute_file, size_of, smallest_limit, worker_config
from flows.config.models import RunConfig
from flows.progress import ProgressReporter
from flows.stages.plan import Group, Plan
from flows.stages.scoring import GroupOutcome, Stores

logger = logging.getLogger(__name__)

_TASKS_PER_THREAD = 2  # one at work, one that waits
_LAST_REPORTS_S = 15.0


def check_workers(config: RunConfig, cluster: Cluster, plan: Plan) -> None:
    """Prove, before anything is bought, that every worker has the program, sees the folders and reaches the server.

    Raises
    ------
    ConfigError
        With what a worker lacks.
    """
    with RunPulse(config.output_dir, lambda: Order.WORK) as pulse:
        answers = cluster.everywhere(check_worker, _ticket(config, plan, pulse.run_id, 1), cluster.api_url)
    for error in answers:
        if isinstance(error, ConfigError):
            raise error
        if isinstance(error, Exception):
            raise ConfigError(
                f"a worker of the {config.task_runner.kind} cluster could not begin: {_line(error)}. Install tokenkl "
                "with the same extras on all workers."
            ) from error


def _ticket(config: RunConfig, plan: Plan, run_id: str, shares: int) -> Ticket:
    first = absolute_file(plan.files[0])
    return Ticket(run_id, flow_run.id, worker_config(config, shares), (first, size_of(first)))


class ClusterScoring:
    """Groups of responses on the workers of a cluster.

    Parameters
    ----------
    config : RunConfig
    cluster : Cluster
    session : BackendSession
        The run's own: when it is cancelled, the workers stop too.
    stopped : threading.Event
        Set when the user stopped the run.
    """

    def __init__(self, config: RunConfig, cluster: Cluster, session: BackendSession, stopped: threading.Event) -> None:
        self._config = config
        self._cluster = cluster
        self._session = session
        self._stopped = stopped
        self._replies: list[Reply] = []
        self._error: Exception | None = None
        self._lost: Exception | None = None
        self._shares = max(len(cluster.threads()), config.task_runner.workers or 1)
        self.reports: list[dict[str, Any]] = []  # what the backends of the workers say of their work

    def run(self, plan: Plan, progress: ProgressReporter) -> list[GroupOutcome]:
        """Ask for all groups of a plan.

        Raises
        ------
        ConfigError, OSError
            What holds for all groups; the first of them stops the others.
        """
        limit = smallest_limit(self._config)
        groups = [_absolute_group(group) for group in plan.groups]
        with RunPulse(self._config.output_dir, self._order) as pulse:
            ticket = _ticket(self._config, plan, pulse.run_id, self._shares)

            def keep(number: int, result: Any) -> None:
                if isinstance(result, Reply):
                    progress.advance(groups[number].n_positions)
                self._keep(groups[number], result)

            map_on_cluster(
                self._cluster,
                score_on_worker,
                [{"group": group, "ticket": ticket} for group in groups],
                window=lambda: tasks_allowed(self._cluster.threads(), self._shares, limit),
                stopped=lambda: self._session.cancelled,
                on_result=keep,
            )
            pulse.finish()
            self._gather_reports(pulse.run_id)
        Stores.of(self._config.output_dir).scores.recover()  # journals of workers that died
        if self._error is not None:
            raise self._error
        if self._lost is not None and not self._replies and not self._session.cancelled:
            raise ConfigError(f"no worker of the cluster could work on any group: {_line(self._lost)}") from self._lost
        return [reply.outcome for reply in self._replies]

    def _order(self) -> Order:
        if self._stopped.is_set():
            return Order.INTERRUPT
        return Order.CANCEL if self._session.cancelled else Order.WORK

    def _keep(self, group: Group, result: Any) -> None:
        if isinstance(result, Reply):
            self._replies.append(result)
        elif isinstance(result, WorkerStoppedError):
            self._session.note_left(str(result))
        elif isinstance(result, ConfigError | OSError):
            if self._error is None and not self._stopped.is_set():
                self._error = result
            self._session.cancel()
        elif not isinstance(result, SessionClosedError):
            self._lost = self._lost or result
            logger.error("a group of responses was not scored: %s: %s", group.name, _line(result))

    def _gather_reports(self, run_id: str) -> None:
        """Wait until the workers that answered have closed; take what each says of its backend's work."""
        folder = self._config.output_dir / ".parts" / REPORTS
        awaited = {reply.process for reply in self._replies}
        until = time.monotonic() + _LAST_REPORTS_S
        while True:
            found = {path.stem: json.loads(read_bytes(path)) for path in files_in(folder, ".json") if _of(run_id, path)}
            if awaited <= {name for name, report in found.items() if report["last"]} or time.monotonic() > until:
                break
            time.sleep(0.2)
        # Those that closed in order come last: of a job that both know, they know the end.
        self.reports = [found[name]["report"] for name in sorted(found, key=lambda name: (found[name]["last"], name))]


def tasks_allowed(threads: Sequence[int], shares: int, limit: int | None) -> int:
    """How many tasks may be under way, so that no more calls or jobs are than a limit allows.

    Each process has one of ``shares`` shares of it, or 1 where that is less. Where workers have joined since the shares
    were dealt, or there are more shares than the limit, fewer processes may be at work.
    """
    tasks = _TASKS_PER_THREAD * sum(threads)
    if len(threads) > shares:
        tasks = min(tasks, shares)
    return tasks if limit is None or limit >= shares else min(tasks, limit)


def _line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


def _of(run_id: str, path: Path) -> bool:
    return path.stem.endswith(run_id[:8])


def _absolute_group(group: Group) -> Group:
    return replace(group, asks=tuple(replace(ask, file=absolute_file(ask.file)) for ask in group.asks))


def joined_reports(reports: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One report of several processes: numbers are added, lists joined, of a thing named twice the last counts."""
    joined: dict[str, Any] = {}
    for report in reports:
        for name, value in report.items():
            joined[name] = _joined(joined[name], value) if name in joined else value
    return joined


def _joined(first: Any, second: Any) -> Any:
    if isinstance(first, dict) and isinstance(second, dict):
        return joined_reports([first, second])
    if isinstance(first, list) and isinstance(second, list):
        return _joined_lists([*first, *second])
    if isinstance(first, int | float) and isinstance(second, int | float) and not isinstance(first, bool):
        return first + second
    return second


def _joined_lists(items: Iterable[Any]) -> list[Any]:
    by_name: dict[Any, Any] = {}
    for index, item in enumerate(items):
        by_name[item["name"] if isinstance(item, dict) and "name" in item else index] = item
    return list(by_name.values())
