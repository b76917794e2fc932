"""The token that a call shows: asked for once for all calls, and again when it is old or refused."""

from __future__ import annotations

import asyncio

import google.auth
import google.auth.transport.requests
from google.auth.credentials import Credentials

SCOPE = "https://www.googleapis.com/auth/cloud-platform"


class AccessToken:
    """The access token of Google credentials.

    Parameters
    ----------
    credentials : Credentials
        Default: those of this machine.

    Raises
    ------
    google.auth.exceptions.DefaultCredentialsError
        If there are none.
    """

    def __init__(self, credentials: Credentials | None = None) -> None:
        self.credentials = credentials or google.auth.default(scopes=[SCOPE])[0]
        self._renewal = asyncio.Lock()

    @property
    def quota_project(self) -> str | None:
        """The project that is charged, where the credentials name another one than that of the call."""
        return self.credentials.quota_project_id

    async def current(self) -> str:
        """A token that has not expired by this machine's clock."""
        token = self.credentials.token
        return token if token and not self.credentials.expired else await self.renewed(token)

    async def renewed(self, used: str | None) -> str:
        """A newer token than the one that was used; of several that ask at once, one gets it for all."""
        async with self._renewal:
            if self.credentials.token == used:
                await asyncio.to_thread(self.credentials.refresh, google.auth.transport.requests.Request())
            return str(self.credentials.token)
