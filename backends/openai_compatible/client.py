"""HTTP to one server: JSON in, JSON out, its refusals as this program's errors."""

from __future__ import annotations

import json
from typing import Any

import aiohttp

from backends.errors import RetryableBackendError
from backends.service.proxies import proxy_of
from backends.service.retry import RETRYABLE_STATUS, StatusError, one_line, retry_after

_LONGEST_SAID = 300
_SHORTEST_SECRET = 6
_KEEP_ALIVE_S = 4.0  # vLLM closes idle connections after five
_OUT_OF_CREDIT = ("insufficient_quota", "insufficient_balance", "billing")
Json = dict[str, Any]


class Client:
    """Calls to one server; used within one event loop.

    Parameters
    ----------
    address : str
        Up to and with ``/v1``.
    headers : dict of str to str
        With credentials, which no message shows.
    timeout_s : float
    """

    def __init__(self, address: str, headers: dict[str, str], timeout_s: float) -> None:
        self.address = address
        self._root = address.removesuffix("/v1")
        values = [part for value in headers.values() for part in (value, value.rpartition(" ")[2])]
        self._secrets = [value for value in values if len(value) >= _SHORTEST_SECRET]
        self._proxy = proxy_of(address)
        # For each call: what a session has in common is said to its proxy, too.
        self._headers = headers | self._proxy.headers
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEP_ALIVE_S),
            timeout=aiohttp.ClientTimeout(total=timeout_s, sock_connect=min(30.0, timeout_s)),
            proxy=self._proxy.url,
        )

    async def post(self, path: str, body: Json) -> Json:
        """Send a body to a path below the address, or one that begins with ``/`` to the server's root.

        Raises
        ------
        RetryableBackendError
            For what may pass.
        StatusError
            For a refusal.
        """
        return await self._call("POST", path, body)

    async def get(self, path: str) -> Json:
        """As `post`, without a body."""
        return await self._call("GET", path, None)

    async def get_if_there(self, path: str) -> Json:
        """Empty where the server has no such path."""
        try:
            return await self.get(path)
        except StatusError:
            return {}

    async def _call(self, method: str, path: str, body: Json | None) -> Json:
        url = f"{self._root}{path}" if path.startswith("/") else f"{self.address}/{path}"
        data = None if body is None else json.dumps(body, ensure_ascii=True, separators=(",", ":")).encode("ascii")
        try:
            answer, content = await self._send(method, url, data)
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise RetryableBackendError(f"{path}: {type(error).__name__}: {self._shown(error)}") from error
        said = _parsed(content)
        if answer.status == 200 and isinstance(said, dict):
            return said
        if answer.status == 200:
            raise RetryableBackendError(f"{path}: the answer is no JSON object")
        raise self._refusal(path, answer, said)

    async def _send(self, method: str, url: str, data: bytes | None) -> tuple[aiohttp.ClientResponse, bytes]:
        try:
            return await self._send_once(method, url, data)
        except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError) as error:
            if isinstance(error, aiohttp.ClientConnectorError):
                raise
            return await self._send_once(method, url, data)  # a connection that was idle, and closed by the server

    async def _send_once(self, method: str, url: str, data: bytes | None) -> tuple[aiohttp.ClientResponse, bytes]:
        headers = self._headers | ({"Content-Type": "application/json"} if data is not None else {})
        tunnel = self._proxy.tunnel
        async with self._session.request(method, url, data=data, headers=headers, proxy_headers=tunnel) as answer:
            return answer, await answer.read()

    def _refusal(self, path: str, answer: aiohttp.ClientResponse, said: Any) -> StatusError | RetryableBackendError:
        kind, text = _error_fields(said)
        message = (
            f"{path}: {answer.status} {self._shown(': '.join(part for part in (kind, text) if part) or answer.reason)}"
        )
        out_of_credit = any(word in kind for word in _OUT_OF_CREDIT)
        if answer.status in RETRYABLE_STATUS and not out_of_credit:
            return RetryableBackendError(message, retry_after_s=retry_after(answer.headers), status=answer.status)
        return StatusError(message, status=answer.status)

    def _shown(self, text: object) -> str:
        line = str(text)
        for secret in self._secrets:  # some services quote the key that they refuse
            line = line.replace(secret, "***")
        return one_line(line)[:_LONGEST_SAID]

    async def aclose(self) -> None:
        """Close all connections."""
        await self._session.close()


def _parsed(content: bytes) -> Any:
    try:
        return json.loads(content)
    except ValueError:
        return content.decode("utf-8", "replace")


def _error_fields(said: Any) -> tuple[str, str]:
    """The kind and the text of an error in any of the shapes that servers have."""
    if not isinstance(said, dict):
        return "", str(said)
    error = said.get("error", said)
    if not isinstance(error, dict):
        return "", str(error)
    kind = error.get("type") or error.get("code") or ""
    text = error.get("message") or error.get("detail") or error
    return str(kind), str(text)
