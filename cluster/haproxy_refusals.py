"""What HAProxy says by itself while no replica can: try again, in the words of the faces.

Serve has it say 500, which tells clients that trying again is of no use, and 404 of every path
until it has heard of the replicas: for seconds after its own restart.
"""

from __future__ import annotations

import json

_RETRY_AFTER_S = 2
_PHRASES = {503: "Service Unavailable", 504: "Gateway Timeout"}
# By the status that HAProxy means.
_STATUS = {502: 503, 503: 503, 504: 504}
_BODIES = {
    503: (
        "unavailable_error",
        "not_ready",
        "no part of the server that takes requests can be reached; try again",
    ),
    504: ("timeout_error", "deadline_exceeded", "the server did not answer in time"),
}


def error_files() -> dict[int, str]:
    """Whole answers by the status that they stand in for, as `errorfile` wants them."""
    return {meant: _answer(status) for meant, status in _STATUS.items()}


def http_refusal() -> str:
    """The same as an argument of `http-request return`."""
    return (
        f"status 503 content-type application/json hdr retry-after {_RETRY_AFTER_S} "
        f"string '{_body(503)}'"
    )


def grpc_refusal() -> str:
    """The same to a gRPC client: trailers only, UNAVAILABLE."""
    _, _, message = _BODIES[503]
    return (
        f'status 200 content-type application/grpc hdr grpc-status 14 hdr grpc-message "{message}"'
    )


def _answer(status: int) -> str:
    body = _body(status)
    lines = (
        f"HTTP/1.1 {status} {_PHRASES[status]}",
        "content-type: application/json",
        f"content-length: {len(body)}",
        *([f"retry-after: {_RETRY_AFTER_S}"] if status == 503 else []),
        "",
        body,
    )
    return "\r\n".join(lines)


def _body(status: int) -> str:
    kind, code, message = _BODIES[status]
    error = {"message": message, "type": kind, "param": None, "code": code}
    return json.dumps({"error": error, "object": "error", **error})
