"""The HTTP face: OpenAI's dialect with Mistral's additions, health and metrics.

Every route exists under `/v1` and under `/mistral/v1`, where thinking comes as Mistral's chunks.
"""

from __future__ import annotations

import logging
from asyncio import to_thread
from collections.abc import AsyncIterator, Callable

import msgspec
from fastapi import FastAPI
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from ostro.actors.errors import InvalidRequestError, NotFoundError, NotReadyError, OstroError
from ostro.cluster.error_table import answer_for, error_body, error_headers, public_error
from ostro.cluster.generation import FrontendLike, GenerationEvent, ModelCard
from ostro.cluster.http_answer import GatheredAnswer, StreamedAnswer
from ostro.cluster.http_body import Body, SchemaError, read_body
from ostro.cluster.metrics import Metrics
from ostro.cluster.openai_answer import WholeAnswer
from ostro.cluster.openai_fields import AnswerStyle, Json, ThinkingForm
from ostro.cluster.openai_request import (
    chat_generation,
    chat_messages,
    text_generation,
    tools_on_offer,
)
from ostro.cluster.openai_schema import (
    ChatCompletionRequest,
    CompletionRequest,
    ControlBody,
    DetokenizeBody,
    SamplingFields,
    TokenizeBody,
)
from ostro.cluster.openai_stream import ChatEventWriter, EventWriter, TextEventWriter
from ostro.cluster.request_id import RequestIds, id_headers, request_id_of
from ostro.configs.deployment import ServingConfig

logger = logging.getLogger(__name__)

_PREFIXES = ("", "/mistral")
_MISTRAL_AGENT = "mistral-client-"


def build_http_app(
    get_frontend: Callable[[], FrontendLike],
    serving: ServingConfig,
    metrics: Metrics,
    *,
    adds_request_id: bool = True,
) -> FastAPI:
    """The ASGI application of one ingress replica.

    Args:
        get_frontend: Gives the frontend; raises NotReadyError while there is none.
        serving: Limits of bodies and streams.
        metrics: Where requests are counted.
        adds_request_id: Put `x-request-id` on answers; off where the server around this does.
    """
    app = FastAPI(title="Ostro", docs_url=None, redoc_url=None, openapi_url=None)
    faces = _Routes(get_frontend, serving, metrics)
    for prefix in _PREFIXES:
        app.add_api_route(f"{prefix}/v1/chat/completions", faces.chat, methods=["POST"])
        app.add_api_route(f"{prefix}/v1/completions", faces.complete, methods=["POST"])
        app.add_api_route(f"{prefix}/v1/chat/completions/control", faces.control, methods=["POST"])
        app.add_api_route(f"{prefix}/v1/models", faces.models, methods=["GET"])
        app.add_api_route(f"{prefix}/v1/models/{{name:path}}", faces.model, methods=["GET"])
    app.add_api_route("/tokenize", faces.tokenize, methods=["POST"])
    app.add_api_route("/detokenize", faces.detokenize, methods=["POST"])
    app.add_api_route("/health", faces.ready, methods=["GET", "HEAD"])
    app.add_api_route("/ready", faces.ready, methods=["GET", "HEAD"])
    app.add_api_route("/live", faces.live, methods=["GET", "HEAD"])
    app.add_api_route("/metrics", faces.metrics, methods=["GET"])
    app.add_exception_handler(OstroError, _refuse)
    app.add_exception_handler(HTTPException, _refuse_route)
    app.add_exception_handler(Exception, _fail)
    app.add_middleware(RequestIds, adds_header=adds_request_id)
    return app


