"""What HTTP callers may send to /v1/responses and what counts its tokens.

These models check types only; `responses_request` turns them into `generation` requests and says
which values make no sense or are not served. Unknown fields are kept, so that they can be named.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from ostro.cluster.wire_schema import RequestBody, SamplingFields, Wire

LOGPROBS = "message.output_text.logprobs"
Includable = Literal[
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "message.input_image.image_url",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
    "reasoning.encrypted_content",
    "message.output_text.logprobs",
]


class ItemPart(Wire):
    """One part of an item; which fields count depends on `type`."""

    type: str
    text: str | None = None
    refusal: str | None = None
    image_url: str | None = None
    file_id: str | None = None
    detail: str | None = None
    # Accepted and without effect on the answer.
    annotations: list[object] | None = None
    logprobs: list[object] | None = None

    def without_effect(self) -> Iterator[str]:
        """A detail that is asked for: it follows from the size of the image alone."""
        if self.detail not in (None, "auto"):
            yield "detail"


class InputItem(Wire):
    """A message, thinking, a tool's call or its result; without `type` it is a message."""

    type: str | None = None
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: str | list[ItemPart] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | list[ItemPart] | None = None
    # Accepted and without effect on the answer.
    id: str | None = None
    status: str | None = None
    phase: str | None = None
    summary: list[ItemPart] | None = None
    encrypted_content: str | None = None


class FlatTool(Wire):
    """A function on offer, its fields beside its type."""

    type: str
    name: str | None = None
    description: str | None = None
    parameters: dict[str, object] | None = None
    strict: bool | None = None


class ReasoningIn(Wire):
    """How deeply to think."""

    effort: str | None = None
    summary: str | None = None


class TextFormat(Wire):
    """The form the answer must have; the last four belong to `json_schema`."""

    type: str
    name: str | None = None
    description: str | None = None
    json_schema: dict[str, object] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class TextIn(Wire):
    """What is asked of the answer's text."""

    format: TextFormat | None = None


class InputTokensRequest(RequestBody):
    """Body of POST /v1/responses/input_tokens: what makes the prompt."""

    model: str = ""
    input: str | list[InputItem] | None = None
    instructions: str | None = None
    reasoning: ReasoningIn | None = None
    tools: list[FlatTool] | None = None
    tool_choice: str | dict[str, object] | None = None
    parallel_tool_calls: bool | None = None
    text: TextIn | None = None
    # Refused where they ask for something.
    previous_response_id: str | None = None
    conversation: str | dict[str, object] | None = None
    prompt: dict[str, object] | None = None
    truncation: str | None = None

    def without_effect(self) -> Iterator[str]:
        """A summary of thinking, which comes in full, and thinking that nobody here can read."""
        if self.reasoning is not None and self.reasoning.summary is not None:
            yield "reasoning.summary"
        if isinstance(self.input, list):
            for i, item in enumerate(self.input):
                if item.type == "reasoning" and not item.content:
                    yield f"input[{i}]"
        yield from super().without_effect()


class ResponsesRequest(InputTokensRequest, SamplingFields):
    """Body of POST /v1/responses."""

    max_output_tokens: int | None = None
    top_logprobs: int | None = None
    include: list[Includable] | None = None
    thinking_token_budget: int | None = None  # beyond the dialect, as chat completions have it
    # Refused where they ask for something.
    background: bool | None = None
    moderation: dict[str, object] | None = None
    # Accepted and without effect on the answer; `max_tool_calls` bounds built-in tools alone.
    max_tool_calls: int | None = None
    metadata: dict[str, str] | None = None

    def without_effect(self) -> Iterator[str]:
        """Also what is to be included and is never there: thinking comes in the clear."""
        yield from super().without_effect()
        for i, name in enumerate(self.include or ()):
            if name != LOGPROBS:
                yield f"include[{i}]"
