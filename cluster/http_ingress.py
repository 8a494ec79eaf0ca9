"""The HTTP face: the dialects, and what belongs to none of them."""

from __future__ import annotations

from asyncio import to_thread
from collections.abc import Callable

from fastapi import FastAPI
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import Request
from starlette.responses import Response

from ostro.actors.errors import InvalidRequestError, NotReadyError
from ostro.cluster.door import Door
from ostro.cluster.guarded_frontend import GuardedFrontend
from ostro.cluster.http_errors import add_error_handlers
from ostro.cluster.http_gate import HttpGate
from ostro.cluster.http_messages import MessagesRoutes
from ostro.cluster.http_openai import OpenAIRoutes
from ostro.cluster.http_responses import ResponsesRoutes
from ostro.cluster.http_routes import HttpRoutes, json_response
from ostro.cluster.metrics import Metrics
from ostro.cluster.model_card import check_model_name
from ostro.cluster.openai_request import chat_messages, tools_on_offer
from ostro.cluster.openai_schema import DetokenizeBody, TokenizeBody
from ostro.cluster.openapi import document
from ostro.cluster.request_id import RequestIds
from ostro.cluster.seams import FrontendLike
from ostro.configs.deployment import ServingConfig


def build_http_app(
    get_frontend: Callable[[], FrontendLike],
    serving: ServingConfig,
    metrics: Metrics,
    *,
    door: Door | None = None,
    adds_request_id: bool = True,
) -> FastAPI:
    """The ASGI application of one ingress replica.

    Args:
        get_frontend: Gives the frontend; raises NotReadyError while there is none.
        serving: Limits of bodies and streams.
        metrics: Where requests are counted.
        door: Who may come in; None is everybody.
        adds_request_id: Put `x-request-id` on answers; off where the server around this does.
    """
    app = FastAPI(
        title="Ostro",
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,  # it would send callers of TLS, prompts and all, on to clear text
    )
    door = door or Door.wide_open()
    for routes in (OpenAIRoutes, ResponsesRoutes, MessagesRoutes, _OwnRoutes):
        routes(lambda: GuardedFrontend(get_frontend(), door), serving, metrics).add_to(app)
    add_error_handlers(app)
    app.add_middleware(HttpGate, door=door, metrics=metrics)
    app.add_middleware(RequestIds, adds_header=adds_request_id)
    return app


class _OwnRoutes(HttpRoutes):
    """What belongs to no dialect: the tokenizer, health and metrics."""

    def add_to(self, app: FastAPI) -> None:
        app.add_api_route("/tokenize", self.tokenize, methods=["POST"])
        app.add_api_route("/detokenize", self.detokenize, methods=["POST"])
        app.add_api_route("/health", self.ready, methods=["GET", "HEAD"])
        app.add_api_route("/ready", self.ready, methods=["GET", "HEAD"])
        app.add_api_route("/live", self.live, methods=["GET", "HEAD"])
        app.add_api_route("/metrics", self.metrics, methods=["GET"])
        app.add_api_route("/openapi.json", self.openapi, methods=["GET"])

    async def tokenize(self, request: Request) -> Response:
        body, headers = await self.read(request, TokenizeBody)
        frontend = self.frontend
        check_model_name(frontend.card, body.model)
        if (body.prompt is None) == (body.messages is None):
            raise InvalidRequestError("send either prompt or messages", param="prompt")
        if body.prompt is not None:
            tokens = await frontend.tokenize_text(body.prompt, add_bos=body.add_special_tokens)
        else:
            messages, tools = chat_messages(body.messages or ()), tools_on_offer(body.tools or ())
            tokens = await frontend.tokenize_chat(messages, tools, body.reasoning_effort)
        fields = {"count": len(tokens), "max_model_len": frontend.card.max_context}
        return json_response({**fields, "tokens": tokens}, headers)

    async def detokenize(self, request: Request) -> Response:
        body, headers = await self.read(request, DetokenizeBody)
        frontend = self.frontend
        check_model_name(frontend.card, body.model)
        text = await frontend.detokenize(body.tokens)
        return json_response({"prompt": text}, headers)

    async def ready(self) -> Response:
        if not self.frontend.cell.ready:
            raise NotReadyError("the cell is loading, draining or being mended")
        return json_response({"status": "ready"})

    async def live(self) -> Response:
        return json_response({"status": "live"})

    async def metrics(self) -> Response:
        try:
            cell = self.frontend.cell
        except NotReadyError:
            cell = None
        return Response(await self._metrics.render(cell), media_type=CONTENT_TYPE_LATEST)

    async def openapi(self) -> Response:
        return Response(await to_thread(document), media_type="application/json")
