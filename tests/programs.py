"""A real Prefect server for the whole session, and the real command lines against it: here, or each a process."""

import io
import json
import logging
import os
import random
import runpy
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, chdir, closing, contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp

import pytest
from filelock import FileLock
from prefect.context import use_profile
from prefect.events.worker import EventsWorker
from prefect.logging.configuration import setup_logging
from prefect.logging.handlers import APILogWorker
from prefect.settings import Profile

from flows.runtime.environment import prepare_environment
from tests import ROOT
from tests.process_worker import ProcessWorker, kill_group, started_worker

SERVER_START_S = 120
DATABASE = "prefect.db"  # in the home of a server
MEMORY = "/dev/shm"
ROOM_FOR_A_DATABASE = 2**30


def free_port() -> int:
    """A port that nobody listens at; not of those that the system gives to whatever is started next."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def clean_environment(home: Path, **extra: str) -> dict[str, str]:
    """The environment of a newcomer: nothing of Prefect's or Google's, a home of its own, modules compiled once."""
    foreign = ("PREFECT_", "GOOGLE_", "GEMINI_", "PYTHONDONTWRITEBYTECODE")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    return kept | {"PREFECT_HOME": str(home), "OMP_NUM_THREADS": "1", "COLUMNS": "200"} | extra


@dataclass(frozen=True)
class Server:
    """A Prefect server."""

    url: str
    process: subprocess.Popen[bytes]


def start_server(home: Path, port: int) -> Server:
    """Start a Prefect server with its database in ``home``, in a process group of its own."""
    home.mkdir(parents=True, exist_ok=True)
    environment = clean_environment(home, PREFECT_SERVER_ANALYTICS_ENABLED="false", DO_NOT_TRACK="1")
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    with (home / "server.log").open("ab") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=home, start_new_session=True)
    try:
        wait_until_healthy(f"http://127.0.0.1:{port}/api", process, home / "server.log")
    except BaseException:
        kill_group(process)
        raise
    return Server(f"http://127.0.0.1:{port}/api", process)


@contextmanager
def started_server(home: Path, port: int) -> Iterator[Server]:
    """A Prefect server until this is left; one that was killed meanwhile is no mistake."""
    server = start_server(home, port)
    try:
        yield server
    finally:
        kill_group(server.process)


def _memory_folder() -> str | None:
    """Where a database waits for no disk: one that is slow keeps SQLite locked, and clients of the server waiting."""
    has_room = os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free > ROOM_FOR_A_DATABASE
    return MEMORY if has_room else None


class SessionServer:
    """The Prefect server of all processes that run tests: the first that needs it starts it, the session ends it.

    With ``is_own`` this process is that of the session; a pytest that a test starts must leave the server be.
    """

    _variable = "TOKENKL_TESTS_PREFECT"

    def __init__(self) -> None:
        self.is_own = self._variable not in os.environ
        if self.is_own:
            os.environ[self._variable] = mkdtemp(prefix="tokenkl-prefect-", dir=_memory_folder())
        self._record = Path(os.environ[self._variable], "server.json")

    def url(self) -> str:
        """Its address."""
        with FileLock(self._record.with_suffix(".lock")):
            if not self._record.exists():
                server = start_server(self._record.parent, free_port())
                with (
                    closing(sqlite3.connect(self._record.with_name(DATABASE))) as made,
                    closing(sqlite3.connect(self._record.with_name("new.db"))) as copy,
                ):
                    made.backup(copy)
                self._record.write_text(json.dumps({"url": server.url, "pid": server.process.pid}))
            return json.loads(self._record.read_text())["url"]

    def copy_new_database(self, home: Path) -> None:
        """Give another server a database as one is when it was just made, which takes most of a first start."""
        self.url()
        home.mkdir(parents=True, exist_ok=True)
        shutil.copy(self._record.with_name("new.db"), home / DATABASE)

    def stop(self) -> None:
        """End it, if it was started, and remove what it left."""
        if self._record.exists():
            os.killpg(json.loads(self._record.read_text())["pid"], signal.SIGKILL)
        shutil.rmtree(self._record.parent, ignore_errors=True)
        del os.environ[self._variable]


@pytest.fixture(scope="session")
def prefect_api() -> Iterator[str]:
    """The address of a Prefect server with a database of its own."""
    yield SessionServer().url()
    # What programs that were run in this process still have to send; they would try for minutes.
    APILogWorker.drain_all()
    EventsWorker.drain_all()


def wait_until_healthy(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
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
Process = subprocess.Popen[str]
Start = Callable[..., Process]


def _server_for(module: str, request: pytest.FixtureRequest, wanted: bool = True) -> dict[str, str]:
    """The session's server, for programs that run a flow; it is started when the first of them is."""
    needed = wanted and module in ("flows.run", "flows.sample", "flows.pipeline", "flows.notify")
    return {"PREFECT_API_URL": request.getfixturevalue("prefect_api")} if needed else {}


