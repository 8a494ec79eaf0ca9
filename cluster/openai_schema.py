"""What HTTP callers may send: the request bodies of the OpenAI dialect, with Mistral's additions.

These models check types only; `openai_request` turns them into `generation` requests and says
which values make no sense or are not served. Unknown fields are kept, so that they can be named.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from ostro.cluster.wire_schema import RequestBody, SamplingFields, Wire


class ImageUrl(Wire):
    """OpenAI's form of an image."""

    url: str
    detail: str | None = None

    def without_effect(self) -> Iterator[str]:
        """A detail that is asked for: it follows from the size of the image alone."""
        if self.detail not in (None, "auto"):
            yield "detail"


_FIELDS_OF_PART = {
    "text": {"type", "text"},
    "refusal": {"type", "refusal"},
    "thinking": {"type", "thinking", "closed", "signature"},
    "image_url": {"type", "image_url"},
}


class Part(Wire):
    """One part of a message's content; which fields count depends on `type`."""

    type: str
    text: str | None = None
    refusal: str | None = None
    thinking: list[Part] | str | None = None
    closed: bool | None = None
    signature: str | None = None
    image_url: str | ImageUrl | None = None

    def without_effect(self) -> Iterator[str]:
        """What belongs to a part of another type."""
        counted = _FIELDS_OF_PART.get(self.type, {"type"})
        for name, value in vars(self).items():
            if value is not None and name not in counted:
                yield name


class FunctionCall(Wire):
    """Name and arguments of a call; Mistral clients may send the arguments as an object."""

    name: str
    arguments: str | dict[str, object] = ""


class ToolCallIn(Wire):
    """A tool call that an earlier answer made."""

    id: str
    function: FunctionCall
    type: str = "function"
    index: int | None = None


_ROLE_OF_FIELD = {
    "reasoning": "assistant",
    "reasoning_content": "assistant",
    "tool_calls": "assistant",
    "refusal": "assistant",
    "tool_call_id": "tool",
    "name": "tool",
}


class Message(Wire):
    """One message; `reasoning` and `reasoning_content` are two names of one thing.

    An assistant's `refusal` is its text if there is no other, and its thinking may stand among the
    parts of `content` instead. A tool's `name` is a label: its call says it.
    """

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part] | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCallIn] | None = None
    tool_call_id: str | None = None
    name: str | None = None
    refusal: str | None = None
    prefix: bool | None = None

    def without_effect(self) -> Iterator[str]:
        """What belongs to a message of another role, and what is said already in another place."""
        for name, role in _ROLE_OF_FIELD.items():
            if getattr(self, name) and (role != self.role or self._is_said_elsewhere(name)):
                yield name

    def _is_said_elsewhere(self, name: str) -> bool:
        if name == "refusal":
            return bool(self.content)
        if name not in ("reasoning", "reasoning_content"):
            return False
        if isinstance(self.content, list) and any(part.type == "thinking" for part in self.content):
            return True
        # Our own answers give it under both names.
        return name == "reasoning" and self.reasoning_content not in (None, "", self.reasoning)


class FunctionIn(Wire):
    """A function on offer."""

    name: str
    description: str | None = None
    parameters: dict[str, object] | None = None
    strict: bool | None = None


class ToolIn(Wire):
    """A tool on offer."""

    type: str = "function"
    function: FunctionIn | None = None


class StreamOptions(Wire):
    """How usage is told in a stream."""

    include_usage: bool | None = None


class JsonSchemaFormat(Wire):
    """A schema for the answer; it is held to it whatever `strict` says."""

    name: str | None = None
    description: str | None = None
    schema_: Annotated[dict[str, object] | None, Field(alias="schema")] = None
    strict: bool | None = None


class ResponseFormat(Wire):
    """The form of the answer: `text`, `json_object` or `json_schema`."""

    type: str
    json_schema: JsonSchemaFormat | None = None


class StructuredOutputs(Wire):
    """vLLM's forms of the answer; one of them."""

    # `json` is a name that pydantic's models have already.
    json_: Annotated[str | dict[str, object] | None, Field(alias="json")] = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None


class Prediction(Wire):
    """What the answer will mostly be, such as a file that it edits.

    The answer comes sooner, never differently. `content` is text, or parts of it.
    """

    type: Literal["content"] = "content"
    content: str | list[Part] | None = None


class CompletionFields(SamplingFields):
    """The fields that chat and text completions share."""

    model: str = ""
    stream_options: StreamOptions | None = None
    random_seed: int | None = None
    logit_bias: dict[str, float] | None = None
    max_tokens: int | None = None
    stop_token_ids: list[int] | None = None
    return_token_ids: bool | None = None
    n: int | None = None
    best_of: int | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    prompt_logprobs: bool | int | None = None
    top_prompt_logprobs: int | None = None
    metadata: dict[str, object] | None = None  # a label, as `user` is

    def without_effect(self) -> Iterator[str]:
        """Also what only streams know."""
        yield from super().without_effect()
        if self.stream_options is not None and not self.stream:
            yield "stream_options"


class ChatCompletionRequest(CompletionFields):
    """Body of POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    tools: list[ToolIn] | None = None
    tool_choice: str | dict[str, object] | None = None
    parallel_tool_calls: bool | None = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    reasoning_effort: str | None = None
    reasoning_format: Literal["fields", "chunks", "none"] | None = None
    thinking_token_budget: int | None = None
    continue_final_message: bool | None = None
    prompt_mode: str | None = None
    safe_prompt: bool | None = None
    guardrails: list[object] | None = None
    prediction: Prediction | None = None
    modalities: list[str] | None = None


class CompletionRequest(CompletionFields):
    """Body of POST /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: int | None = None
    echo: bool | None = None
    suffix: str | None = None


class TokenizeBody(RequestBody):
    """Body of POST /tokenize: a text, or a conversation as it would be prompted."""

    model: str = ""
    prompt: str | None = None
    messages: list[Message] | None = None
    tools: list[ToolIn] | None = None
    reasoning_effort: str | None = None
    add_special_tokens: bool = True

    def without_effect(self) -> Iterator[str]:
        """What belongs to the other of its two forms."""
        if self.messages is None:
            yield from (name for name in ("tools", "reasoning_effort") if getattr(self, name))
        elif not self.add_special_tokens:
            yield "add_special_tokens"


class DetokenizeBody(RequestBody):
    """Body of POST /detokenize."""

    model: str = ""
    tokens: list[int]


class ControlBody(RequestBody):
    """Body of POST /v1/chat/completions/control."""

    id: str
    action: Literal["reasoning_end", "cancel"]
