"""The temporary Prefect server of a program that is told of none, started while the program still loads and reads.

Prefect itself starts one when a flow is called, loads the server's own modules into the flow's process to do so, and
waits. Here this file, as a program, loads them beside the program while that looks at its settings and files,
and becomes the server when these are known to be right. It looks into Prefect's settings first and ends at once where
they name a server, or forbid one of its own. It ends when the program does, however that ends.
"""

from __future__ import annotations

import atexit
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

_temporary: set[str] = set()

_STOP_S = 5.0
# As Prefect starts it.
_SERVER_ENVIRONMENT = {
    "PREFECT_UI_ENABLED": "0",
    "PREFECT__SERVER_EPHEMERAL": "1",
    "PREFECT__SERVER_FINAL": "1",
}
# What the server's process says: "address URL" or "address URL new", then "ready".
_ADDRESS, _NEW, _READY = "address", "new", "ready"


def begin_server() -> OwnServer | None:
    """Start the process that becomes the server if one is needed, when it is told to; None if it is known that none is.

    Before Prefect is loaded: it reads where its server is when it is.
    """
    if os.environ.get("PREFECT_API_URL") or "prefect" in sys.modules:
        return None
    return OwnServer()


def load_with_server(load: Callable[[], Any], server: OwnServer | None) -> Any:
    """What loads Prefect, between the server's address being known and the server being asked.

    Raises
    ------
    ChildProcessError
        If the server does not start.
    """
    if server is not None:
        server.start()
    url = None if server is None else server.url()
    if url is not None:
        os.environ["PREFECT_API_URL"] = url
        _temporary.add(url)
        logger.info("starting a Prefect server for this run")
        if server.makes_database:
            logger.info("Prefect makes its database first, once in this home: that takes longer")
    loaded = load()
    if server is not None and url is not None:
        server.wait_until_ready()
    return loaded


def is_temporary(url: str) -> bool:
    """Whether a server is this program's own, and ends with it."""
    return url in _temporary


def has_server() -> bool:
    """Whether runs are recorded by a server that stays."""
    from prefect.settings import get_current_settings

    url = get_current_settings().api.url
    return url is not None and not is_temporary(url)


class OwnServer:
    """The server's process, seen from the program. It is ended with the program, after what Prefect does at its end.

    Attributes
    ----------
    makes_database : bool
        Whether this is the first server in Prefect's home; known when the address is.
    """

    makes_database = False

    def __init__(self) -> None:
        # In a session of its own: a terminal sends Ctrl-C to the whole process group, and without its server the run
        # could not end, it would ask it again for minutes.
        self._process = subprocess.Popen(
            # A file that imports nothing of ours, and -P: the folder that the user is in may have a `flows` of its own.
            [sys.executable, "-P", __file__],
            env=os.environ | _SERVER_ENVIRONMENT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self._url: str | None = None
        self._addressed, self._settled = threading.Event(), threading.Event()
        self._ready = False
        threading.Thread(target=self._listen, name="own-server", daemon=True).start()
        atexit.register(self.stop)

    def start(self) -> None:
        """Let it be a server: until then it only loads what it needs, and leaves nothing behind."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended already, where none is needed
            os.write(self._process.stdin.fileno(), b"\n")

    def url(self) -> str | None:
        """Where the server will be; None if there is none, for Prefect to say why or to use another."""
        self._addressed.wait()
        return self._url

    def wait_until_ready(self) -> None:
        """Until it answers.

        Raises
        ------
        ChildProcessError
            If it ended instead, or takes longer than Prefect's own limit.
        """
        limit_s = float(os.environ.get("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "120"))
        if not self._settled.wait(limit_s):
            raise ChildProcessError(
                f"the temporary Prefect server did not start in {limit_s:g} s; "
                "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS gives it longer."
            )
        if not self._ready:
            raise ChildProcessError("the temporary Prefect server ended while it started.")

    def stop(self) -> None:
        """End it."""
        self._process.terminate()
        try:
            self._process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            said = line.split()
            if said[:1] == [_ADDRESS]:
                self._url, self.makes_database = said[1], said[2:] == [_NEW]
                self._addressed.set()
            elif said == [_READY]:
                self._ready = True
                self._settled.set()
        self._addressed.set()
        self._settled.set()


def serve() -> None:
    """Be the server, unless Prefect's settings name one or forbid this."""
    from prefect.settings import get_current_settings

    settings = get_current_settings()
    if settings.api.url is not None or not settings.server.ephemeral.enabled:
        return
    import prefect.server.api.server  # noqa: F401 - what takes long, while the program still reads
    import uvicorn

    if not os.read(sys.stdin.fileno(), 1):
        return  # the program ended before it needed a server

    class Server(uvicorn.Server):
        async def startup(self, sockets: Any = None) -> None:
            await super().startup(sockets)
            if self.started:
                _say(_READY)

    config = uvicorn.Config(
        "prefect.server.api.server:create_app", factory=True, host="127.0.0.1", port=0, log_level="error", lifespan="on"
    )
    listening = config.bind_socket()
    said = [_ADDRESS, f"http://127.0.0.1:{listening.getsockname()[1]}/api"]
    _say(" ".join(said + [_NEW] * _is_new(settings.server.database.connection_url)))
    threading.Thread(target=_end_with_the_program, name="program-watch", daemon=True).start()
    Server(config).run(sockets=[listening])


def _say(line: str) -> None:
    print(line, flush=True)  # noqa: T201


def _is_new(connection: Any) -> bool:
    url = "" if connection is None else connection.get_secret_value()
    place = url.partition(":///")[2].partition("?")[0]
    return url.startswith("sqlite") and not Path(place).exists()


def _end_with_the_program() -> None:
    """The pipe from the program closes when it ends, be it killed; nobody would end the server then."""
    while os.read(sys.stdin.fileno(), 1):
        pass
    signal.raise_signal(signal.SIGTERM)


if __name__ == "__main__":
    serve()
