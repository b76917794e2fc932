"""Where tasks are worked on: in threads of this process, or by the workers of a Dask or Ray cluster."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Self

from prefect import flow
from prefect.context import FlowRunContext

from backends.errors import ConfigError
from flows.cluster.mapping import result_of, tasks_run_by
from flows.config.runner import TaskRunnerConfig

if TYPE_CHECKING:
    from prefect import Task
    from prefect.futures import PrefectFuture
    from prefect.task_runners import TaskRunner

logger = logging.getLogger(__name__)

_THREADS_PER_WORKER = 4
_CONNECT_S = 30.0
_FIRST_WORKER_S = 120.0
_CHECK_S = 120.0
_CHECK_EVERY_S = 0.2
_TASKS_PER_THREAD = 2  # one at work, one that waits


@flow(name="kl-divergence")
def _flow_for_workers() -> None:
    """Stands for the flow where its tasks run; never called.

    Prefect sends the flow along with each task. A deployment has loaded it as a script, from a module that no worker
    can import.
    """


class Cluster(ABC):
    """Processes that work on Prefect tasks."""

    def __init__(self, runner: TaskRunner[Any], api_url: str) -> None:
        self.runner = runner
        self.api_url = api_url  # of the Prefect server

    @contextmanager
    def tasks(self) -> Generator[None]:
        """Inside a flow run, tasks that are begun meanwhile go to the workers."""
        from prefect.settings import PREFECT_API_URL, temporary_settings

        run = FlowRunContext.get()
        assert run is not None, "inside a flow run"
        # The server that was started for this run has an address that is in no setting; each worker would start one.
        with (
            temporary_settings({PREFECT_API_URL: self.api_url}),
            run.model_copy(update={"flow": _flow_for_workers}),
            tasks_run_by(self.runner),
        ):
            yield

    def map_in_order(self, task: Task[..., Any], parameters: Iterable[Mapping[str, Any]]) -> Iterator[Any]:
        """What a task returns for each set of parameters, in their order; few are begun before they are due.

        Raises
        ------
        Exception
            What a task raised, or was lost with.
        """
        under_way: deque[PrefectFuture[Any]] = deque()
        for values in parameters:
            with self.tasks():
                under_way.append(task.submit(**values))
            if len(under_way) >= _TASKS_PER_THREAD * max(sum(self.threads()), 1):
                yield _or_raise(result_of(under_way.popleft()))
        while under_way:
            yield _or_raise(result_of(under_way.popleft()))

    @abstractmethod
    def threads(self) -> list[int]:
        """How many tasks each worker process takes at once."""

    @abstractmethod
    def everywhere(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Call a function in every place that tasks run at; an error stands for its result."""


def _or_raise(result: Any) -> Any:
    if isinstance(result, Exception):
        raise result
    return result


