"""Loaded by the Dask workers that a run starts on its own machine, in their main thread."""

from __future__ import annotations

import signal
from typing import Any


def dask_setup(worker: Any) -> None:
    """Ctrl-C in a terminal reaches the whole process group: the run decides what it means, its workers go on."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
