"""``generateContent`` calls straight over HTTP.

The SDK's models of requests and answers, and its HTTP client, take ten times the processor time of a call: with a
hundred in flight more than there is.
"""

from __future__ import annotations

import json
import math
from typing import Any, NamedTuple

import aiohttp
import httpx2
from google.genai import errors

from backends.errors import BackendError
from backends.service.proxies import proxy_of
from backends.vertex.service.access_token import AccessToken

_UNAUTHORIZED = 401


class ModelCalls:
    """The calls to the models of a service, with a connection for each call in flight; used within one event loop.

    Parameters
    ----------
    address : str
        Of the service's models, without the path of one.
    owner : str
        What stands before the path of a model that does not name its project; empty for none.
    timeout_s : float
        Seconds until a call counts as lost.
    max_calls : int
        How many calls may be in flight.
    token : AccessToken, optional
    api_key : str, optional
        In place of a token.
    """

    def __init__(
        self,
        address: str,
        owner: str,
        timeout_s: float,
        max_calls: int,
        *,
        token: AccessToken | None = None,
        api_key: str | None = None,
    ) -> None:
        self._address = address.rstrip("/")
        self._owner = owner
        self._token = token
        self._headers = {"Content-Type": "application/json", "X-Server-Timeout": str(math.ceil(timeout_s))}
        if api_key is not None:
            self._headers["x-goog-api-key"] = api_key
        if token is not None and token.quota_project is not None:
            self._headers["x-goog-user-project"] = token.quota_project
        self._proxy = proxy_of(self._address)
        self._headers |= self._proxy.headers
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=max_calls, ssl=httpx2.create_ssl_context()),
            timeout=aiohttp.ClientTimeout(total=timeout_s),
            proxy=self._proxy.url,
        )

    async def generate(self, model: str, body: bytes) -> bytes:
        """Send one request body; the answer's content as it came.

        What is raised for the call itself is left to the caller: a refusal as the SDK's error, a lost connection as
        aiohttp's. A token that the service refuses before it has expired by this machine's clock is renewed, once.

        Raises
        ------
        BackendError
            If no model can have that name.
        """
        return await self._call(model, "generateContent", body)

    async def count(self, model: str, body: bytes) -> bytes:
        """Have the tokens of a body's turns counted, which is free; as `generate` otherwise."""
        return await self._call(model, "countTokens", body)

    async def _call(self, model: str, method: str, body: bytes) -> bytes:
        url = f"{self._address}/{self._path(model)}:{method}"
        if self._token is None:
            return _content(*await self._post(url, body, {}))
        used = await self._token.current()
        answer, content = await self._post(url, body, {"Authorization": f"Bearer {used}"})
        if answer.status == _UNAUTHORIZED:
            used = await self._token.renewed(used)
            answer, content = await self._post(url, body, {"Authorization": f"Bearer {used}"})
        return _content(answer, content)

    def _path(self, model: str) -> str:
        if any(part in model for part in ("..", "?", "&")):
            raise BackendError(f"{model!r} cannot be the name of a model.", model=model)
        if not self._owner:
            return model if model.startswith(("models/", "tunedModels/")) else f"models/{model}"
        if model.startswith("projects/"):
            return model
        if not model.startswith(("models/", "publishers/")):
            publisher, _, name = model.partition("/")
            model = f"publishers/{publisher}/models/{name}" if name else f"publishers/google/models/{model}"
        return f"{self._owner}/{model}"

    async def _post(self, url: str, body: bytes, headers: dict[str, str]) -> tuple[aiohttp.ClientResponse, bytes]:
        told = self._headers | headers
        async with self._session.post(url, data=body, headers=told, proxy_headers=self._proxy.tunnel) as answer:
            return answer, await answer.read()

    async def aclose(self) -> None:
        """Close all connections."""
        await self._session.close()


def _content(answer: aiohttp.ClientResponse, content: bytes) -> bytes:
    if answer.status == 200:
        return content
    kind = errors.ClientError if 400 <= answer.status < 500 else errors.ServerError
    # Of the answer itself only what can travel to another process with the error.
    raise kind(
        answer.status, _said(answer, content), _Refusal({name.title(): value for name, value in answer.headers.items()})
    )


class _Refusal(NamedTuple):
    headers: dict[str, str]


def _said(answer: aiohttp.ClientResponse, content: bytes) -> Any:
    try:
        return json.loads(content)
    except ValueError:
        return {"message": content.decode("utf-8", "replace"), "status": answer.reason}
