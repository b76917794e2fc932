"""What all tests share: a Prefect server and programs; and no test reaches beyond this machine."""

import socket
from collections.abc import Iterator

import pytest

from tests.programs import SessionServer, prefect_api, process_worker, run_process, run_program, start_program

__all__ = ["prefect_api", "process_worker", "run_process", "run_program", "start_program"]

_LOOPBACK = {"127.0.0.1", "::1", "localhost", "0.0.0.0"}


def pytest_configure(config: pytest.Config) -> None:
    """The processes that xdist starts know by the environment where the one server is."""
    if not hasattr(config, "workerinput"):
        config.add_cleanup(SessionServer().stop)


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
