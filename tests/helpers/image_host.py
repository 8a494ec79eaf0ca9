"""A host of images that speaks TLS, well-behaved and otherwise, in a thread of its own."""

from __future__ import annotations

import asyncio
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from aiohttp import web
from certificates import Authority

NAME = "pictures.example.com"
OTHER_NAME = "others.example.org"
WAIT_S = 20.0


class ImageHost:
    """Serves on 127.0.0.1 under the names that its certificate is for.

    Attributes:
        folder: Where its certificates lie.
        files: Path -> what it answers with.
        trust: Whom its clients must trust.
        port: Where it listens.
        asked: The requests that came, as path and headers.
        num_endless_bytes: What `/endless` could send before the client hung up.
        begun: `/slow` has sent its first byte.
        left: A client of `/slow` or `/endless` has hung up.
    """

    def __init__(self, folder: Path, *, name: str = NAME, address: str = "127.0.0.1") -> None:
        self.folder = folder
        authority = Authority(folder)
        pair = authority.issue("host", name, OTHER_NAME, address)
        self.trust = ssl.create_default_context(cafile=str(authority.ca))
        self.files: dict[str, bytes] = {}
        self.asked: list[tuple[str, dict[str, str]]] = []
        self.num_endless_bytes = 0
        self.begun, self.left = threading.Event(), threading.Event()
        self.port = 0
        self._address = address
        self._context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        self._context.load_cert_chain(pair.cert, pair.key)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def url(self, path: str, name: str = NAME) -> str:
        return f"https://{name}:{self.port}{path}"

    def look_up(self, host: str) -> list[str]:
        """As a name server that knows this host alone."""
        if host.lower() not in (NAME, OTHER_NAME):
            raise OSError("no such host")
        return [self._address]

    def __enter__(self) -> ImageHost:
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(WAIT_S)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self._loop).result(WAIT_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(WAIT_S)
        self._loop.close()

    async def _start(self) -> None:
        app = web.Application()
        app.router.add_get("/{path:.*}", self._answer)
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, self._address, 0, ssl_context=self._context)
        await site.start()
        self.port = self._runner.addresses[0][1]

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        self.asked.append((request.path_qs, dict(request.headers)))
        if request.path in self.files:
            return web.Response(body=self.files[request.path], content_type="text/plain")
        if request.path == "/to":
            location = request.query["url"]
            return web.Response(
                status=302, headers={"Location": location, "Set-Cookie": "crumb=1; Path=/"}
            )
        if request.path == "/packed":
            return web.Response(body=b"x", headers={"Content-Encoding": "gzip"})
        with _noting(self.left):
            return await self._misbehave(request)

    async def _misbehave(self, request: web.Request) -> web.StreamResponse:
        answer = web.StreamResponse()
        if request.path == "/announced":
            answer.content_length = 10**9
            await answer.prepare(request)
            await asyncio.sleep(WAIT_S)
        elif request.path == "/cut":
            answer.content_length = 100
            await answer.prepare(request)
            await answer.write(b"x")
            assert request.transport is not None
            request.transport.abort()
        elif request.path == "/slow":
            await answer.prepare(request)
            await answer.write(b"x")
            self.begun.set()
            await asyncio.sleep(WAIT_S)
        elif request.path == "/endless":
            await answer.prepare(request)
            while True:
                await answer.write(bytes(2**16))
                self.num_endless_bytes += 2**16
                await asyncio.sleep(0)  # to learn that the client has hung up
        else:
            raise web.HTTPNotFound
        return answer


@contextmanager
def _noting(left: threading.Event) -> Iterator[None]:
    try:
        yield
    except (asyncio.CancelledError, ConnectionError):
        left.set()
        raise
