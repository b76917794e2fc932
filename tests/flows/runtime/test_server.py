"""The Prefect server that a program starts beside itself: when there is none, and how it ends."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flows.runtime.server import begin_server, is_temporary
from tests.programs import SessionServer, clean_environment

ASK = """
import sys, time, urllib.request
from flows.runtime.environment import prepare_environment
from flows.runtime.server import begin_server, is_temporary, load_with_server
prepare_environment()
server = begin_server()
loaded = load_with_server(lambda: "flow", server)
url = server.url()
if url is None:
    print("none", flush=True)
else:
    with urllib.request.urlopen(url + "/health") as answer:
        print(server._process.pid, answer.status, loaded, is_temporary(url), flush=True)
    time.sleep(float(sys.argv[1]))
"""


def started(home: Path, sleep_s: float, **environment: str) -> subprocess.Popen[str]:
    variables = clean_environment(home, **environment)
    theirs = home / "project"  # whose flows are in a folder of that name, as is usual with Prefect
    (theirs / "flows").mkdir(parents=True, exist_ok=True)
    (theirs / "flows" / "__init__.py").write_text("raise AssertionError('the flows of somebody else')")
    return subprocess.Popen(
        [sys.executable, "-P", "-c", ASK, str(sleep_s)],
        env=variables, cwd=theirs, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def is_running(pid: int) -> bool:
    return Path(f"/proc/{pid}/cmdline").exists() and b"runtime/server.py" in Path(f"/proc/{pid}/cmdline").read_bytes()


def wait_for_end(pid: int, timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while is_running(pid):
        assert time.monotonic() < deadline, "the server goes on without its program"
        time.sleep(0.1)


@pytest.mark.parametrize("ending", [pytest.param(None, id="ends"), pytest.param(signal.SIGKILL, id="is killed")])
def test_server_answers_and_ends_with_its_program(
    tmp_path: Path, prefect_api: str, ending: signal.Signals | None
) -> None:
    SessionServer().copy_new_database(tmp_path)
    with started(tmp_path, 0 if ending is None else 600) as program:
        assert program.stdout is not None
        pid, *rest = program.stdout.readline().split()
        assert rest == ["200", "flow", "True"]
        if ending is not None:
            assert is_running(int(pid))
            program.send_signal(ending)
        program.wait(60)
    wait_for_end(int(pid))


def test_first_server_in_a_home_says_why_it_takes_longer(tmp_path: Path) -> None:
    with started(tmp_path / "new", 600) as program:
        assert program.stderr is not None
        lines = [program.stderr.readline() for _ in range(2)]
        program.kill()
    assert "starting a Prefect server for this run" in lines[0]
    assert "makes its database first" in lines[1]


def test_settings_of_prefect_decide_whether_there_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for setting in ("PREFECT_SERVER_ALLOW_EPHEMERAL_MODE=false", 'PREFECT_API_URL="http://127.0.0.1:9/api"'):
        name, _, value = setting.partition("=")
        (tmp_path / "profiles.toml").write_text(f'active = "mine"\n[profiles.mine]\n{name} = {value}\n')
        with started(tmp_path, 0) as program:
            out, err = program.communicate(timeout=60)
        assert (out, program.returncode) == ("none\n", 0), err
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    assert begin_server() is None
    assert not is_temporary("http://127.0.0.1:9/api")
    assert os.environ["PREFECT_API_URL"] == "http://127.0.0.1:9/api"
