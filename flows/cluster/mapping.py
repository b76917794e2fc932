"""Tasks that are mapped inside a flow run: what works on them, and their results as they end."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any
from uuid import UUID

from prefect.client.schemas.objects import StateDetails
from prefect.context import FlowRunContext
from prefect.states import Completed, State

if TYPE_CHECKING:
    from prefect.futures import PrefectFuture
    from prefect.task_runners import TaskRunner

_LOOK_S = 0.5


@contextmanager
def tasks_run_by(runner: TaskRunner[Any]) -> Generator[None]:
    """Inside a flow run, what ``.map`` and ``.submit`` begin is worked on by ``runner``, which was started."""
    run = FlowRunContext.get()
    assert run is not None, "inside a flow run"
    with run.model_copy(update={"task_runner": runner}):
        yield


def ended(task_run: UUID, name: str) -> State[str]:
    """A mapped task as what comes after it sees it: one that failed is counted, and no reason to stop."""
    return Completed(state_details=StateDetails(task_run_id=task_run), data=name)


def results_of(futures: list[PrefectFuture[Any]], stopped: Callable[[], bool]) -> Iterator[tuple[int, Any]]:
    """(number, result) of each task as it ends; an error stands for its result.

    After a stop nothing more is waited for. ``futures`` is emptied: a result that was taken must not stay with the
    worker that made it.
    """
    finished: SimpleQueue[int] = SimpleQueue()
    waiting = dict(enumerate(futures))
    futures.clear()
    for number, future in waiting.items():
        future.add_done_callback(lambda _, number=number: finished.put(number))
    while waiting:
        try:
            number = finished.get(timeout=_LOOK_S)
        except Empty:
            if stopped():
                return
            continue
        yield number, result_of(waiting.pop(number))


def result_of(future: PrefectFuture[Any]) -> Any:
    """What a task returned; the error that it raised, or was lost with."""
    try:
        return future.result(raise_on_failure=False)
    except Exception as error:  # noqa: BLE001 - such as a worker that died again and again
        return error
