"""The answers of the HTTP face, as its OpenAPI document describes them.

Nothing is built from these models: answers are written by hand for speed. Tests hold every answer
against them. None as a default: the field may be absent; None without one: it may be null.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, Field


class Reasoning(BaseModel):
    """What the server made of the asked effort; `budget` null is unlimited."""

    effort: str
    budget: int | None
    tokens: int | None = None
    ended_by: Literal["model", "budget", "caller"] | None = None


class PromptTokensDetails(BaseModel):
    """Where prompt tokens came from."""

    cached_tokens: int
    image_tokens: int


class CompletionTokensDetails(BaseModel):
    """What completion tokens were for."""

    reasoning_tokens: int


class Usage(BaseModel):
    """Token counts of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails
    num_cached_tokens: int


class TokenLogprob(BaseModel):
    """A token and its logarithmic probability."""

    token: str
    token_id: int
    logprob: float
    bytes: list[int]


class ChosenLogprob(TokenLogprob):
    """The token that was chosen, and the likeliest ones in its place."""

    top_logprobs: list[TokenLogprob]


class ChatLogprobs(BaseModel):
    """Logprobs of the text of a choice."""

    content: list[ChosenLogprob]
    refusal: None


class TextLogprobs(BaseModel):
    """Logprobs of a text completion."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class FunctionCalled(BaseModel):
    """Name and arguments, a JSON object as text."""

    name: str
    arguments: str


class ToolCalled(BaseModel):
    """A whole tool call."""

    index: int
    id: str
    type: Literal["function"]
    function: FunctionCalled


class ContentChunk(BaseModel):
    """A piece of content in Mistral's form: `text`, or `thinking` made of texts."""

    type: Literal["text", "thinking"]
    text: str | None = None
    thinking: list[ContentChunk] | None = None
    closed: bool | None = None


class AssistantMessage(BaseModel):
    """The answer; thinking is in two fields of one meaning, or among the chunks of `content`."""

    role: Literal["assistant"]
    content: str | list[ContentChunk] | None
    refusal: None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[ToolCalled] | None = None


class ChatChoice(BaseModel):
    """One answer to a conversation."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: str
    stop_reason: str | int | None
    token_ids: list[int] | None = None


class ChatCompletion(BaseModel):
    """Answer of POST /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    reasoning: Reasoning | None = None


class AssistantDelta(BaseModel):
    """What is to be appended to the answer."""

    role: Literal["assistant"] | None = None
    content: str | list[ContentChunk] | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[ToolCalled] | None = None


class ChatChunkChoice(BaseModel):
    """News of one choice; `finish_reason` is set in its last chunk."""

    index: int
    delta: AssistantDelta
    finish_reason: str | None
    stop_reason: str | int | None = None
    logprobs: ChatLogprobs | None = None
    token_ids: list[int] | None = None


class ChatCompletionChunk(BaseModel):
    """One event of a streamed chat completion; `error` stands in the last one of a failed stream.

    The stream ends with the event `[DONE]`.
    """

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
    reasoning: Reasoning | None = None
    error: ErrorFields | None = None


class TextChoice(BaseModel):
    """One continuation of a prompt; in a stream, news of it."""

    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: str | None
    stop_reason: str | int | None = None
    token_ids: list[int] | None = None


class Completion(BaseModel):
    """Answer of POST /v1/completions, and one event of it streamed; that ends with `[DONE]`."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage | None = None
    reasoning: Reasoning | None = None
    error: ErrorFields | None = None


class ControlResult(BaseModel):
    """`applied` is false where no generation of that id runs."""

    id: str
    action: Literal["reasoning_end", "cancel"]
    applied: bool


class Capabilities(BaseModel):
    """What the model can do."""

    completion_chat: bool
    function_calling: bool
    reasoning: bool
    vision: bool
    completion_fim: bool
    fine_tuning: bool


class Model(BaseModel):
    """The served model."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    type: str
    name: str
    description: str
    capabilities: Capabilities
    max_context_length: int
    max_model_len: int
    aliases: list[str]
    reasoning_efforts: list[str]
    default_reasoning_effort: str


class ModelList(BaseModel):
    """All served models: one."""

    object: Literal["list"]
    data: list[Model]


class Tokens(BaseModel):
    """Token ids of a text or a conversation."""

    count: int
    max_model_len: int
    tokens: list[int]


class Text(BaseModel):
    """The text of token ids."""

    prompt: str


class Health(BaseModel):
    """Of a server that is well."""

    status: Literal["ready", "live"]


class ErrorFields(BaseModel):
    """What went wrong: a message for people, a code for programs, the field at fault."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorDetail(BaseModel):
    """One field that broke the schema of the body."""

    type: str
    loc: list[str | int]
    msg: str
    input: object


class Error(ErrorFields):
    """A refusal or a failure; `detail` comes with status 422 alone."""

    object: Literal["error"]
    error: ErrorFields
    detail: list[ErrorDetail] | None = None


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
