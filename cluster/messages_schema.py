"""What callers of the Anthropic dialect may send: the bodies of /v1/messages and its token count.

These models check types only; `messages_request` turns them into `generation` requests and says
which values make no sense or are not served. Unknown fields are kept, so that they can be named.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from ostro.cluster.wire_schema import RequestBody, Wire


class ImageSource(Wire):
    """Where an image is: `data` with type "base64", a data URI or an https URL with "url"."""

    type: str
    media_type: str | None = None
    data: str | None = None
    url: str | None = None


class Block(Wire):
    """One block of a message's content; which fields count depends on `type`."""

    type: str
    text: str | None = None
    source: ImageSource | None = None
    thinking: str | None = None
    signature: str | None = None
    data: str | None = None
    id: str | None = None
    name: str | None = None
    input: dict[str, object] | None = None
    tool_use_id: str | None = None
    content: str | list[Block] | None = None
    is_error: bool | None = None
    # Accepted and without effect: prefixes are cached by themselves.
    cache_control: dict[str, object] | None = None


class MessageIn(Wire):
    """One message of the conversation."""

    role: Literal["user", "assistant", "system"]
    content: str | list[Block]


class CustomTool(Wire):
    """A tool on offer; those of another `type` than "custom" are Anthropic's own."""

    name: str
    type: str | None = None
    description: str | None = None
    input_schema: dict[str, object] | None = None
    strict: bool | None = None
    # Accepted and without effect: prefixes are cached by themselves, and calls come whole.
    cache_control: dict[str, object] | None = None
    eager_input_streaming: bool | None = None


class ToolChoiceIn(Wire):
    """Which tools may or must be called; `name` goes with type "tool"."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(Wire):
    """Whether to think, and how long; `budget_tokens` goes with type "enabled"."""

    type: Literal["enabled", "adaptive", "disabled"]
    budget_tokens: int | None = None
    display: Literal["summarized", "omitted"] | None = None

    def without_effect(self) -> Iterator[str]:
        """A budget that belongs to another type, how to show thinking that there is none of."""
        if self.budget_tokens is not None and self.type != "enabled":
            yield "budget_tokens"
        if self.display == "summarized" or (self.display and self.type == "disabled"):
            yield "display"


class JsonFormat(Wire):
    """The JSON Schema that an answer must have."""

    type: Literal["json_schema"]
    schema_: dict[str, object] = Field(alias="schema")


class OutputConfig(Wire):
    """How much effort goes into an answer, and its form."""

    effort: str | None = None
    format: JsonFormat | None = None


class Metadata(Wire):
    """About the caller; accepted and without effect."""

    user_id: str | None = None


class CountTokensRequest(RequestBody):
    """Body of POST /v1/messages/count_tokens: what makes a prompt."""

    model: str
    messages: Annotated[list[MessageIn], Field(min_length=1)]
    system: str | list[Block] | None = None
    tools: list[CustomTool] | None = None
    tool_choice: ToolChoiceIn | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    # Accepted and without effect.
    cache_control: dict[str, object] | None = None

    def without_effect(self) -> Iterator[str]:
        """An effort without thinking, and thinking that another server has sealed."""
        never_thinks = self.thinking is not None and self.thinking.type == "disabled"
        effort = None if self.output_config is None else self.output_config.effort
        if never_thinks and effort not in (None, "none"):
            yield "output_config.effort"
        for i, message in enumerate(self.messages):
            blocks = message.content if isinstance(message.content, list) else ()
            for j, block in enumerate(blocks):
                if message.role == "assistant" and block.type == "redacted_thinking":
                    yield f"messages[{i}].content[{j}]"


class MessagesRequest(CountTokensRequest):
    """Body of POST /v1/messages."""

    max_tokens: int
    stream: bool | None = None
    stop_sequences: list[str] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    # Accepted and without effect.
    metadata: Metadata | None = None
    service_tier: str | None = None
