"""The Responses dialect over HTTP, without memory: /v1/responses and the count of its tokens."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

from ostro.actors.errors import InvalidRequestError
from ostro.cluster.generation import GenerationEvent
from ostro.cluster.http_answer import GatheredAnswer
from ostro.cluster.http_routes import V1, HttpRoutes, json_response
from ostro.cluster.metrics import closing_events
from ostro.cluster.model_card import check_model_name
from ostro.cluster.responses_answer import ResponseAnswer
from ostro.cluster.responses_fields import response_head
from ostro.cluster.responses_request import (
    chat_generation,
    in_own_words,
    prompted_chat,
)
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
        events = self.watched(_told_in_own_words(frontend.chat(chat)), request)
        if body.stream:
            return self.stream(events, ResponseWriter(head), headers)
        answer = ResponseAnswer(head)
        return GatheredAnswer(events, answer, answer.body, headers=headers)

    async def count(self, request: Request) -> Response:
        """How many tokens the prompt of such a request has."""
        body, headers = await self.read(request, InputTokensRequest)
        chat = prompted_chat(body)
        frontend = self.frontend
        check_model_name(frontend.card, body.model)
        try:
            tokens = await frontend.tokenize_chat(chat.messages, chat.tools, chat.options.effort)
        except InvalidRequestError as error:
            raise in_own_words(error) from error
        counted = {"object": "response.input_tokens", "input_tokens": len(tokens)}
        return json_response(counted, headers)


async def _told_in_own_words(
    events: AsyncIterator[GenerationEvent],
) -> AsyncGenerator[GenerationEvent, None]:
    try:
        async with closing_events(events) as source:
            async for event in source:
                yield event
    except InvalidRequestError as error:
        raise in_own_words(error) from error
