"""Calls go through the proxy of the environment, and what ~/.netrc holds for other programs does not stop them."""

from __future__ import annotations

import asyncio
import base64
import threading
from collections.abc import Awaitable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import aiohttp
import pytest

from backends.errors import RetryableBackendError
from backends.openai_compatible.client import Client
from backends.service.proxies import Proxy, proxy_of
from backends.vertex.service.model_calls import ModelCalls

SEEN: list[tuple[str, str | None, str | None]] = []


class _Recorder(BaseHTTPRequestHandler):
    """Answers every request, also one that is meant for another host, as to a proxy."""

    def do_GET(self) -> None:
        SEEN.append((self.path, self.headers["Authorization"], self.headers["Proxy-Authorization"]))
        self.rfile.read(int(self.headers["Content-Length"] or 0))
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    do_POST = do_GET

    def do_CONNECT(self) -> None:
        SEEN.append((self.path, self.headers["Authorization"], str(self.headers)))
        self.send_error(407)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "ALL_PROXY", "NETRC"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    SEEN.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), _Recorder) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


def ask(address: str) -> None:
    """One call of each client of a service."""

    async def calls() -> None:
        client = Client(f"{address}/v1", {"Authorization": "Bearer secret"}, 10.0)
        models = ModelCalls(address, "", 10.0, 4, api_key="secret")
        try:
            await client.get("models")
            await models.generate("gemini-x", b"{}")
        finally:
            await client.aclose()
            await models.aclose()

    asyncio.run(calls())


@pytest.mark.parametrize("credentials", ["", "me:word@"])
@pytest.mark.parametrize("scheme", ["http://", ""])
def test_calls_go_through_the_proxy_of_the_environment(
    credentials: str, scheme: str, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", f"{scheme}{credentials}127.0.0.1:{port}")
    ask("http://service.invalid")
    proven = f"Basic {base64.b64encode(b'me:word').decode()}" if credentials else None
    assert SEEN == [
        ("http://service.invalid/v1/models", "Bearer secret", proven),
        ("http://service.invalid/models/gemini-x:generateContent", None, proven),
    ]


def test_neither_is_a_proxy_told_the_key_nor_anybody_its_password(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", f"http://me:top%20word@127.0.0.1:{port}")

    async def refused(call: Awaitable[object]) -> str:
        try:
            await call
        except (aiohttp.ClientError, RetryableBackendError) as error:
            return f"{error} {error!r} {error.__cause__!r}"
        raise AssertionError("the proxy refuses all")

    async def errors() -> str:
        client = Client("https://service.invalid/v1", {"Authorization": "Bearer secret"}, 10.0)
        models = ModelCalls("https://service.invalid", "", 10.0, 4, api_key="secret")
        said = await refused(client.get("models")) + await refused(models.generate("gemini-x", b"{}"))
        await client.aclose()
        await models.aclose()
        return said

    said = asyncio.run(errors())
    assert said.count("407") >= 2
    assert "word" not in said
    assert [path for path, _, _ in SEEN] == ["service.invalid:443"] * 2
    for _, _, headers in SEEN:
        assert "secret" not in str(headers)
        assert base64.b64encode(b"me:top word").decode() in str(headers)


def test_hosts_without_proxy_are_called_directly(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("NO_PROXY", "example.com,127.0.0.1")
    ask(f"http://127.0.0.1:{port}")
    assert [path for path, _, _ in SEEN] == ["/v1/models", "/models/gemini-x:generateContent"]
    assert proxy_of("http://example.com/v1") == Proxy()
    assert proxy_of("https://example.org/v1") == Proxy(), "of another scheme"
    assert proxy_of("http://example.org/v1") == Proxy("http://127.0.0.1:1")


@pytest.mark.parametrize("machine", ["default", "machine 127.0.0.1"])
def test_entries_of_netrc_are_for_other_programs(
    machine: str, port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text(f"{machine} login me password word\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    ask(f"http://127.0.0.1:{port}")
    assert [said for _, said, _ in SEEN] == ["Bearer secret", None]
