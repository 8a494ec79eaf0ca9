"""The gRPC face over a frontend of the test's, on loopback; and a wire to it that can be cut."""

from __future__ import annotations

import contextlib
import inspect
import socket
import threading
from collections.abc import Iterator
from functools import partial

from grpc_thread import serve_in_thread

from ostro.cluster.grpc_ingress import GrpcMethods
from ostro.cluster.grpc_services import (
    add_cluster_service,
    add_generation_service,
    add_health_service,
)
from ostro.cluster.metrics import Metrics
from ostro.cluster.seams import FrontendLike

SERVICES = (add_generation_service, add_cluster_service, add_health_service)


class ByKeyword:
    """Hands requests over as Ray Serve does: the context by its name."""

    def __init__(self, methods: GrpcMethods) -> None:
        self._methods = methods

    def __getattr__(self, name: str):
        method = getattr(self._methods, name)

        async def unary(request, context):
            return await method(request, grpc_context=context)

        async def stream(request, context):
            async with contextlib.aclosing(method(request, grpc_context=context)) as messages:
                async for message in messages:
                    yield message

        return stream if inspect.isasyncgenfunction(method) else unary


@contextlib.contextmanager
def grpc_face(frontend: FrontendLike) -> Iterator[str]:
    """Serve the face in a thread; gives its address."""
    methods = ByKeyword(GrpcMethods(lambda: frontend, Metrics(frontend.card.name)))
    with serve_in_thread(*(partial(add, methods) for add in SERVICES)) as address:
        yield address


class Wire:
    """Carries connections to `address` and cuts them all when told to; new ones get through."""

    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        self._target = (host, int(port))
        self._sockets: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def cut(self) -> None:
        """End every connection there is."""
        sockets, self._sockets = self._sockets, []
        for end in sockets:
            with contextlib.suppress(OSError):  # it may have gone by itself
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def close(self) -> None:
        """End them, and take no new ones."""
        self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
        self._thread.join(10)
        self._listener.close()
        self.cut()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(self._target)
                self._sockets += (near, far)
                for pair in ((near, far), (far, near)):
                    threading.Thread(target=_carry, args=pair, daemon=True).start()


def _carry(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):  # cut
        while data := source.recv(65536):
            sink.sendall(data)
