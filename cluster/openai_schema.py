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
        """Paths of known fields whose value changes nothing, such as `reasoning.summary`."""
        return iter(())


class ImageUrl(Wire):
    """OpenAI's form of an image; `detail` is accepted and without effect."""

    url: str
    detail: str | None = None


class Part(Wire):
    """One part of a message's content; which fields count depends on `type`."""

    type: str
    text: str | None = None
    thinking: list[Part] | str | None = None
    closed: bool | None = None
    signature: str | None = None
    image_url: str | ImageUrl | None = None


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


class Message(Wire):
    """One message; `reasoning` and `reasoning_content` are two names of one thing."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part] | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCallIn] | None = None
    tool_call_id: str | None = None
    name: str | None = None
    refusal: str | None = None
    prefix: bool | None = None


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
    # Accepted and without effect on the answer.
    user: str | None = None
    metadata: dict[str, object] | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    store: bool | None = None


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


class DetokenizeBody(Wire):
    """Body of POST /detokenize."""

    model: str = ""
    tokens: list[int]


class ControlBody(Wire):
    """Body of POST /v1/chat/completions/control."""

    id: str
    action: Literal["reasoning_end", "cancel"]


def unknown_fields(body: Wire, path: str = "") -> Iterator[str]:
    """Paths of the fields that no model declares, such as `messages[0].mood`."""
    for name in body.model_extra or ():
        yield path + name
    for name in type(body).model_fields:
        value = getattr(body, name)
        if isinstance(value, Wire):
            yield from unknown_fields(value, f"{path}{name}.")
        elif isinstance(value, list):
            for i, item in enumerate(value):
                if isinstance(item, Wire):
                    yield from unknown_fields(item, f"{path}{name}[{i}].")