@pytest.fixture(scope="session")
def run_program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """``run_program("flows.run", "--flag", …, env={…})``: what ``python -m flows.run --flag …`` does, in this process.

    It finds what a process of its own would: environment, working directory, standard streams, the settings that
    Prefect reads when it is imported. It is quicker by the imports, and by what earlier calls keep in memory.
    """

    home = tmp_path_factory.mktemp("home")

    def run(module: str, *arguments: object, env: Mapping[str, str] | None = None) -> Done:
        environment = clean_environment(home, **(_server_for(module, request) | dict(env or {})))
        with as_a_new_process(environment, [module, *map(str, arguments)]) as (out, err):
            with pytest.raises(SystemExit) as end:
                runpy.run_module(module, run_name="__main__", alter_sys=True)
        return Done(int(end.value.code or 0), out.getvalue(), err.getvalue())

    return run


@contextmanager
def as_a_new_process(environment: Mapping[str, str], argv: list[str]) -> Iterator[tuple[io.StringIO, io.StringIO]]:
    """While this is entered, this process is as a program finds it that is started; yields its two streams."""
    with ExitStack() as stack:
        stack.enter_context(only_environment(environment))
        stack.enter_context(chdir(ROOT))
        out = stack.enter_context(redirect_stdout(io.StringIO()))
        err = stack.enter_context(redirect_stderr(io.StringIO()))
        stack.enter_context(_restored_loggers("flows", "backends", "kl"))
        prepare_environment()
        if "PREFECT_API_URL" in environment:
            stack.enter_context(_prefect_as_imported_now())
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setattr(sys, "argv", argv)
        patch.setattr(os, "_exit", sys.exit)  # how a program leaves whose server does not answer
        yield out, err


@contextmanager
def _prefect_as_imported_now() -> Iterator[None]:
    with use_profile(Profile(name="newcomer"), include_current_context=False):
        setup_logging()
        yield
    setup_logging()


@contextmanager
def only_environment(environment: Mapping[str, str]) -> Iterator[None]:
    """While this is entered, the environment is as it is given; what is added to it is taken away again."""
    before = dict(os.environ)
    os.environ.clear()
    os.environ.update(environment)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextmanager
def _restored_loggers(*names: str) -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in names]
    before = [(logger, logger.level, logger.propagate, [*logger.handlers]) for logger in loggers]
    try:
        yield
    finally:
        for logger, level, propagate, handlers in before:
            logger.setLevel(level)
            logger.propagate, logger.handlers = propagate, handlers


@pytest.fixture
def start_program(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Start]:
    """``start_program("flows.run", "--flag", …, env={…})``: a program as a user starts it, in its own process group.

    ``server=False`` is a user who was told of no Prefect server. What is left of it is killed after the test.
    """
    started: list[Process] = []

    def start(module: str, *arguments: object, env: Mapping[str, str] | None = None, server: bool = True) -> Process:
        process = subprocess.Popen(
            [sys.executable, "-m", module, *map(str, arguments)],
            env=clean_environment(tmp_path / "home", **_server_for(module, request, server), **(env or {})),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True,
        )  # fmt: skip
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            kill_group(process)
        process.communicate()


def finish(process: Process, timeout_s: float = 250) -> Done:
    """Wait for a program's end."""
    out, err = process.communicate(timeout=timeout_s)
    return Done(process.returncode, out, err)


@pytest.fixture
def run_process(start_program: Start) -> Run:
    """As `run_program`, in a process of its own."""

    def run(module: str, *arguments: object, env: Mapping[str, str] | None = None) -> Done:
        return finish(start_program(module, *arguments, env=env))

    return run


@pytest.fixture(scope="session")
def process_worker(prefect_api: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProcessWorker]:
    """A process worker for the whole session; each deployment brings the environment of its runs."""
    home = tmp_path_factory.mktemp("worker")
    with started_worker(prefect_api, clean_environment(home / "home"), home) as worker:
        yield worker
