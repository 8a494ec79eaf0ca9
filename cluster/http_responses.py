"""The Responses dialect over HTTP, without memory: /v1/responses and the count of its tokens."""

from __future__ import annotations

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

from ostro.cluster.http_answer import GatheredAnswer
from ostro.cluster.http_routes import V1, HttpRoutes, json_response
from ostro.cluster.model_card import check_model_name
from ostro.cluster.responses_answer import ResponseAnswer
from ostro.cluster.responses_fields import response_head
from ostro.cluster.responses_request import chat_generation, prompted_chat
from ostro.cluster.responses_schema import InputTokensRequest, ResponsesRequest
from ostro.cluster.responses_stream import ResponseWriter


class ResponsesRoutes(HttpRoutes):
    """Its endpoints, over one frontend."""

    def add_to(self, app: FastAPI) -> None:
        """Register the routes."""
        for v1 in V1:
            app.add_api_route(f"{v1}/responses", self.create, methods=["POST"])
            app.add_api_route(f"{v1}/responses/input_tokens", self.count, methods=["POST"])

    async def create(self, request: Request) -> Response:
        """One assistant turn."""
        body, headers = await self.read(request, ResponsesRequest)
        chat = chat_generation(body)
        frontend = self.frontend
        head = response_head(body, chat.options, frontend.card.name)
        events = self.watched(frontend.chat(chat), request)
        if body.stream:
            return self.stream(events, ResponseWriter(head), headers)
        return GatheredAnswer(events, ResponseAnswer(head), headers=headers)

    async def count(self, request: Request) -> Response:
        """How many tokens the prompt of such a request has."""
        body, headers = await self.read(request, InputTokensRequest)
        chat = prompted_chat(body)
        frontend = self.frontend
        check_model_name(frontend.card, body.model)
        tokens = await frontend.tokenize_chat(chat.messages, chat.tools, chat.options.effort)
        counted = {"object": "response.input_tokens", "input_tokens": len(tokens)}
        return json_response(counted, headers)
