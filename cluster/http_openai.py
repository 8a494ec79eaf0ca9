"""The OpenAI dialect over HTTP, with Mistral's additions: chat, completions, control, models.

Every route exists under `/v1` and under `/mistral/v1`, where thinking comes as Mistral's chunks.
"""

from __future__ import annotations

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

from ostro.cluster.http_answer import GatheredAnswer
from ostro.cluster.http_routes import V1, HttpRoutes, json_response
from ostro.cluster.model_card import ModelCard, check_model_name
from ostro.cluster.openai_answer import WholeChat, WholeText
from ostro.cluster.openai_fields import AnswerStyle, Json, ThinkingForm
from ostro.cluster.openai_request import chat_generation, text_generation
from ostro.cluster.openai_schema import (
    ChatCompletionRequest,
    CompletionFields,
    CompletionRequest,
    ControlBody,
)
from ostro.cluster.openai_stream import ChatEventWriter, TextEventWriter
from ostro.cluster.tracing import TEXT_COMPLETION

_MISTRAL_AGENT = "mistral-client-"


class OpenAIRoutes(HttpRoutes):
    """Its endpoints, over one frontend."""

    def add_to(self, app: FastAPI) -> None:
        """Register the routes."""
        for v1 in V1:
            app.add_api_route(f"{v1}/chat/completions", self.chat, methods=["POST"])
            app.add_api_route(f"{v1}/completions", self.complete, methods=["POST"])
            app.add_api_route(f"{v1}/chat/completions/control", self.control, methods=["POST"])
            app.add_api_route(f"{v1}/models", self.models, methods=["GET"])
            app.add_api_route(f"{v1}/models/{{name:path}}", self.model, methods=["GET"])

    async def chat(self, request: Request) -> Response:
        """One assistant turn."""
        unheeded = () if self.frontend.card.heeds_predictions else ("prediction",)
        body, headers = await self.read(request, ChatCompletionRequest, unheeded)
        generation = chat_generation(body)
        form = _thinking_form(body.reasoning_format, request)
        style = _style(body, form, logprobs=bool(body.logprobs))
        events = self.watched(self.frontend.chat(generation), request)
        if body.stream:
            return self.stream(events, ChatEventWriter(style), headers)
        return GatheredAnswer(events, WholeChat(style), headers=headers)

    async def complete(self, request: Request) -> Response:
        """A raw continuation."""
        body, headers = await self.read(request, CompletionRequest)
        generation = text_generation(body)
        style = _style(body, ThinkingForm.FIELDS, logprobs=body.logprobs is not None)
        generated = self.frontend.generate(generation)
        events = self.watched(generated, request, TEXT_COMPLETION)
        if body.stream:
            return self.stream(events, TextEventWriter(style), headers)
        return GatheredAnswer(events, WholeText(style), headers=headers)

    async def control(self, request: Request) -> Response:
        """End the thinking of a running generation, or cancel it."""
        body, headers = await self.read(request, ControlBody)
        cell = self.frontend.cell
        act = cell.cancel if body.action == "cancel" else cell.end_thinking
        applied = await act(body.id)
        return json_response({"id": body.id, "action": body.action, "applied": applied}, headers)

    async def models(self) -> Response:
        """The one served model, as a list."""
        return json_response({"object": "list", "data": [_model_fields(self.frontend.card)]})

    async def model(self, name: str) -> Response:
        """The served model by one of its names."""
        card = self.frontend.card
        check_model_name(card, name)
        return json_response(_model_fields(card))


def _thinking_form(asked: str | None, request: Request) -> ThinkingForm:
    """By the field, else by the path, else by the client."""
    if asked in ("fields", "chunks"):
        return ThinkingForm(asked)
    is_mistral = request.url.path.startswith("/mistral/") or request.headers.get(
        "user-agent", ""
    ).startswith(_MISTRAL_AGENT)
    return ThinkingForm.CHUNKS if is_mistral else ThinkingForm.FIELDS


def _style(body: CompletionFields, form: ThinkingForm, *, logprobs: bool) -> AnswerStyle:
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
        "aliases": card.aliases,
        "reasoning_efforts": card.efforts,
        "default_reasoning_effort": card.default_effort,
    }
