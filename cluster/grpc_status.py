"""A failure as gRPC tells it: code, text, and `google.rpc` details for machines."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import grpc
from google.protobuf.any_pb2 import Any
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]

from ostro.actors.errors import OstroError
from ostro.cluster.error_table import answer_for, public_message, retry_after_s

_DOMAIN = "ostro"
_DETAILS_KEY = "grpc-status-details-bin"


class GrpcContext(Protocol):
    """What is needed of a call's context; Ray Serve's and grpc.aio's both have it."""

    def invocation_metadata(self) -> Iterable[tuple[str, str | bytes]]:
        """Metadata that the client sent."""
        ...

    def peer(self) -> str:
        """Address of the other end of the connection."""
        ...

    def code(self) -> grpc.StatusCode | int | None:
        """Status that was set."""
        ...

    def set_code(self, code: grpc.StatusCode) -> None:
        """Status of the call."""

    def set_details(self, details: str) -> None:
        """Text of the status."""

    def set_trailing_metadata(self, trailing_metadata: Sequence[tuple[str, str | bytes]]) -> None:
        """Metadata after the last message."""


def text_metadata(context: GrpcContext) -> list[tuple[str, str]]:
    """What the client sent besides the request, as far as it is text."""
    metadata = context.invocation_metadata() or ()
    return [(name, value) for name, value in metadata if isinstance(value, str)]


def set_status(context: GrpcContext, error: OstroError) -> None:
    """Tell a failure on a call's context.

    `ErrorInfo` has the reason in UPPER_SNAKE and, where a field is at fault, its name as
    `metadata["field"]`; `RetryInfo` is there when a retry is worth its while.
    """
    code, text = answer_for(error).grpc_code, public_message(error)
    status = status_pb2.Status(code=code.value[0], message=text, details=_details(error))
    context.set_code(code)
    context.set_details(text)
    context.set_trailing_metadata([(_DETAILS_KEY, status.SerializeToString())])


def _details(error: OstroError) -> list[Any]:
    info = error_details_pb2.ErrorInfo(reason=error.code.upper(), domain=_DOMAIN)
    if error.param is not None:
        info.metadata["field"] = error.param
    details = [Any()]
    details[0].Pack(info)
    delay_s = retry_after_s(error)
    if delay_s is not None:
        delay = Duration(seconds=int(delay_s), nanos=int(delay_s % 1 * 1e9))
        details.append(Any())
        details[1].Pack(error_details_pb2.RetryInfo(retry_delay=delay))
    return details
