"""Answers of the Anthropic dialect, as the OpenAPI document has them.

None as a default: the field may be absent; None without one: it may be null.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, Field


class TextBlock(BaseModel):
    """A piece of the answer."""

    type: Literal["text"]
    text: str


class ThinkingBlock(BaseModel):
    """A piece of thinking; to be sent back as it is."""

    type: Literal["thinking"]
    thinking: str
    signature: str


class ToolUseBlock(BaseModel):
    """A tool call."""

    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, object]


class OutputTokensDetails(BaseModel):
    """What output tokens were for."""

    thinking_tokens: int


class MessageUsage(BaseModel):
    """Token counts of a message; tokens from the cache are not among `input_tokens`."""

    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int
    output_tokens_details: OutputTokensDetails | None = None


class MessageAnswer(BaseModel):
    """Answer of POST /v1/messages."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[Annotated[TextBlock | ThinkingBlock | ToolUseBlock, Field(discriminator="type")]]
    stop_reason: (
        Literal[
            "end_turn",
            "max_tokens",
            "stop_sequence",
            "tool_use",
            "model_context_window_exceeded",
        ]
        | None
    )
    stop_sequence: str | None
    usage: MessageUsage


class MessageEvent(BaseModel):
    """One event of a streamed message; which fields it has depends on `type`."""

    type: Literal[
        "message_start",
        "content_block_start",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
        "error",
    ]
    message: MessageAnswer | None = None
    index: int | None = None
    content_block: dict[str, object] | None = None
    delta: dict[str, object] | None = None
    usage: MessageUsage | None = None
    error: MessageErrorFields | None = None
    request_id: str | None = None


class TokenCount(BaseModel):
    """Answer of POST /v1/messages/count_tokens."""

    input_tokens: int


class MessageErrorDetails(BaseModel):
    """A code for programs, and the field at fault."""

    error_code: str
    param: str | None


class MessageErrorFields(BaseModel):
    """What went wrong."""

    type: str
    message: str
    details: MessageErrorDetails


class MessageError(BaseModel):
    """A refusal or a failure in the Anthropic dialect."""

    type: Literal["error"]
    error: MessageErrorFields
    request_id: str
