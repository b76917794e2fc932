"""What all tests share: a Prefect server and programs; and no test reaches beyond this machine."""

import os
import socket
from collections.abc import Iterator

import hypothesis
import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadFileScheduling

from tests.programs import SessionServer, prefect_api, process_worker, run_process, run_program, start_program

__all__ = ["prefect_api", "process_worker", "run_process", "run_program", "start_program"]

# Read when Google's library is imported, which else asks an address of Google's machines.
os.environ["NO_GCE_CHECK"] = "true"

_LOOPBACK = {"127.0.0.1", "::1", "localhost", "0.0.0.0"}


# How long an example takes says how busy the machine is.
hypothesis.settings.register_profile("no deadline", deadline=None)
hypothesis.settings.load_profile("no deadline")


def pytest_configure(config: pytest.Config) -> None:
    """The processes that xdist starts know by the environment where the one server is."""
    if not hasattr(config, "workerinput") and (server := SessionServer()).is_own:
        config.add_cleanup(server.stop)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> LoadFileScheduling:
    """A file of tests goes to one process: what they share, models above all, is made once."""
    config.option.loadscopereorder = False
    return LoadFileScheduling(config, log)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Begin with the files that take long, so that no process is alone with one at the end."""
    if hasattr(config, "workerinput"):
        slow = {item.path for item in items if item.get_closest_marker("slow")}
        items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(autouse=True, scope="session")
def _loopback_only() -> Iterator[None]:
    real_connect = socket.socket.connect

    def guarded(self: socket.socket, address: object) -> None:
        if isinstance(address, tuple) and address[0] not in _LOOPBACK:
            raise AssertionError(f"a test tried to reach {address[0]}")
        real_connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", guarded)
        yield
