"""Tasks on a cluster, a bounded number at a time, each result taken home as soon as it is there."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from queue import Empty, SimpleQueue
from typing import Any

from prefect import Task, flow
from prefect.context import FlowRunContext
from prefect.futures import PrefectFuture

from flows.cluster.runners import Cluster

logger = logging.getLogger(__name__)

_LOOK_S = 0.5
_PATIENCE_S = 60.0  # with tasks that do not come back after a stop
_LAST_S = 10.0  # the same, where the program is told to end
_IDLE_S = 60.0


def map_on_cluster(
    cluster: Cluster,
    task: Task[..., Any],
    parameters: Iterable[Mapping[str, Any]],
    *,
    window: Callable[[], int],
    stopped: Callable[[], bool],
    on_result: Callable[[int, Any], None],
) -> None:
    """Run a task with each set of parameters.

    A result that waits in a worker is lost with it, and then worked out again: hence they are taken home at once. After
    a stop no more tasks are submitted, and those under way have a minute to come back.

    Parameters
    ----------
    window : callable
        How many may be submitted and not finished.
    stopped : callable
        Whether to stop.
    on_result : callable
        Given the number of a task and what it returned; or the error that it raised, or that it was lost with.
    """
    under_way = _UnderWay(cluster, task, on_result)
    todo = enumerate(parameters)
    patience = _Patience(cluster)
    try:
        while True:
            while not stopped() and len(under_way) < max(window(), 1) and (item := next(todo, None)) is not None:
                under_way.submit(*item)
            if not len(under_way):
                return
            if under_way.take_one():
                patience = _Patience(cluster)
            elif patience.ends(stopped()):
                logger.warning("%d tasks did not come back within %.0f s of the stop", len(under_way), _PATIENCE_S)
                return
    except BaseException:
        if stopped():  # what the workers say of what they leave behind is worth a moment
            until = time.monotonic() + _LAST_S
            while len(under_way) and time.monotonic() < until:
                under_way.take_one()
        raise


class _UnderWay:
    """Tasks that were submitted and whose results were not taken."""

    def __init__(self, cluster: Cluster, task: Task[..., Any], on_result: Callable[[int, Any], None]) -> None:
        self._cluster, self._task, self._on_result = cluster, task, on_result
        self._finished: SimpleQueue[int] = SimpleQueue()
        self._futures: dict[int, PrefectFuture[Any]] = {}

    def __len__(self) -> int:
        return len(self._futures)

    def submit(self, number: int, values: Mapping[str, Any]) -> None:
        self._futures[number] = future = _submit(self._cluster, self._task, values)
        future.add_done_callback(lambda _: self._finished.put(number))

    def take_one(self) -> bool:
        """Hand over the next result; False if none came within a moment."""
        try:
            number = self._finished.get(timeout=_LOOK_S)
        except Empty:
            return False
        self._on_result(number, _result(self._futures.pop(number)))
        return True


@flow(name="kl-divergence")
def _flow_for_workers() -> None:
    """Stands for the flow where its tasks run; never called."""


def _submit(cluster: Cluster, task: Task[..., Any], values: Mapping[str, Any]) -> PrefectFuture[Any]:
    # Prefect sends the flow along with each task. A deployment has loaded it as a script, from a module that no worker
    # can import.
    run = FlowRunContext.get()
    assert run is not None, "inside a flow run"
    with run.model_copy(update={"flow": _flow_for_workers}):
        return cluster.submit(task, **values)


class _Patience:
    """How long nothing has come back."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._began = self._spoke = time.monotonic()

    def ends(self, stopped: bool) -> bool:
        """Whether to wait no longer; says so from time to time when there is nobody to wait for."""
        now = time.monotonic()
        if stopped:
            return now - self._began > _PATIENCE_S
        if now - self._spoke > _IDLE_S:
            self._spoke = now
            if not self._cluster.threads():
                logger.warning("no worker is connected; waiting for one")
        return False


def _result(future: PrefectFuture[Any]) -> Any:
    try:
        return future.result(raise_on_failure=False)
    except Exception as error:  # noqa: BLE001 - such as a worker that died again and again
        return error
