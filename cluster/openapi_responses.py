"""Answers of the Responses dialect, as the OpenAPI document has them.

None as a default: the field may be absent; None without one: it may be null.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel

from ostro.cluster.openapi_answers import ErrorFields


class ResponsePart(BaseModel):
    """A piece of text of an item; logprobs come where they were asked for."""

    type: Literal["output_text", "reasoning_text"]
    text: str
    annotations: list[object] | None = None
    logprobs: list[dict[str, object]] | None = None


class ResponseItem(BaseModel):
    """Thinking, a piece of the answer or a tool call; its fields depend on `type`."""

    type: Literal["reasoning", "message", "function_call"]
    id: str
    status: Literal["in_progress", "completed", "incomplete"]
    content: list[ResponsePart] | None = None
    summary: list[object] | None = None
    role: Literal["assistant"] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None


class ResponseReasoning(BaseModel):
    """What the server made of the asked effort; `budget` null is unlimited."""

    effort: str | None
    summary: None
    budget: int | None = None
    tokens: int | None = None
    ended_by: Literal["model", "budget", "caller"] | None = None


class IncompleteDetails(BaseModel):
    """What cut an answer short."""

    reason: str


class InputTokensDetails(BaseModel):
    """Where input tokens came from."""

    cached_tokens: int
    cache_write_tokens: int
    image_tokens: int


class ReasoningTokensDetails(BaseModel):
    """What output tokens were for."""

    reasoning_tokens: int


class ResponseUsage(BaseModel):
    """Token counts of a response."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: ReasoningTokensDetails
    total_tokens: int


class ResponseAnswer(BaseModel):
    """Answer of POST /v1/responses; what was asked for is told back beside these fields."""

    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None
    status: Literal["in_progress", "completed", "incomplete", "failed", "cancelled"]
    error: ErrorFields | None
    incomplete_details: IncompleteDetails | None
    model: str
    output: list[ResponseItem]
    usage: ResponseUsage | None
    reasoning: ResponseReasoning
    store: Literal[False]


class ResponseEvent(BaseModel):
    """One event of a streamed response; which fields it has depends on `type`."""

    type: str
    sequence_number: int
    response: ResponseAnswer | None = None
    output_index: int | None = None
    content_index: int | None = None
    item_id: str | None = None
    item: ResponseItem | None = None
    part: ResponsePart | None = None
    delta: str | None = None
    text: str | None = None
    arguments: str | None = None


class InputTokens(BaseModel):
    """Answer of POST /v1/responses/input_tokens."""

    object: Literal["response.input_tokens"]
    input_tokens: int
