"""The proxy between this machine and a service, as the environment names it."""

from __future__ import annotations

from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass


def proxy_of(address: str) -> str | None:
    """The proxy for an address, by ``HTTPS_PROXY``, ``HTTP_PROXY`` and ``NO_PROXY``; None for a direct connection.

    It is looked up once for all calls of a session. aiohttp's own ``trust_env`` does it in a thread for each call,
    reads ``~/.netrc`` each time, and refuses a call with a token if that file has an entry for its host, or for any.
    """
    parts = urlsplit(address)
    if parts.hostname is None or proxy_bypass(parts.hostname):
        return None
    proxy = getproxies().get(parts.scheme)
    return proxy if not proxy or "://" in proxy else f"http://{proxy}"
