"""The one table that turns Ostro's errors into HTTP and gRPC answers.

Knows no web framework. Errors that Ostro does not name become `internal`: their text stays in
the log, the caller sees only that something broke.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import grpc

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
    SlowBodyError,
    TooLargeError,
    UnauthenticatedError,
)

_MAX_MESSAGE_CHARS = 1000  # gRPC sends it in a trailer, and callers' text may be quoted in it
_DEFAULT_RETRY_S = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """How one kind of error is told to the caller.

    Attributes:
        type: OpenAI's word for the family of errors.
        retryable: The same request may succeed later.
    """

    http_status: int
    grpc_code: grpc.StatusCode
    type: str
    retryable: bool = False


_ANSWERS: dict[type[OstroError], Answer] = {
    InvalidRequestError: Answer(
        http_status=400,
        grpc_code=grpc.StatusCode.INVALID_ARGUMENT,
        type="invalid_request_error",
    ),
    UnauthenticatedError: Answer(
        http_status=401, grpc_code=grpc.StatusCode.UNAUTHENTICATED, type="authentication_error"
    ),
    ForbiddenError: Answer(
        http_status=403, grpc_code=grpc.StatusCode.PERMISSION_DENIED, type="permission_error"
    ),
    NotFoundError: Answer(
        http_status=404, grpc_code=grpc.StatusCode.NOT_FOUND, type="not_found_error"
    ),
    TooLargeError: Answer(
        http_status=413,
        grpc_code=grpc.StatusCode.INVALID_ARGUMENT,
        type="invalid_request_error",
    ),
    OverloadedError: Answer(
        http_status=429,
        grpc_code=grpc.StatusCode.RESOURCE_EXHAUSTED,
        type="overloaded_error",
        retryable=True,
    ),
    QuotaError: Answer(
        http_status=429,
        grpc_code=grpc.StatusCode.RESOURCE_EXHAUSTED,
        type="rate_limit_error",
        retryable=True,
    ),
    SlowBodyError: Answer(
        http_status=408, grpc_code=grpc.StatusCode.DEADLINE_EXCEEDED, type="timeout_error"
    ),
    NotReadyError: Answer(
        http_status=503,
        grpc_code=grpc.StatusCode.UNAVAILABLE,
        type="unavailable_error",
        retryable=True,
    ),
    ShardLostError: Answer(
        http_status=503,
        grpc_code=grpc.StatusCode.UNAVAILABLE,
        type="unavailable_error",
        retryable=True,
    ),
    DeadlineError: Answer(
        http_status=504, grpc_code=grpc.StatusCode.DEADLINE_EXCEEDED, type="timeout_error"
    ),
}
_INTERNAL = Answer(http_status=500, grpc_code=grpc.StatusCode.INTERNAL, type="internal_error")


def answer_for(error: BaseException) -> Answer:
    """The table's entry for an error, by its nearest listed class."""
    for cls in type(error).__mro__:
        if cls in _ANSWERS:
            return _ANSWERS[cls]
    return _INTERNAL


def public_error(error: BaseException) -> OstroError:
    """What the caller may know of an error: itself if it is listed, else a bare `internal`."""
    if isinstance(error, OstroError) and answer_for(error) is not _INTERNAL:
        return error
    code = error.code if isinstance(error, OstroError) else "internal"
    return OstroError("the server failed while it handled the request", code=code)


def public_message(error: OstroError) -> str:
    """The error's text, cut to what fits a trailer."""
    if len(error.message) <= _MAX_MESSAGE_CHARS:
        return error.message
    return error.message[: _MAX_MESSAGE_CHARS - 4] + " ..."


def retry_after_s(error: OstroError) -> float | None:
    """Seconds after which a retry is worth its while; None where it is not."""
    if not answer_for(error).retryable:
        return None
    return _DEFAULT_RETRY_S if error.retry_after_s is None else error.retry_after_s


def in_words_of(error: OstroError, names: Mapping[str, str]) -> OstroError:
    """A refusal of the shared request model, with the names that a dialect's callers know.

    Args:
        error: As it was raised; its text may begin with the name of the field.
        names: The dialect's own name by that of the request model.
    """
    name = error.param or ""
    if name not in names:
        return error
    told = copy.copy(error)
    told.param = names[name]
    if error.message.startswith(name):
        told.message = names[name] + error.message.removeprefix(name)
    return told


def error_fields(error: OstroError) -> dict[str, object]:
    """The four fields that every error object has in HTTP."""
    return {
        "message": public_message(error),
        "type": answer_for(error).type,
        "param": error.param,
        "code": error.code,
    }


def error_body(
    error: OstroError, detail: Sequence[dict[str, object]] | None = None
) -> dict[str, object]:
    """HTTP error body, readable for the openai and the mistralai client.

    Args:
        error: What went wrong, as `public_error` gives it.
        detail: One entry per field that broke the schema; given only with status 422.
    """
    fields = error_fields(error)
    body: dict[str, object] = {"error": fields, "object": "error", **fields}
    if detail is not None:
        body["detail"] = list(detail)
    return body


def error_headers(error: OstroError) -> dict[str, str]:
    """`Retry-After` in whole seconds, at least one, where a retry is worth its while.

    Where a key is wanted, `WWW-Authenticate` says how to show it.
    """
    if isinstance(error, UnauthenticatedError):
        return {"www-authenticate": 'Bearer realm="ostro"'}
    delay_s = retry_after_s(error)
    return {} if delay_s is None else {"retry-after": str(max(1, math.ceil(delay_s)))}
