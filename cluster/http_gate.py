"""The HTTP face's gate: no route runs, and no body is read, before its caller is let in."""

from __future__ import annotations

from collections.abc import Awaitable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ostro.actors.errors import OstroError
from ostro.cluster.access import OPEN, Needs
from ostro.cluster.door import Call, Door, serving
from ostro.cluster.http_errors import refusal
from ostro.cluster.key_ring import shown_key
from ostro.cluster.metrics import Metrics
from ostro.cluster.request_id import request_id_of

_PATH_CHARS = 200
_POLICY_VIOLATION = 1008  # of WebSockets; there are none here


class HttpGate:
    """ASGI middleware around all routes; what needs no key passes by, unseen by the audit log.

    Args:
        app: What it guards.
        door: Knows callers.
        metrics: Where refusals are counted.
    """

    def __init__(self, app: ASGIApp, *, door: Door, metrics: Metrics) -> None:
        self._app = app
        self._door = door
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": _POLICY_VIOLATION})
            return
        needs = self._door.route_needs(scope["path"]) if scope["type"] == "http" else OPEN
        if needs is OPEN:
            await self._app(scope, receive, send)
            return
        call = Call(
            request_id=request_id_of(scope),
            route=f"{scope['method']} {scope['path'][:_PATH_CHARS]}",
            client=self._client(scope),
        )

        def send_noted(message: Message) -> Awaitable[None]:
            if message["type"] == "http.response.start":
                call.status = message["status"]
            return send(message)

        try:
            error = self._refusal(call, scope, needs)
            app = self._app if error is None else refusal(scope, error)
            with serving(call):
                await app(scope, receive, send_noted)
        except Exception:
            call.status = call.status or 500  # told by the server around this
            raise
        finally:
            self._door.close(call)

    def _refusal(self, call: Call, scope: Scope, needs: Needs) -> OstroError | None:
        """Let the caller in, or say why not."""
        shown = shown_key(_last(scope, b"authorization"), _last(scope, b"x-api-key"))
        try:
            self._door.let_in(call, shown, needs)
        except OstroError as error:
            self._metrics.count_refused_key(error)
            return error
        return None

    def _client(self, scope: Scope) -> str:
        peer = scope.get("client")
        return self._door.client(peer[0] if peer else "", _values(scope, b"x-forwarded-for"))


def _values(scope: Scope, wanted: bytes) -> list[str]:
    return [value.decode("latin-1") for name, value in scope["headers"] if name == wanted]


def _last(scope: Scope, wanted: bytes) -> str | None:
    return next(reversed(_values(scope, wanted)), None)
