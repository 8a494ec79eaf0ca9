"""How refusals and failures are told over HTTP: in the form of the dialect that the path is of."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Scope

from ostro.actors.errors import NotFoundError, OstroError
from ostro.cluster.error_table import (
    answer_for,
    error_body,
    error_headers,
    in_words_of,
    public_error,
)
from ostro.cluster.http_body import SchemaError
from ostro.cluster.http_routes import json_response
from ostro.cluster.messages_fields import OWN_NAMES as MESSAGES_NAMES
from ostro.cluster.messages_fields import message_error
from ostro.cluster.request_id import id_headers, request_id_of
from ostro.cluster.responses_fields import OWN_NAMES as RESPONSES_NAMES

logger = logging.getLogger(__name__)

_MESSAGES_PATH = "/v1/messages"
_OWN_NAMES: dict[str, Mapping[str, str]] = {
    _MESSAGES_PATH: MESSAGES_NAMES,
    "/v1/responses": RESPONSES_NAMES,
    "/v1/completions": {"top_logprobs": "logprobs"},
}


def add_error_handlers(app: FastAPI) -> None:
    """Have every error of an application told in its dialect."""
    app.add_exception_handler(OstroError, _refuse)
    app.add_exception_handler(HTTPException, _refuse_route)
    app.add_exception_handler(Exception, _fail)


def refusal(
    scope: Scope,
    error: OstroError,
    *,
    headers: dict[str, str] | None = None,
    status: int | None = None,
) -> Response:
    """The answer that tells an error, as `public_error` gives it.

    Args:
        scope: Of the request; its path says which dialect.
        error: What went wrong.
        headers: More headers.
        status: Instead of the error's own.
    """
    detail = error.detail if isinstance(error, SchemaError) else None
    status = status or (answer_for(error).http_status if detail is None else 422)
    headers = {**error_headers(error), **(headers or {})}
    route = _known_route(scope["path"])
    if detail is None:  # what broke the schema has the body's own names
        error = in_words_of(error, _OWN_NAMES.get(route, {}))
    if route == _MESSAGES_PATH:
        request_id = request_id_of(scope)
        body = message_error(error, request_id)
        return json_response(body, {**headers, "request-id": request_id}, status)
    return json_response(error_body(error, detail), headers, status)


def _known_route(path: str) -> str:
    """The path in `_OWN_NAMES` that this one is, or is under; itself if there is none."""
    path = path.removeprefix("/mistral")
    return next((r for r in _OWN_NAMES if path == r or path.startswith(r + "/")), path)


async def _refuse(request: Request, error: Exception) -> Response:
    """An error that Ostro names."""
    told = public_error(error)
    if told is not error:
        logger.error("request %s failed", request_id_of(request.scope), exc_info=error)
    return refusal(request.scope, told)


async def _refuse_route(request: Request, error: Exception) -> Response:
    """No such route, or not by that method."""
    status = error.status_code if isinstance(error, HTTPException) else 500
    headers = dict(getattr(error, "headers", None) or {})
    text = f"{request.method} {request.url.path[:200]}: {getattr(error, 'detail', 'failed')}"
    told = NotFoundError(text, code="unknown_route")
    return refusal(request.scope, told, headers=headers, status=status)


async def _fail(request: Request, error: Exception) -> Response:
    """Anything else; the server around this logs it, the caller does not see its text."""
    return refusal(request.scope, public_error(error), headers=id_headers(request.scope))
