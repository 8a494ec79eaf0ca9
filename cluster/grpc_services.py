"""Registers our services on a gRPC server so that an unreadable request still reaches its method.

The generated registration lets the server answer INTERNAL when a request cannot be parsed, broken
UTF-8 included. Here the method gets an `UnreadableRequest` instead and can say INVALID_ARGUMENT.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2  # type: ignore[import-untyped]

from ostro.protos import cluster_pb2, generation_pb2


@dataclass(frozen=True, slots=True)
class UnreadableRequest:
    """Stands for a request that is no message of its type; `reason` is protobuf's."""

    reason: str


def add_generation_service(servicer: object, server: grpc.aio.Server) -> None:
    """Register `ostro.v1.GenerationService`."""
    _add(generation_pb2.DESCRIPTOR.services_by_name["GenerationService"], servicer, server)


def add_cluster_service(servicer: object, server: grpc.aio.Server) -> None:
    """Register `ostro.v1.ClusterService`."""
    _add(cluster_pb2.DESCRIPTOR.services_by_name["ClusterService"], servicer, server)


def add_health_service(servicer: object, server: grpc.aio.Server) -> None:
    """Register `grpc.health.v1.Health`, as far as Ray Serve can serve it: Check and Watch."""
    _add(health_pb2.DESCRIPTOR.services_by_name["Health"], servicer, server)


def all_methods() -> Iterator[MethodDescriptor]:
    """Every RPC of the three services; their names differ, as Ray Serve goes by them."""
    for file in (generation_pb2, cluster_pb2, health_pb2):
        for service in file.DESCRIPTOR.services_by_name.values():
            yield from service.methods


def _add(service: ServiceDescriptor, servicer: object, server: grpc.aio.Server) -> None:
    handlers = {
        method.name: _handler(method, getattr(servicer, method.name))
        for method in service.methods
        if hasattr(servicer, method.name)
    }
    generic = grpc.method_handlers_generic_handler(service.full_name, handlers)
    server.add_generic_rpc_handlers((generic,))
    server.add_registered_method_handlers(service.full_name, handlers)


def _handler(method: MethodDescriptor, behaviour: Any) -> grpc.RpcMethodHandler[Any, Any]:
    make = (
        grpc.unary_stream_rpc_method_handler
        if method.server_streaming
        else grpc.unary_unary_rpc_method_handler
    )
    return make(
        behaviour,
        request_deserializer=_reader(GetMessageClass(method.input_type)),
        response_serializer=GetMessageClass(method.output_type).SerializeToString,
    )


def _reader(kind: type[Message]) -> Callable[[bytes], Message | UnreadableRequest]:
    def read(data: bytes) -> Message | UnreadableRequest:
        try:
            return kind.FromString(data)
        except DecodeError as error:
            return UnreadableRequest(str(error))

    return read
