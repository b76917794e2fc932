"""A sign of life of a run, in its output folder, for the processes that ask on its behalf elsewhere.

The run renews it and writes into it when its workers are to stop. A worker that finds another run's, or none, or one
that is renewed no more, stops: its run is over, or its process is gone.
"""

from __future__ import annotations

import json
import logging
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Self

from backends.errors import TokenKLError
from backends.storage.files import exists, is_remote, read_bytes, remove, write_bytes_atomic

logger = logging.getLogger(__name__)

_NAME = ".pulse.json"
_BEAT_S = 5.0
_NOTICE_S = 0.2  # how soon a stop is passed on
_DEAD_AFTER_S = 120.0
_LOOK_S = 1.0
_LOOK_REMOTE_S = 2.0
_STOP_S = 5.0  # of workers: a look at the pulse, work to be cancelled, calls that settle remote jobs


class Order(StrEnum):
    """What a run tells its workers."""

    WORK = "work"
    CANCEL = "cancel"  # ask no more
    INTERRUPT = "interrupt"  # ask no more, and settle what goes on elsewhere
    FINISH = "finish"  # no task is left; close


@dataclass(frozen=True, slots=True)
class Pulse:
    """What the file says."""

    run_id: str
    order: Order = Order.WORK
    beat: int = 0


def pulse_path(output_dir: Path) -> Path:
    """Where the pulse of a run is."""
    return output_dir / _NAME


def read_pulse(output_dir: Path) -> Pulse | None:
    """The pulse in an output folder; None if there is none.

    Raises
    ------
    ConfigError, OSError
        If the folder cannot be read now.
    """
    try:
        values: dict[str, Any] = json.loads(read_bytes(pulse_path(output_dir)))
    except FileNotFoundError:
        return None
    return Pulse(values["run_id"], Order(values["order"]), values["beat"])


def _write(output_dir: Path, pulse: Pulse) -> None:
    write_bytes_atomic(pulse_path(output_dir), json.dumps(asdict(pulse)).encode("ascii"))


def dismiss_orphans(output_dir: Path) -> None:
    """Stop the workers of a run that was killed, which may still ask; for the run that holds the folder's lock."""
    if not exists(pulse_path(output_dir)):
        return
    logger.warning("an earlier run was killed while workers asked for it; waiting until they have stopped")
    _write(output_dir, Pulse(uuid.uuid4().hex, Order.FINISH))
    time.sleep(_STOP_S * (2 if is_remote(output_dir) else 1))
    remove(pulse_path(output_dir))


class RunPulse:
    """The run's side: renews the pulse and passes on its orders, from a thread.

    Parameters
    ----------
    output_dir : Path
    order : callable
        What the workers are to do now; asked several times a second.
    """

    def __init__(self, output_dir: Path, order: Callable[[], Order]) -> None:
        self.run_id = uuid.uuid4().hex
        self._output_dir = output_dir
        self._order = order
        self._said = Pulse(self.run_id)
        self._finished = threading.Event()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="run-pulse", daemon=True)

    def __enter__(self) -> Self:
        _write(self._output_dir, self._said)
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._ended.set()
        self._thread.join()
        remove(pulse_path(self._output_dir))

    def finish(self) -> None:
        """Tell the workers that no task is left."""
        self._finished.set()

    def _beat(self) -> None:
        last = time.monotonic()
        while not self._ended.wait(_NOTICE_S):
            order = Order.FINISH if self._finished.is_set() else self._order()
            if order == self._said.order and time.monotonic() - last < _BEAT_S:
                continue
            last, said = time.monotonic(), Pulse(self.run_id, order, self._said.beat + 1)
            try:
                _write(self._output_dir, said)
                self._said = said
            except (TokenKLError, OSError) as error:
                logger.warning("the sign of life for the workers could not be written: %s", error)


class PulseReader:
    """A worker's side: what its run says, and whether that run lives.

    Parameters
    ----------
    output_dir : Path
    run_id : str
        The run that the worker asks for.
    """

    def __init__(self, output_dir: Path, run_id: str) -> None:
        self._output_dir = output_dir
        self._run_id = run_id
        self._last: Pulse | None = None
        self._changed = time.monotonic()
        self._missing = 0
        self.ours = True  # whether the folder is still that of this run
        self.every_s = _LOOK_REMOTE_S if is_remote(output_dir) else _LOOK_S

    def look(self) -> Order:
        """What to do now; `Order.FINISH` if the run is over or gone."""
        try:
            pulse = read_pulse(self._output_dir)
        except (TokenKLError, OSError, ValueError, KeyError):
            pulse = self._last  # not known now; the time since the last change decides
        if pulse is None:
            # A shared disk may show no file for a moment while it is replaced.
            self._missing += 1
            self.ours = self._missing < 2
            return Order.FINISH if self._missing > 1 else Order.WORK
        self._missing = 0
        self.ours = pulse.run_id == self._run_id
        if not self.ours:
            return Order.FINISH
        if pulse != self._last:
            self._last, self._changed = pulse, time.monotonic()
        return Order.FINISH if time.monotonic() - self._changed > _DEAD_AFTER_S else pulse.order
