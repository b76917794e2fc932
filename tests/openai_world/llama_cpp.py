"""The HTTP server of llama.cpp from the wheel xllamacpp, with a GGUF file.

As a program: ``python llama_cpp.py MODEL.gguf PORT NAME SLOTS``; it stops on SIGTERM.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

START_S = 60


@contextmanager
def llama_cpp(model: Path, port: int, name: str = "smol", slots: int = 1) -> Iterator[str]:
    """The server until this is left; gives its address."""
    command = [sys.executable, __file__, str(model), str(port), name, str(slots)]
    quiet = subprocess.DEVNULL
    process = subprocess.Popen(command, stdout=quiet, stderr=quiet, env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        _wait_until_ready(process, port)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(20)


def _wait_until_ready(process: subprocess.Popen[bytes], port: int) -> None:
    until = time.monotonic() + START_S
    while time.monotonic() < until and process.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.1)
    raise RuntimeError(f"llama.cpp did not start (exit code {process.poll()})")


def _serve(model: str, port: str, name: str, slots: str) -> None:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = model
    params.model_alias = {name}
    params.port = int(port)
    params.n_parallel = int(slots)
    params.n_ctx = 2048 * int(slots)
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.warmup = False
    params.offline = True
    done = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: done.set())
    server = xllamacpp.Server(params)
    while not done.wait(0.2):
        assert server
    os._exit(0)  # its threads need not be waited for


if __name__ == "__main__":
    _serve(*sys.argv[1:])
