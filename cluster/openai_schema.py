"""What HTTP callers may send: the request bodies of the OpenAI dialect, with Mistral's additions.

These models check types only; `openai_request` turns them into `generation` requests and says
which values make no sense or are not served. Unknown fields are kept, so that they can be named.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field


class Wire(BaseModel):
    """A JSON object from a caller: strict types, unknown fields kept for `unknown_fields`."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)

    def without_effect(self) -> Iterator[str]:
        """Paths in it of known fields whose value changes nothing, such as `reasoning.summary`."""
        return iter(())


class ImageUrl(Wire):
    """OpenAI's form of an image."""

    url: str
    detail: str | None = None

    def without_effect(self) -> Iterator[str]:
        """A detail that is asked for: it follows from the size of the image alone."""
        if self.detail not in (None, "auto"):
            yield "detail"


_FIELDS_OF_PART = {
    "text": {"text"},
    "refusal": {"refusal"},
    "thinking": {"thinking", "closed", "signature"},
    "image_url": {"image_url"},
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
        counted = _FIELDS_OF_PART.get(self.type, set())
        for name in type(self).model_fields:
            if name != "type" and name not in counted and getattr(self, name) is not None:
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
    parts of `content` instead.
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


ONLY_TIERS = (None, "auto", "default", "standard_only")  # names of the one service there is


class SamplingFields(Wire):
    """The fields that chat and text completions share."""

    model: str = ""
    request_id: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    strict: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    random_seed: int | None = None
    logit_bias: dict[str, float] | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    cache_salt: str | None = None
    prompt_cache_key: str | None = None
    priority: int | None = None
    queue_timeout: float | None = None
    return_token_ids: bool | None = None
    n: int | None = None
    best_of: int | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    prompt_logprobs: bool | int | None = None
    top_prompt_logprobs: int | None = None
    service_tier: str | None = None
    store: bool | None = None
    # Labels for the caller's own records: accepted and without effect on the answer.
    user: str | None = None
    metadata: dict[str, object] | None = None
    safety_identifier: str | None = None

    def without_effect(self) -> Iterator[str]:
        """What only streams know, a second key of the cache, a service that is not offered."""
        if self.stream_options is not None and not self.stream:
            yield "stream_options"
        if self.cache_salt and self.prompt_cache_key:
            yield "prompt_cache_key"
        if self.service_tier not in ONLY_TIERS:
            yield "service_tier"


class ChatCompletionRequest(SamplingFields):
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
    prediction: dict[str, object] | None = None
    modalities: list[str] | None = None


class CompletionRequest(SamplingFields):
    """Body of POST /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: int | None = None
    echo: bool | None = None
    suffix: str | None = None


class TokenizeBody(Wire):
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


class DetokenizeBody(Wire):
    """Body of POST /detokenize."""

    model: str = ""
    tokens: list[int]


class ControlBody(Wire):
    """Body of POST /v1/chat/completions/control."""

    id: str
    action: Literal["reasoning_end", "cancel"]


def unknown_fields(body: Wire) -> Iterator[str]:
    """Paths of the fields that no model declares, such as `messages[0].mood`; null asks nothing."""
    for path, part in _objects(body):
        yield from (
            path + name for name, value in (part.model_extra or {}).items() if value is not None
        )


def fields_without_effect(body: Wire) -> Iterator[str]:
    """Paths of the declared fields whose value changes nothing, such as `messages[0].name`."""
    for path, part in _objects(body):
        yield from (path + name for name in part.without_effect())


def _objects(body: Wire, path: str = "") -> Iterator[tuple[str, Wire]]:
    """The body and every object in it, each with what its fields' paths begin with."""
    yield path, body
    for name in type(body).model_fields:
        value = getattr(body, name)
        if isinstance(value, Wire):
            yield from _objects(value, f"{path}{name}.")
        elif isinstance(value, list):
            for i, item in enumerate(value):
                if isinstance(item, Wire):
                    yield from _objects(item, f"{path}{name}[{i}].")
