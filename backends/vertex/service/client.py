"""The google-genai client as both Vertex backends use it."""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator
from typing import Any

import httpx2
from google import genai
from google.genai import types

from backends.errors import ConfigError
from backends.vertex.service.access_token import AccessToken
from backends.vertex.service.model_calls import ModelCalls
from backends.vertex.service.retry import translated

_API_VERSION, _DEVELOPER_API_VERSION = "v1beta1", "v1beta"


def require_project(project_id: str | None, instead: str = "") -> str:
    """The project, or one clear line, which ends with what there is ``instead``.

    Raises
    ------
    ConfigError
        If no project is set anywhere.
    """
    if not project_id:
        raise ConfigError(f"no Google Cloud project: set --project-id or GOOGLE_CLOUD_PROJECT{instead}.")
    return project_id


class ServiceClient(genai.Client):
    """The SDK's client with a transport that is given to it, and which it leaves open."""

    def __init__(self, transport: httpx2.AsyncClient, http_options: types.HttpOptions, **settings: Any) -> None:
        options = http_options.model_copy(update={"httpx_async_client": transport})
        super().__init__(http_options=options, **settings)
        self._transport = transport

    async def aclose(self) -> None:
        """Close all connections."""
        await self.aio.aclose()
        await self._transport.aclose()
        self.close()


def make_client(project_id: str, location: str, timeout_s: float, max_calls: int = 100) -> ServiceClient:
    """A Vertex client without retries of its own; every call has a timeout.

    Parameters
    ----------
    project_id, location : str
    timeout_s : float
        Seconds until a call counts as lost.
    max_calls : int
        How many calls may be in flight; as many connections are kept.

    Raises
    ------
    ConfigError
        If there are no credentials.
    """
    with translated("connect to Vertex AI"):
        token = AccessToken()
        return ServiceClient(
            async_transport(max_calls, _RenewedToken(token)),
            types.HttpOptions(timeout=int(timeout_s * 1000), api_version=api_version()),
            vertexai=True,
            project=project_id,
            location=location,
            credentials=token.credentials,
        )


def async_transport(max_calls: int, auth: httpx2.Auth | None = None) -> httpx2.AsyncClient:
    """The HTTP client of the asynchronous calls, with a connection for each call in flight.

    It is given to the SDK, which would else use aiohttp wherever that happens to be installed, and on that path repeats
    a call by itself after a broken connection: a job could be made twice.
    """
    limits = httpx2.Limits(max_connections=max_calls, max_keepalive_connections=max_calls)
    return httpx2.AsyncClient(limits=limits, auth=auth, follow_redirects=True)


class _RenewedToken(httpx2.Auth):
    """A token that the service refuses before it has expired by this machine's clock is renewed, once a call."""

    def __init__(self, token: AccessToken) -> None:
        self._token = token

    async def async_auth_flow(self, request: httpx2.Request) -> AsyncGenerator[httpx2.Request, httpx2.Response]:
        answer = yield request
        if answer.status_code != 401:
            return
        used = request.headers.get("Authorization", "").removeprefix("Bearer ")
        request.headers["Authorization"] = f"Bearer {await self._token.renewed(used)}"
        yield request


def model_calls(project_id: str, location: str, timeout_s: float, max_calls: int) -> ModelCalls:
    """The calls to the models of a project; must be made in an event loop.

    Raises
    ------
    ConfigError
        If there are no credentials.
    """
    with translated("connect to Vertex AI"):
        token = AccessToken()
    owner = f"projects/{project_id}/locations/{location}"
    return ModelCalls(f"{base_url(location)}/{api_version()}", owner, timeout_s, max_calls, token=token)


def developer_calls(api_key: str, timeout_s: float, max_calls: int) -> ModelCalls:
    """The calls to the models of the Gemini Developer API; must be made in an event loop."""
    base = os.environ.get("GOOGLE_GEMINI_BASE_URL") or "https://generativelanguage.googleapis.com"
    version = os.environ.get("GOOGLE_GENAI_API_VERSION") or _DEVELOPER_API_VERSION
    return ModelCalls(f"{base.rstrip('/')}/{version}", "", timeout_s, max_calls, api_key=api_key)


def api_version() -> str:
    """The version of the service's interface."""
    return os.environ.get("GOOGLE_GENAI_API_VERSION") or _API_VERSION


def base_url(location: str) -> str:
    """Where the service is."""
    custom = os.environ.get("GOOGLE_VERTEX_BASE_URL")
    if custom:
        return custom.rstrip("/")
    if location == "global":
        return "https://aiplatform.googleapis.com"
    if location in ("us", "eu"):
        return f"https://aiplatform.{location}.rep.googleapis.com"
    return f"https://{location}-aiplatform.googleapis.com"


def check_location(location: str) -> str:
    """Refuse a location that could not be part of a host name.

    Raises
    ------
    ConfigError
        With the value.
    """
    if not location.replace("-", "").isalnum():
        raise ConfigError(f"location {location!r} is not a Vertex AI location such as us-central1 or global.")
    return location