class DaskCluster(Cluster):
    """A Dask scheduler and its workers."""

    def threads(self) -> list[int]:
        """Of the workers that are connected."""
        return sorted(self._client().nthreads().values())

    def everywhere(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Once in every worker process."""
        client = self._client()
        asked = {name: client.submit(function, *args, workers=[name], pure=False) for name in client.nthreads()}
        until = time.monotonic() + _CHECK_S
        while any(not future.done() for future in asked.values()) and time.monotonic() < until:
            time.sleep(_CHECK_EVERY_S)
            connected = client.nthreads()
            asked = {name: future for name, future in asked.items() if name in connected or future.done()}
        return [_outcome(future) for future in asked.values()]

    def _client(self) -> Any:
        runner: Any = self.runner
        return runner.client


def _outcome(future: Any) -> Any:
    if not future.done():
        return TimeoutError(f"it did not answer within {_CHECK_S:.0f} s")
    try:
        return future.result(timeout=_CONNECT_S)
    except Exception as error:  # noqa: BLE001 - whatever a worker raises is its result
        return error


class RayCluster(Cluster):
    """A Ray cluster; each of its processors is a worker process."""

    def threads(self) -> list[int]:
        """One for each processor."""
        import ray

        return [1] * int(ray.cluster_resources().get("CPU", 0))

    def everywhere(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Once on every node."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
        remote: Any = ray.remote(function)
        refs = [
            remote.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(*args)
            for node in nodes
        ]
        results: list[Any] = []
        for ref in refs:
            try:
                results.append(ray.get(ref, timeout=_CHECK_S))
            except Exception as error:  # noqa: BLE001 - whatever a worker raises is its result
                results.append(error.cause if isinstance(error, ray.exceptions.RayTaskError) else error)
        return results


@contextmanager
def open_cluster(config: TaskRunnerConfig) -> Generator[Cluster]:
    """Start a cluster on this machine, or connect to one; inside a flow run.

    Raises
    ------
    ConfigError
        If a package is missing, or no cluster with a worker answers at the address.
    """
    config.check_installed()
    with _opened(config) as cluster:
        threads = cluster.threads()
        where = f"at {config.address}" if config.address else "on this machine"
        logger.info("%s %s: %d worker processes for %d tasks at once", config.kind, where, len(threads), sum(threads))
        yield cluster


def _opened(config: TaskRunnerConfig) -> Any:
    return _dask(config) if config.kind == "dask" else _ray(config)


def _api_url() -> str:
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_API_URL

    return PREFECT_API_URL.value() or str(get_client(sync_client=True).api_url)


@contextmanager
def _dask(config: TaskRunnerConfig) -> Generator[Cluster]:
    os.environ.setdefault("DASK_LOGGING__DISTRIBUTED", "error")  # the workers' own lines
    from prefect_dask import DaskTaskRunner

    for name in ("distributed", "prefect.task_runner.dask"):
        logging.getLogger(name).setLevel(logging.ERROR)  # what matters of it is said by this program
    if config.address is not None:
        runner: Any = DaskTaskRunner(address=config.address, client_kwargs={"timeout": _CONNECT_S})
    else:
        size = {
            "n_workers": config.local_workers,
            "threads_per_worker": config.threads_per_worker or _THREADS_PER_WORKER,
        }
        # Ctrl-C in a terminal reaches the workers too; they must stay to settle what they have begun.
        quiet = {"dashboard_address": None, "silence_logs": logging.ERROR, "preload": "flows.cluster.preload"}
        runner = DaskTaskRunner(cluster_kwargs=size | quiet)
    with runner:
        try:
            client = runner.client
            client.wait_for_workers(1, timeout=_FIRST_WORKER_S)
        except (OSError, ValueError) as error:  # TimeoutError is an OSError
            place = config.address or "a Dask cluster on this machine"
            words = " ".join(str(error).split()) or type(error).__name__
            raise ConfigError(
                f"task_runner: no worker of {place} could be reached: {words}. Start one (dask worker ADDRESS) or "
                "correct task_runner.address."
            ) from error
        yield DaskCluster(runner, _api_url())


@contextmanager
def _ray(config: TaskRunnerConfig) -> Generator[Cluster]:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    from prefect_ray import RayTaskRunner

    logging.getLogger("prefect.task_runner.ray").setLevel(logging.ERROR)
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if config.address is None:
        setup = {"worker_process_setup_hook": "flows.cluster.preload.ignore_interrupts"}
        options |= {"num_cpus": config.local_workers, "include_dashboard": False, "runtime_env": setup}
    elif config.address == "auto":
        options |= {"address": "auto"}
    runner: Any = RayTaskRunner(address=config.address, init_kwargs=options)
    before = signal.getsignal(signal.SIGTERM)
    try:
        runner.__enter__()
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)  # Ray would end the process; the run wants to end in order
    except (ConnectionError, OSError, ValueError, RuntimeError) as error:
        words = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(f"task_runner: no Ray cluster could be reached at {config.address}: {words}") from error
    try:
        yield RayCluster(runner, _api_url())
    finally:
        runner.__exit__(None, None, None)


@contextmanager
def cluster_of(config: TaskRunnerConfig) -> Generator[LazyCluster | None]:
    """What the tasks of a run may be sent to; None where threads of this process work on them.

    Raises
    ------
    ConfigError
        If a package is missing.
    """
    if config.kind == "threads":
        yield None
        return
    with LazyCluster(config) as cluster:
        yield cluster


class LazyCluster:
    """A cluster that is started when the first task needs it, and kept for the next stage of the run.

    Parameters
    ----------
    config : TaskRunnerConfig
        Of the kind dask or ray.
    """

    def __init__(self, config: TaskRunnerConfig) -> None:
        self.config = config
        self._stack = ExitStack()
        self._cluster: Cluster | None = None

    def __enter__(self) -> Self:
        self.config.check_installed()
        return self

    def __exit__(self, *exc: Any) -> None:
        self._stack.__exit__(*exc)

    def get(self) -> Cluster:
        """The cluster, started if it is not yet."""
        if self._cluster is None:
            self._cluster = self._stack.enter_context(open_cluster(self.config))
        return self._cluster
