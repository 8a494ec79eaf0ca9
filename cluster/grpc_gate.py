"""The gRPC face's gate: no RPC of ours runs before its caller is let in.

Ray Serve has no interceptors, so the methods themselves are wrapped: all that the services'
descriptors name, so that a new RPC is never open by being forgotten.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import aclosing, contextmanager
from typing import Any, Protocol, TypeVar

import grpc
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from ostro.actors.errors import OstroError
from ostro.cluster.access import OPEN, Needs, rpc_needs
from ostro.cluster.door import Call, Door, serving
from ostro.cluster.grpc_answer import failure_message
from ostro.cluster.grpc_services import all_methods
from ostro.cluster.grpc_status import GrpcContext, set_status, text_metadata
from ostro.cluster.key_ring import shown_key
from ostro.cluster.metrics import Metrics

_Class = TypeVar("_Class", bound=type)
_ID_CHARS = 200
_CODES = {code.value[0]: code for code in grpc.StatusCode}


class Gated(Protocol):
    """What a class of RPC methods must have to be `gated`."""

    _grpc_door: Door
    _grpc_metrics: Metrics


def gated(methods: _Class) -> _Class:
    """Class decorator: put the gate in front of every method that is an RPC and needs a key."""
    for method in all_methods():
        needs = rpc_needs(method.name)
        behaviour = vars(methods).get(method.name)
        if behaviour is not None and needs is not OPEN:
            wrap = _gated_stream if method.server_streaming else _gated_unary
            setattr(methods, method.name, wrap(method, needs, behaviour))
    return methods


def _gated_unary(
    method: MethodDescriptor, needs: Needs, behaviour: Callable[..., Awaitable[Message]]
) -> Callable[..., Awaitable[Message]]:
    empty = GetMessageClass(method.output_type)

    @functools.wraps(behaviour)
    async def unary(self: Gated, request: Any, grpc_context: GrpcContext) -> Message:
        with _visit(self, method.name, grpc_context) as call:
            if _refusal(self, call, needs, grpc_context) is not None:
                return empty()
            with serving(call):
                return await behaviour(self, request, grpc_context)

    return unary


def _gated_stream(
    method: MethodDescriptor, needs: Needs, behaviour: Callable[..., AsyncGenerator[Message, None]]
) -> Callable[..., AsyncGenerator[Message, None]]:
    answer = GetMessageClass(method.output_type)
    tells_failures = "failure" in method.output_type.fields_by_name

    @functools.wraps(behaviour)
    async def stream(
        self: Gated, request: Any, grpc_context: GrpcContext
    ) -> AsyncGenerator[Message, None]:
        with _visit(self, method.name, grpc_context) as call:
            error = _refusal(self, call, needs, grpc_context)
            if error is not None:
                if not tells_failures:
                    raise error
                yield answer(failure=failure_message(error))
                return
            async with aclosing(behaviour(self, request, grpc_context)) as messages:
                # A generator runs in the context of whoever asks for its next message. The
                # generation is asked for before the first one, and by then it must be known whose.
                with serving(call):
                    first = await anext(messages, None)
                if first is not None:
                    yield first
                async for message in messages:
                    yield message

    return stream


@contextmanager
def _visit(methods: Gated, rpc: str, context: GrpcContext) -> Iterator[Call]:
    """A call of an RPC from its beginning to the line in the audit log."""
    metadata = text_metadata(context)
    forwarded_for = [value for name, value in metadata if name == "x-forwarded-for"]
    call = Call(
        request_id=dict(metadata).get("x-request-id", "")[:_ID_CHARS],
        route=f"grpc {rpc}",
        client=methods._grpc_door.client(context.peer(), forwarded_for),
    )
    try:
        yield call
    except (asyncio.CancelledError, GeneratorExit):
        call.status = grpc.StatusCode.CANCELLED.name
        raise
    except Exception:
        call.status = _status_name(context.code() or grpc.StatusCode.UNKNOWN)
        raise
    finally:
        call.status = call.status or _status_name(context.code())
        methods._grpc_door.close(call)


def _refusal(methods: Gated, call: Call, needs: Needs, context: GrpcContext) -> OstroError | None:
    """Let the caller in, or set the status that says why not."""
    metadata = dict(text_metadata(context))
    shown = shown_key(metadata.get("authorization"), metadata.get("x-api-key"))
    try:
        methods._grpc_door.let_in(call, shown, needs)
    except OstroError as error:
        methods._grpc_metrics.count_refused_key(error)
        set_status(context, error)
        return error
    return None


def _status_name(code: grpc.StatusCode | int | None) -> str:
    """Name of a status; grpc.aio gives it as a number, and 0 or None where none was set."""
    return (_CODES[code] if isinstance(code, int) else code or grpc.StatusCode.OK).name
