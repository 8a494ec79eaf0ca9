"""Answers of the OpenAI dialect's chat and text completions, as the OpenAPI document has them.

None as a default: the field may be absent; None without one: it may be null.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel

from ostro.cluster.openapi_answers import ErrorFields


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
    """What completion tokens were for, and what became of a prediction that was heeded.

    Tokens of the prediction that the answer had are among the completion tokens; those that it had
    not are rejected, and are no tokens of the completion: nobody pays for them.
    """

    reasoning_tokens: int
    accepted_prediction_tokens: int | None = None
    rejected_prediction_tokens: int | None = None


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
