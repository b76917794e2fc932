"""A way to the Prefect server on which the answer to the end of a flow run comes too late, so that it is told twice."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import aiohttp
from aiohttp import web

_OWN = ("host", "content-length", "transfer-encoding", "connection")  # of one hop


@contextmanager
def told_twice(api: str) -> Iterator[tuple[str, list[str]]]:
    """(address of the API by this way, flow runs whose end was told twice)."""
    told: list[str] = []
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    way = _Way(api.removesuffix("/api"), told)
    port = asyncio.run_coroutine_threadsafe(way.open(), loop).result(30)
    try:
        yield f"http://127.0.0.1:{port}/api", told
    finally:
        asyncio.run_coroutine_threadsafe(way.close(), loop).result(30)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()


class _Way:
    def __init__(self, server: str, told: list[str]) -> None:
        self._server, self._told = server, told

    async def open(self) -> int:
        self._client = aiohttp.ClientSession()
        app = web.Application(client_max_size=2**28)
        app.router.add_route("*", "/{path:.*}", self._pass)
        self._runner = web.AppRunner(app, shutdown_timeout=1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        return site._server.sockets[0].getsockname()[1]

    async def close(self) -> None:
        await self._runner.cleanup()
        await self._client.close()

    async def _pass(self, request: web.Request) -> web.StreamResponse:
        if request.headers.get("Upgrade", "").lower() == "websocket":
            return await self._pass_events(request)
        body = await request.read()
        is_end = "/flow_runs/" in request.path and request.path.endswith("/set_state") and b'"COMPLETED"' in body
        if is_end:
            self._told.append(request.path.split("/")[-2])
            await self._sent(request, body)
        status, headers, data = await self._sent(request, body)
        return web.Response(status=status, headers=headers, body=data)

    async def _sent(self, request: web.Request, body: bytes) -> tuple[int, dict[str, str], bytes]:
        headers = {name: value for name, value in request.headers.items() if name.lower() not in _OWN}
        target = self._server + str(request.rel_url)
        async with self._client.request(request.method, target, headers=headers, data=body) as answer:
            kept = {
                name: value for name, value in answer.headers.items() if name.lower() not in (*_OWN, "content-encoding")
            }
            return answer.status, kept, await answer.read()

    async def _pass_events(self, request: web.Request) -> web.WebSocketResponse:
        protocols = request.headers.get("Sec-WebSocket-Protocol", "").split(", ")
        here = web.WebSocketResponse(protocols=[name for name in protocols if name])
        await here.prepare(request)
        async with self._client.ws_connect(
            self._server + str(request.rel_url), protocols=[name for name in protocols if name]
        ) as there:

            async def on(one: web.WebSocketResponse | aiohttp.ClientWebSocketResponse, other: object) -> None:
                async for message in one:
                    if message.type == aiohttp.WSMsgType.TEXT:
                        await other.send_str(message.data)  # type: ignore[attr-defined]
                    elif message.type == aiohttp.WSMsgType.BINARY:
                        await other.send_bytes(message.data)  # type: ignore[attr-defined]

            await asyncio.wait(
                [asyncio.create_task(on(here, there)), asyncio.create_task(on(there, here))],
                return_when=asyncio.FIRST_COMPLETED,
            )
        return here
