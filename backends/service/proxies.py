"""The proxy between this machine and a service, as the environment names it."""

from __future__ import annotations

from base64 import b64encode
from typing import NamedTuple
from urllib.parse import unquote, urlsplit
from urllib.request import getproxies, proxy_bypass


class Proxy(NamedTuple):
    """Where the calls to an address go first; ``url`` is None for a direct connection.

    The credentials for the proxy are not in ``url``, which errors show: they are ``tunnel`` headers of what asks for a
    tunnel to an encrypted service, and ``headers`` of each call that is not encrypted.
    """

    url: str | None = None
    tunnel: dict[str, str] = {}  # noqa: RUF012 - never changed
    headers: dict[str, str] = {}  # noqa: RUF012


def proxy_of(address: str) -> Proxy:
    """The proxy for an address, by ``HTTPS_PROXY``, ``HTTP_PROXY`` and ``NO_PROXY``.

    It is looked up once for all calls of a session. aiohttp's own ``trust_env`` does it in a thread for each call,
    reads ``~/.netrc`` each time, and refuses a call with a token if that file has an entry for its host, or for any.
    """
    service = urlsplit(address)
    if service.hostname is None or proxy_bypass(service.hostname):
        return Proxy()
    named = getproxies().get(service.scheme)
    if not named:
        return Proxy()
    parts = urlsplit(named if "://" in named else f"http://{named}")
    user, at, place = parts.netloc.rpartition("@")
    name, _, password = (unquote(part) for part in user.partition(":"))
    proven = {"Proxy-Authorization": f"Basic {b64encode(f'{name}:{password}'.encode()).decode()}"} if at else {}
    url = parts._replace(netloc=place).geturl()
    return Proxy(url, tunnel=proven) if service.scheme == "https" else Proxy(url, headers=proven)
