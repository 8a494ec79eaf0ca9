"""A grpc.aio server on a loop and thread of its own, for tests of synchronous clients."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import grpc


@contextmanager
def serve_in_thread(
    *add_servicers: Callable[[grpc.aio.Server], None],
    credentials: grpc.ServerCredentials | None = None,
) -> Iterator[str]:
    """Serve on a port of loopback, with TLS if credentials are given; gives its address."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    async def start() -> tuple[grpc.aio.Server, int]:
        server = grpc.aio.server()
        for add in add_servicers:
            add(server)
        if credentials is None:
            port = server.add_insecure_port("127.0.0.1:0")
        else:
            port = server.add_secure_port("127.0.0.1:0", credentials)
        await server.start()
        return server, port

    def run(work) -> object:
        return asyncio.run_coroutine_threadsafe(work, loop).result(10)

    server, port = run(start())
    try:
        yield f"127.0.0.1:{port}"
    finally:
        run(server.stop(0))
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()
