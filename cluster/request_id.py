"""`x-request-id`: taken from the caller or made up, and put on every HTTP answer."""

from __future__ import annotations

import re
import uuid

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_HEADER = "x-request-id"
_KEY = "ostro.request_id"
_HEADERS_KEY = "ostro.request_id_headers"
_PLAIN = re.compile(r"[\x21-\x7e]{1,200}")


def request_id_of(scope: Scope) -> str:
    """The id of a request that went through `RequestIds`; empty if it did not."""
    return str(scope.get(_KEY, ""))


def id_headers(scope: Scope) -> dict[str, str]:
    """What an answer must carry that `RequestIds` does not see; empty where it adds no header."""
    headers: dict[str, str] = scope.get(_HEADERS_KEY, {})
    return headers


class RequestIds:
    """ASGI middleware that gives every request its id."""

    def __init__(self, app: ASGIApp, *, adds_header: bool = True) -> None:
        self._app = app
        self._adds_header = adds_header

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        asked = Headers(scope=scope).get(_HEADER, "")
        request_id = asked if _PLAIN.fullmatch(asked) else uuid.uuid4().hex
        scope[_KEY] = request_id
        scope[_HEADERS_KEY] = {_HEADER: request_id} if self._adds_header else {}
        if not self._adds_header:
            await self._app(scope, receive, send)
            return

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                pair = (_HEADER.encode(), request_id.encode())
                message["headers"] = [*message.get("headers", ()), pair]
            await send(message)

        await self._app(scope, receive, send_with_id)
