"""What the HTTP dialects share: how a body is read and how an answer leaves."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Collection, Mapping

import msgspec
from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

from ostro.cluster.generation import GenerationEvent
from ostro.cluster.http_answer import StreamedAnswer, StreamWriter
from ostro.cluster.http_body import Body, read_body
from ostro.cluster.metrics import Metrics
from ostro.cluster.seams import FrontendLike
from ostro.cluster.tracing import CHAT, Origin
from ostro.configs.deployment import ServingConfig

V1 = ("/v1", "/mistral/v1")  # roots of the dialects that openai's and mistralai's clients speak


class HttpRoutes:
    """The endpoints of one dialect, over one frontend; subclasses add the routes."""

    def __init__(
        self, get_frontend: Callable[[], FrontendLike], serving: ServingConfig, metrics: Metrics
    ) -> None:
        self._get_frontend = get_frontend
        self._serving = serving
        self._metrics = metrics

    def add_to(self, app: FastAPI) -> None:
        """Register the dialect's routes."""
        raise NotImplementedError

    @property
    def frontend(self) -> FrontendLike:
        """The frontend.

        Raises:
            NotReadyError: There is none yet.
        """
        return self._get_frontend()

    async def read(
        self, request: Request, kind: type[Body], unheeded: Collection[str] = ()
    ) -> tuple[Body, dict[str, str]]:
        """The body, and the headers that name its ignored fields. Raises what `read_body` does."""
        return await read_body(request, kind, limits=self._serving, unheeded=unheeded)

    def watched(
        self, events: AsyncIterator[GenerationEvent], request: Request, operation: str = CHAT
    ) -> AsyncIterator[GenerationEvent]:
        """The same events, counted and traced."""
        return self._metrics.watch(events, Origin.of(request.headers, operation))

    def stream(
        self,
        events: AsyncIterator[GenerationEvent],
        writer: StreamWriter,
        headers: Mapping[str, str],
    ) -> Response:
        """An answer of server-sent events."""
        keep_alive_s = self._serving.keep_alive_s
        return StreamedAnswer(events, writer, keep_alive_s=keep_alive_s, headers=headers)


def json_response(
    fields: Mapping[str, object], headers: Mapping[str, str] | None = None, status: int = 200
) -> Response:
    """A JSON body."""
    return Response(
        msgspec.json.encode(fields),
        status_code=status,
        headers=None if headers is None else dict(headers),
        media_type="application/json",
    )
