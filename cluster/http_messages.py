"""The Anthropic dialect over HTTP: messages and the count of their tokens."""

from __future__ import annotations

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

from ostro.cluster.http_answer import GatheredAnswer
from ostro.cluster.http_routes import HttpRoutes, json_response
from ostro.cluster.messages_answer import WholeMessage
from ostro.cluster.messages_request import (
    conversation,
    message_generation,
    reasoning,
    tools_on_offer,
)
from ostro.cluster.messages_schema import CountTokensRequest, MessagesRequest
from ostro.cluster.messages_stream import MessageEventWriter
from ostro.cluster.model_card import check_model_name
from ostro.cluster.request_id import request_id_of


class MessagesRoutes(HttpRoutes):
    """Its endpoints, over one frontend."""

    def add_to(self, app: FastAPI) -> None:
        """Register the routes."""
        app.add_api_route("/v1/messages", self.message, methods=["POST"])
        app.add_api_route("/v1/messages/count_tokens", self.count_tokens, methods=["POST"])

    async def message(self, request: Request) -> Response:
        """One assistant turn."""
        body, headers = await self.read(request, MessagesRequest)
        generation = message_generation(body)
        request_id = request_id_of(request.scope)
        headers["request-id"] = request_id  # the header that this dialect's clients read
        events = self.watched(self.frontend.chat(generation), request)
        if body.stream:
            return self.stream(events, MessageEventWriter(request_id), headers)
        return GatheredAnswer(events, WholeMessage(), headers=headers)

    async def count_tokens(self, request: Request) -> Response:
        """How long the prompt of a message would be."""
        body, headers = await self.read(request, CountTokensRequest)
        frontend = self.frontend
        check_model_name(frontend.card, body.model)
        tokens = await frontend.tokenize_chat(
            conversation(body), tools_on_offer(body.tools or ()), reasoning(body).effort
        )
        headers["request-id"] = request_id_of(request.scope)
        return json_response({"input_tokens": len(tokens)}, headers)
