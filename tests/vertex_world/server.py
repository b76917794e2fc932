"""The HTTP server: one thread per connection, keep-alive, and the faults that happen to connections."""

from __future__ import annotations

import json
import socket
import struct
import sys
import threading
import time
import traceback
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

import urllib3

from tests.vertex_world.faults import Faults
from tests.vertex_world.ledger import Ledger
from tests.vertex_world.wire import ApiError


class Call(NamedTuple):
    """One request as it came in; header names are in lower case."""

    method: str
    target: str
    headers: dict[str, str]
    raw_headers: dict[str, str]
    body: bytes


class Reply(NamedTuple):
    """What goes back; ``delivered`` is called as it leaves, and not if it is dropped."""

    status: int
    headers: dict[str, str]
    body: bytes | urllib3.BaseHTTPResponse
    delivered: Callable[[], None] | None = None


class Handled(NamedTuple):
    """The endpoint kind of a call, and what does it."""

    kind: str
    work: Callable[[], Reply]


Router = Callable[[Call], Handled]


def json_reply(body: Any, status: int = 200, headers: dict[str, str] | None = None) -> Reply:
    data = json.dumps(body, ensure_ascii=False).encode("utf-8", "surrogatepass")
    return Reply(status, {"Content-Type": "application/json; charset=UTF-8", **(headers or {})}, data)


class WorldServer(ThreadingHTTPServer):
    """Listens on the loopback interface; every connection is closed when it stops."""

    request_queue_size = 2048
    daemon_threads = True
    block_on_close = False

    def __init__(self, port: int, faults: Faults, ledger: Ledger) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.faults = faults
        self.ledger = ledger
        self.router: Router | None = None
        self._connections: set[socket.socket] = set()
        self._connections_lock = threading.Lock()
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def start(self, router: Router) -> None:
        self.router = router
        self._thread.start()

    def stop(self) -> None:
        self.shutdown()
        self._thread.join()
        self.server_close()
        with self._connections_lock:
            for connection in self._connections:
                try:
                    connection.shutdown(socket.SHUT_RDWR)
                except OSError:
                    continue  # closed by its own thread meanwhile

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._connections_lock:
            self._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self._connections_lock:
            self._connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        # A client that goes away, killed ones included, is no fault of the world.
        if not isinstance(sys.exception(), ConnectionError | TimeoutError | ValueError | OSError):
            self.ledger.note_crash(traceback.format_exc())


class Handler(BaseHTTPRequestHandler):
    """Reads a request, lets the router answer it, writes the reply."""

    protocol_version = "HTTP/1.1"
    wbufsize = -1  # head and body leave in one packet
    disable_nagle_algorithm = True
    server: WorldServer

    def do_GET(self) -> None:
        call = self._read()
        self.server.ledger.note_request(call.method, call.target)
        assert self.server.router is not None
        handled = self.server.router(call)
        fault = self.server.faults.next_http(handled.kind)
        if fault is None or fault in {"slow", "lost", "lost-503"}:
            if fault == "slow":
                time.sleep(self.server.faults.slow_s)
            reply = self._answer(handled)
            if fault == "lost":
                self._drop(reply)
            else:
                self._write(_fault_reply("503", self.server.faults) if fault == "lost-503" else reply)
        elif fault == "reset":
            self._drop(None)
        else:
            self._write(_fault_reply(fault, self.server.faults))

    do_POST = do_PUT = do_PATCH = do_DELETE = do_HEAD = do_GET

    def _read(self) -> Call:
        raw = dict(self.headers.items())
        headers = {name.lower(): value for name, value in raw.items()}
        if headers.get("transfer-encoding", "").lower() == "chunked":
            body = self._read_chunks()
        else:
            length = int(headers.get("content-length", 0))
            body = self.rfile.read(length)
            if len(body) < length:
                raise ConnectionResetError("the client went away in the middle of its request")
        return Call(self.command, self.path, headers, raw, body)

    def _read_chunks(self) -> bytes:
        chunks: list[bytes] = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return b"".join(chunks)

    def _answer(self, handled: Handled) -> Reply:
        try:
            return handled.work()
        except ApiError as error:
            return json_reply(error.body(), error.code)
        except Exception:  # noqa: BLE001 - kept in the ledger, which fails the test
            self.server.ledger.note_crash(traceback.format_exc())
            return json_reply(ApiError(500, "The stand-in crashed; see its ledger.").body(), 500)

    def _write(self, reply: Reply) -> None:
        self.send_response(reply.status)
        for name, value in reply.headers.items():
            self.send_header(name, value)
        if isinstance(reply.body, bytes):
            self.send_header("Content-Length", str(len(reply.body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(reply.body)
        else:
            self.end_headers()
            try:
                for chunk in reply.body.stream(1 << 20, decode_content=False):
                    self.wfile.write(chunk)
            finally:
                reply.body.release_conn()
        if reply.delivered is not None:  # noted first: a test may look as soon as the answer is there
            reply.delivered()
        self.wfile.flush()

    def _drop(self, reply: Reply | None) -> None:
        """Close the connection with a reset instead of an answer."""
        if reply is not None and not isinstance(reply.body, bytes):
            reply.body.close()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet: the ledger has every request."""


def _fault_reply(fault: str, faults: Faults) -> Reply:
    code, _, retry_after = fault.partition("+")
    headers = {"Retry-After": f"{faults.retry_after_s:g}"} if retry_after else {}
    return json_reply(faults.error(int(code)).body(), int(code), headers)
