"""A real Prefect server for the whole session, and the real command line against it."""

import os
import random
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests import ROOT
from tests.process_worker import ProcessWorker, kill_group, started_worker

SERVER_START_S = 120


def free_port() -> int:
    """A port that nobody listens at; not of those that the system gives to whatever is started next."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def clean_environment(home: Path, **extra: str) -> dict[str, str]:
    """The environment of a newcomer: nothing of Prefect's or Google's, a home of its own."""
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "GOOGLE_", "GEMINI_"))
    }
    return kept | {"PREFECT_HOME": str(home), "OMP_NUM_THREADS": "1", "COLUMNS": "200"} | extra


@dataclass(frozen=True)
class Server:
    """A Prefect server."""

    url: str
    process: subprocess.Popen[bytes]


@contextmanager
def started_server(home: Path, port: int) -> Iterator[Server]:
    """A Prefect server with its database in ``home``; one that was killed meanwhile is no mistake."""
    home.mkdir(parents=True, exist_ok=True)
    log = (home / "server.log").open("ab")
    environment = clean_environment(home, PREFECT_SERVER_ANALYTICS_ENABLED="false", DO_NOT_TRACK="1")
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=home, start_new_session=True)
    try:
        _wait_until_healthy(f"http://127.0.0.1:{port}/api", process, home / "server.log")
        yield Server(f"http://127.0.0.1:{port}/api", process)
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            kill_group(process)
        log.close()


@pytest.fixture(scope="session")
def prefect_api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a Prefect server with a database of its own."""
    with started_server(tmp_path_factory.mktemp("prefect"), free_port()) as server:
        yield server.url


def _wait_until_healthy(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + SERVER_START_S
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise RuntimeError(f"the Prefect server ended: {log.read_text()[-2000:]}")
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=2):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise TimeoutError(f"the Prefect server did not start in {SERVER_START_S} s: {log.read_text()[-2000:]}")


@dataclass(frozen=True)
class Done:
    """A finished program."""

    code: int
    out: str
    err: str


Run = Callable[..., Done]


@pytest.fixture
def run_program(prefect_api: str, tmp_path: Path) -> Run:
    """``run_program("flows.run", "--flag", …, env={…})``: a program as a user starts it, with the session's server."""

    def run(module: str, *arguments: object, env: Mapping[str, str] | None = None, timeout_s: float = 240) -> Done:
        environment = clean_environment(tmp_path / "home", PREFECT_API_URL=prefect_api, **(env or {}))
        command = [sys.executable, "-m", module, *(str(argument) for argument in arguments)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout_s, cwd=ROOT)
        return Done(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture(scope="session")
def process_worker(prefect_api: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProcessWorker]:
    """A process worker for the whole session; each deployment brings the environment of its runs."""
    home = tmp_path_factory.mktemp("worker")
    with started_worker(prefect_api, clean_environment(home / "home"), home) as worker:
        yield worker
