"""The gRPC face over a frontend of the test's, on a port of loopback."""

from __future__ import annotations

import contextlib
import inspect
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
