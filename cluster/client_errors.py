"""What a gRPC call failed with, as the error that the server raised.

The client raises the server's own `OstroError`s: `code` is the reason of `google.rpc.ErrorInfo` in
snake_case, `param` the field at fault, `retry_after_s` the delay of `google.rpc.RetryInfo`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]

from ostro.actors.errors import (
    DeadlineError,
    ForbiddenError,
    InvalidRequestError,
    NotFoundError,
    NotReadyError,
    OstroError,
    OverloadedError,
    QuotaError,
    ShardLostError,
    TooLargeError,
    UnauthenticatedError,
)
from ostro.protos import generation_pb2 as pb

_DETAILS_KEY = "grpc-status-details-bin"
_BY_REASON: dict[str, type[OstroError]] = {
    cls.code: cls for cls in (QuotaError, ShardLostError, TooLargeError)
}
_BY_CODE: dict[grpc.StatusCode, type[OstroError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequestError,
    grpc.StatusCode.OUT_OF_RANGE: InvalidRequestError,
    grpc.StatusCode.FAILED_PRECONDITION: InvalidRequestError,
    grpc.StatusCode.UNAUTHENTICATED: UnauthenticatedError,
    grpc.StatusCode.PERMISSION_DENIED: ForbiddenError,
    grpc.StatusCode.NOT_FOUND: NotFoundError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: OverloadedError,
    grpc.StatusCode.UNAVAILABLE: NotReadyError,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineError,
}
_CODES = {code.value[0]: code for code in grpc.StatusCode}
# What to do about a TLS handshake that failed, by gRPC's own words for it.
_HANDSHAKES = {
    "CERTIFICATE_VERIFY_FAILED": "nobody we trust has signed its certificate; name who did, "
    "with ca_file or --ca",
    "Hostname Verification": "its certificate is for other names; call it by one of them",
    "WRONG_VERSION_NUMBER": "it speaks plain text",
}
_NOBODY = "nothing answers at {}; start a cluster with `ostro serve`"
_NAMELESS = "no host of the name in {} is known; is it spelt right?"
_UNREACHABLE = {
    "Failed to connect to remote host": _NOBODY,
    "resolution failed": _NAMELESS,
    "errors resolving": _NAMELESS,
    "Handshake read failed": "{} hangs up on TLS; it may speak plain text, or ask for a "
    "certificate that you did not show",
    "failed to connect to all": "{} hangs up; it may speak TLS where you do not (write https:// "
    "before the address), or ask for a certificate that you did not show",
}
# How a connection that was cut shows itself; no server of ours says any of it.
_CUT = ("RST_STREAM", "Stream removed", "GOAWAY", "Socket closed", "Connection reset")


class ConnectionLostError(NotReadyError):
    """The connection broke, or none came about; the same call may succeed on the next one."""

    code = "connection_lost"


@dataclass(frozen=True, slots=True)
class _Details:
    """What the server added to the status."""

    reason: str = ""
    field: str | None = None
    retry_after_s: float | None = None


def error_of_call(error: grpc.RpcError, address: str) -> OstroError:
    """The failure of a call to `address`, told so that a user knows what to do."""
    code, text = error.code(), error.details() or ""
    told = _details(error)
    if told.reason:
        return _make(code, told, text)
    # The server may see the caller's deadline pass first, and then cuts the stream.
    if code is grpc.StatusCode.DEADLINE_EXCEEDED or "Deadline Exceeded" in text:
        return DeadlineError(f"{address} did not answer in time")
    if code is grpc.StatusCode.UNAVAILABLE or any(mark in text for mark in _CUT):
        return _lost(code, text, address)
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and told.retry_after_s is None:
        return TooLargeError(f"{address} takes no message that large: {text}")
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return OstroError(
            f"what answers at {address} is no Ostro of this version: {text}", code="unimplemented"
        )
    if code in _BY_CODE:
        return _make(code, told, text)
    return OstroError(f"{address} failed: {code.name}: {text}", code=code.name.lower())


def _lost(code: grpc.StatusCode, text: str, address: str) -> OstroError:
    """A connection that did not come about, or broke."""
    if code is grpc.StatusCode.UNAVAILABLE:
        for mark, why in _HANDSHAKES.items():
            if mark in text:
                return OstroError(f"no TLS connection to {address}: {why}", code="tls_failed")
        for mark, told in _UNREACHABLE.items():
            if mark in text:
                return ConnectionLostError(told.format(address), code="unreachable")
    return ConnectionLostError(f"the connection to {address} was lost: {text}")


def error_of_failure(failure: pb.Failure) -> OstroError:
    """The failure that a stream told as its last message."""
    code = _CODES.get(failure.code, grpc.StatusCode.UNKNOWN)
    return _make(code, _Details(reason=failure.reason), failure.message)


def _make(code: grpc.StatusCode, told: _Details, text: str) -> OstroError:
    reason = told.reason.lower()
    cls = _BY_REASON.get(reason) or _BY_CODE.get(code, OstroError)
    return cls(text, code=reason or None, param=told.field, retry_after_s=told.retry_after_s)


def _details(error: grpc.RpcError) -> _Details:
    metadata: Any = error.trailing_metadata() or ()
    try:
        details = status_pb2.Status.FromString(dict(metadata).get(_DETAILS_KEY, b"")).details
    except DecodeError:
        return _Details()
    info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
    retry_after_s = None
    for detail in details:
        detail.Unpack(info)  # does nothing where the type is another
        if detail.Unpack(retry):
            retry_after_s = retry.retry_delay.ToMilliseconds() / 1e3
    return _Details(info.reason, info.metadata.get("field"), retry_after_s)
