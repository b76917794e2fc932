"""What the workers that a run starts on its own machine do first, in their main thread."""

from __future__ import annotations

import signal
from typing import Any


def ignore_interrupts() -> None:
    """Ctrl-C in a terminal reaches the whole process group: the run decides what it means, its workers go on."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def dask_setup(worker: Any) -> None:
    """Called by Dask when it loads this module."""
    ignore_interrupts()
