"""What all tests share: a Prefect server and programs; and no test reaches beyond this machine."""

import itertools
import os
import socket
from collections.abc import Iterator

import hypothesis
import pytest

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
    if not hasattr(config, "workerinput"):
        config.add_cleanup(SessionServer().stop)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deal the slow tests, whole files of them, to the processes of xdist, which begin with them.

    Each process is given an equal number of tests in their order, and an idle one takes from the end of what another
    has: so only short tests are moved, and a server for a file of slow tests is started once.
    """
    if not hasattr(config, "workerinput"):
        return
    hands: list[list[pytest.Item]] = [[] for _ in range(config.workerinput["workercount"])]
    slow = [item for item in items if item.get_closest_marker("slow")]
    short = [item for item in items if not item.get_closest_marker("slow")]
    for _, tests in itertools.groupby(slow, key=lambda item: item.path):
        min(hands, key=len).extend(tests)
    share = len(items) // len(hands)
    for hand in hands:
        n = share - len(hand) if hand is not hands[-1] else len(short)
        hand += short[:n]
        del short[:n]
    items[:] = itertools.chain.from_iterable(hands)


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