class _Routes:
    """The endpoints, over one frontend."""

    def __init__(
        self, get_frontend: Callable[[], FrontendLike], serving: ServingConfig, metrics: Metrics
    ) -> None:
        self._get_frontend = get_frontend
        self._serving = serving
        self._metrics = metrics

    async def chat(self, request: Request) -> Response:
        body, headers = await self._read(request, ChatCompletionRequest)
        generation = chat_generation(body)
        form = _thinking_form(body.reasoning_format, request)
        style = _style(body, form, logprobs=bool(body.logprobs))
        events = self._watched(self._get_frontend().chat(generation))
        if body.stream:
            return self._stream(events, ChatEventWriter(style), headers)
        answer = WholeAnswer(style)
        return GatheredAnswer(events, answer, answer.chat_body, headers=headers)

    async def complete(self, request: Request) -> Response:
        body, headers = await self._read(request, CompletionRequest)
        generation = text_generation(body)
        style = _style(body, ThinkingForm.FIELDS, logprobs=body.logprobs is not None)
        events = self._watched(self._get_frontend().generate(generation))
        if body.stream:
            return self._stream(events, TextEventWriter(style), headers)
        answer = WholeAnswer(style)
        return GatheredAnswer(events, answer, answer.text_body, headers=headers)

    async def control(self, request: Request) -> Response:
        body, headers = await self._read(request, ControlBody)
        cell = self._get_frontend().cell
        act = cell.cancel if body.action == "cancel" else cell.end_thinking
        applied = await act(body.id)
        return _json({"id": body.id, "action": body.action, "applied": applied}, headers)

    async def models(self) -> Response:
        return _json({"object": "list", "data": [_model_fields(self._get_frontend().card)]})

    async def model(self, name: str) -> Response:
        card = self._get_frontend().card
        if name != card.name:
            raise NotFoundError(
                f"model {name[:100]!r} is not served here; {card.name!r} is",
                code="model_not_found",
                param="model",
            )
        return _json(_model_fields(card))

    async def tokenize(self, request: Request) -> Response:
        body, headers = await self._read(request, TokenizeBody)
        frontend = self._get_frontend()
        if (body.prompt is None) == (body.messages is None):
            raise InvalidRequestError("send either prompt or messages", param="prompt")
        if body.prompt is not None:
            tokens = await to_thread(
                frontend.tokenize_text, body.prompt, add_bos=body.add_special_tokens
            )
        else:
            messages, tools = chat_messages(body.messages or ()), tools_on_offer(body.tools or ())
            tokens = await frontend.tokenize_chat(messages, tools, body.reasoning_effort)
        fields = {"count": len(tokens), "max_model_len": frontend.card.max_context}
        return _json({**fields, "tokens": tokens}, headers)

    async def detokenize(self, request: Request) -> Response:
        body, headers = await self._read(request, DetokenizeBody)
        text = await to_thread(self._get_frontend().detokenize, body.tokens)
        return _json({"prompt": text}, headers)

    async def ready(self) -> Response:
        if not self._get_frontend().cell.ready:
            raise NotReadyError("the cell is loading, draining or being mended")
        return _json({"status": "ready"})

    async def live(self) -> Response:
        return _json({"status": "live"})

    async def metrics(self) -> Response:
        try:
            cell = self._get_frontend().cell
        except NotReadyError:
            cell = None
        return Response(await self._metrics.render(cell), media_type=CONTENT_TYPE_LATEST)

    async def _read(self, request: Request, kind: type[Body]) -> tuple[Body, dict[str, str]]:
        return await read_body(request, kind, max_bytes=self._serving.max_body_bytes)

    def _watched(self, events: AsyncIterator[GenerationEvent]) -> AsyncIterator[GenerationEvent]:
        return self._metrics.watch(events)

    def _stream(
        self, events: AsyncIterator[GenerationEvent], writer: EventWriter, headers: dict[str, str]
    ) -> Response:
        keep_alive_s = self._serving.keep_alive_s
        return StreamedAnswer(events, writer, keep_alive_s=keep_alive_s, headers=headers)


def _thinking_form(asked: str | None, request: Request) -> ThinkingForm:
    """By the field, else by the path, else by the client."""
    if asked in ("fields", "chunks"):
        return ThinkingForm(asked)
    is_mistral = request.url.path.startswith("/mistral/") or request.headers.get(
        "user-agent", ""
    ).startswith(_MISTRAL_AGENT)
    return ThinkingForm.CHUNKS if is_mistral else ThinkingForm.FIELDS


def _style(body: SamplingFields, form: ThinkingForm, *, logprobs: bool) -> AnswerStyle:
    options = body.stream_options
    return AnswerStyle(
        form=form,
        logprobs=logprobs,
        token_ids=bool(body.return_token_ids),
        usage_chunk=bool(options and options.include_usage),
    )


def _model_fields(card: ModelCard) -> Json:
    """A card that the openai and the mistralai client both accept."""
    return {
        "id": card.name,
        "object": "model",
        "created": card.created_s,
        "owned_by": "ostro",
        "type": "base",
        "name": card.name,
        "description": card.description,
        "capabilities": {
            "completion_chat": True,
            "function_calling": True,
            "reasoning": True,
            "vision": card.has_vision,
            "completion_fim": False,
            "fine_tuning": False,
        },
        "max_context_length": card.max_context,
        "max_model_len": card.max_context,
        "aliases": [],
        "reasoning_efforts": card.efforts,
        "default_reasoning_effort": card.default_effort,
    }


def _json(fields: Json, headers: dict[str, str] | None = None, status: int = 200) -> Response:
    return Response(
        msgspec.json.encode(fields),
        status_code=status,
        headers=headers,
        media_type="application/json",
    )


async def _refuse(request: Request, error: Exception) -> Response:
    """An error that Ostro names."""
    told = public_error(error)
    status = answer_for(told).http_status
    if told is not error:
        logger.error("request %s failed", request_id_of(request.scope), exc_info=error)
    if isinstance(error, SchemaError):
        return _json(error_body(told, error.detail), status=422)
    return _json(error_body(told), error_headers(told), status)


async def _refuse_route(request: Request, error: Exception) -> Response:
    """No such route, or not by that method."""
    status = error.status_code if isinstance(error, HTTPException) else 500
    headers = dict(getattr(error, "headers", None) or {})
    text = f"{request.method} {request.url.path[:200]}: {getattr(error, 'detail', 'failed')}"
    return _json(error_body(NotFoundError(text, code="unknown_route")), headers, status)


async def _fail(request: Request, error: Exception) -> Response:
    """Anything else; the server around this logs it, the caller does not see its text."""
    told = public_error(error)
    return _json(error_body(told), id_headers(request.scope), answer_for(told).http_status)
