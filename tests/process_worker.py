"""A real process worker on a pool of its own, and the deployments and runs that tests give it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.filters import LogFilter, LogFilterFlowRunId
from prefect.client.schemas.objects import FlowRun
from prefect.exceptions import ObjectAlreadyExists
from prefect.states import Scheduled

from tests import ROOT

FLOW_NAMES = {"flows/run.py:kl_divergence": "kl-divergence", "flows/sample.py:sample_responses": "sample-responses"}


@dataclass(frozen=True)
class ProcessWorker:
    """A worker process that polls one pool; ``api`` is the server's address."""

    api: str
    pool: str
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def client(self) -> SyncPrefectClient:
        """A client of the server; use it in a ``with``."""
        return SyncPrefectClient(self.api)

    def deploy(
        self,
        name: str,
        config: Mapping[str, Any],
        env: Mapping[str, str] | None = None,
        entrypoint: str = "flows/run.py:kl_divergence",
        **settings: Any,
    ) -> UUID:
        """A deployment of the flow from this checkout; ``env`` is what its runs see beside the worker's environment."""
        with self.client as client:
            return client.create_deployment(
                flow_id=client.create_flow_from_name(FLOW_NAMES[entrypoint]),
                name=f"{name}-{uuid.uuid4().hex[:6]}",
                parameters={"config": dict(config)},
                entrypoint=entrypoint,
                path=str(ROOT),
                pull_steps=[{"prefect.deployments.steps.set_working_directory": {"directory": str(ROOT)}}],
                work_pool_name=self.pool,
                job_variables={"env": dict(env or {})},
                enforce_parameter_schema=False,
                **settings,
            )

    def start(self, deployment: UUID, config: Mapping[str, Any] | None = None) -> UUID:
        """Have the worker run a deployment now; ``config`` in place of the deployment's."""
        with self.client as client:
            parameters = {"config": dict(config)} if config is not None else None
            return client.create_flow_run_from_deployment(deployment, parameters=parameters, state=Scheduled()).id

    def run(self, run_id: UUID) -> FlowRun:
        """A flow run as the server has it now."""
        with self.client as client:
            return client.read_flow_run(run_id)

    def wait(self, run_id: UUID, *names: str, timeout_s: float = 120) -> FlowRun:
        """The run once its state has one of ``names``; once it is final, without names."""
        until = time.monotonic() + timeout_s
        while True:
            run = self.run(run_id)
            state = run.state
            if state is not None and (state.name in names if names else state.is_final()):
                return run
            if time.monotonic() > until:
                shown = f"{state.name}: {state.message}" if state is not None else "no state"
                raise TimeoutError(f"{run.name} is {shown} after {timeout_s} s\n{self.log.read_text()[-4000:]}")
            time.sleep(0.2)

    def logs(self, run_id: UUID) -> str:
        """What the server has of a run's log."""
        with self.client as client:
            found = client.read_logs(log_filter=LogFilter(flow_run_id=LogFilterFlowRunId(any_=[run_id])), limit=200)
        return "\n".join(entry.message for entry in sorted(found, key=lambda entry: entry.timestamp))

    def flow_process(self, run_id: UUID) -> int:
        """The process id of a run that is under way."""
        pid = self.run(run_id).infrastructure_pid
        assert pid, f"run {run_id} has no process"
        return int(pid.rpartition(":")[2])


@contextmanager
def started_worker(api: str, environment: Mapping[str, str], home: Path) -> Iterator[ProcessWorker]:
    """A process worker with a pool of its own; it and what it started are killed at the end."""
    pool = f"pool-{uuid.uuid4().hex[:8]}"
    home.mkdir(parents=True, exist_ok=True)
    with SyncPrefectClient(api) as client:
        try:
            client.create_work_pool(WorkPoolCreate(name=pool, type="process"))
        except ObjectAlreadyExists:
            raise AssertionError(f"the pool {pool} is new") from None
    log = home / f"{pool}.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "prefect", "worker", "start", "--pool", pool, "--type", "process"],
            env={**environment, "PREFECT_API_URL": api, "PREFECT_WORKER_QUERY_SECONDS": "1"},
            stdout=out, stderr=out, cwd=ROOT, start_new_session=True,
        )  # fmt: skip
    try:
        yield ProcessWorker(api, pool, process, log)
    finally:
        kill_group(process)


def kill_group(process: subprocess.Popen[Any]) -> None:
    """Kill a process and all that it started; nothing happens if they have ended."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def wait_for(condition: Callable[[], object], timeout_s: float = 180) -> None:
    """Wait until a condition holds."""
    until = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < until, "it never came to that"
        time.sleep(0.02)
