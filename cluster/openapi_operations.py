"""What goes in and out of every route of the HTTP face.

Routes take raw requests, so nothing of it can be read off their signatures. A test holds this table
against the routes there are.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from pydantic import BaseModel

from ostro.cluster import openapi_answers as answers
from ostro.cluster import openapi_chat as chat
from ostro.cluster import openapi_messages as messages
from ostro.cluster import openapi_responses as responses
from ostro.cluster.http_routes import V1
from ostro.cluster.messages_schema import CountTokensRequest, MessagesRequest
from ostro.cluster.openai_schema import (
    ChatCompletionRequest,
    CompletionRequest,
    ControlBody,
    DetokenizeBody,
    TokenizeBody,
)
from ostro.cluster.responses_schema import InputTokensRequest, ResponsesRequest
from ostro.cluster.wire_schema import RequestBody

Json = dict[str, object]

_STEERING = (400, 413, 422, 500, 503)
_COUNTING = (400, 404, 413, 422, 500, 503)
_GENERATING = (400, 404, 413, 422, 429, 500, 503, 504)
_ASKING = (500, 503)


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """What goes in and out of one route.

    Attributes:
        example: A body, for readers to begin with.
        event: One event of the answer as a stream, where there is such a form.
        ends_in_done: Such a stream ends in an event `[DONE]`.
        media_type: Of an answer that is not JSON; it has no model.
        refusals: Statuses that errors have.
    """

    summary: str
    answer: type[BaseModel] | None = None
    body: type[RequestBody] | None = None
    example: Json = field(default_factory=dict)
    event: type[BaseModel] | None = None
    ends_in_done: bool = False
    media_type: str = "application/json"
    refusals: tuple[int, ...] = _ASKING
    error: type[BaseModel] = answers.Error


_QUESTION: Json = {"role": "user", "content": "What is 38 + 45 + 61?"}
_ASKED: Json = {"messages": [_QUESTION], "max_tokens": 256}
_CHAT = Operation(
    summary="One assistant turn of a conversation",
    body=ChatCompletionRequest,
    example={**_ASKED, "reasoning_effort": "high"},
    answer=chat.ChatCompletion,
    event=chat.ChatCompletionChunk,
    ends_in_done=True,
    refusals=_GENERATING,
)
_COMPLETION = Operation(
    summary="A raw continuation of a text or of token ids",
    body=CompletionRequest,
    example={"prompt": "Once upon a time", "max_tokens": 64},
    answer=chat.Completion,
    event=chat.Completion,
    ends_in_done=True,
    refusals=_GENERATING,
)
_CONTROL = Operation(
    summary="End the thinking of a running generation, or cancel it",
    body=ControlBody,
    example={"id": "3f0c", "action": "reasoning_end"},
    answer=answers.ControlResult,
    refusals=_STEERING,
)
_RESPONSE = Operation(
    summary="One assistant turn, in the Responses dialect, without memory",
    body=ResponsesRequest,
    example={"input": "What is 38 + 45 + 61?", "reasoning": {"effort": "high"}},
    answer=responses.ResponseAnswer,
    event=responses.ResponseEvent,
    refusals=_GENERATING,
)
_INPUT_TOKENS = Operation(
    summary="How long the prompt of a response would be",
    body=InputTokensRequest,
    example={"input": "What is 38 + 45 + 61?"},
    answer=responses.InputTokens,
    refusals=_COUNTING,
)
_MODELS = Operation(summary="The served models", answer=answers.ModelList)
_MODEL = Operation(
    summary="A served model by its name", answer=answers.Model, refusals=(404, *_ASKING)
)
OPERATIONS: dict[tuple[str, str], Operation] = {
    **{
        (method, prefix + path): operation
        for prefix in V1
        for method, path, operation in (
            ("post", "/chat/completions", _CHAT),
            ("post", "/completions", _COMPLETION),
            ("post", "/chat/completions/control", _CONTROL),
            ("post", "/responses", _RESPONSE),
            ("post", "/responses/input_tokens", _INPUT_TOKENS),
            ("get", "/models", _MODELS),
            ("get", "/models/{name}", _MODEL),
        )
    },
    ("post", "/v1/messages"): Operation(
        summary="One assistant turn, in the Anthropic dialect",
        body=MessagesRequest,
        example={**_ASKED, "model": "", "thinking": {"type": "adaptive"}},
        answer=messages.MessageAnswer,
        event=messages.MessageEvent,
        refusals=_GENERATING,
        error=messages.MessageError,
    ),
    ("post", "/v1/messages/count_tokens"): Operation(
        summary="How long the prompt of a message would be",
        body=CountTokensRequest,
        example={"model": "", "messages": [_QUESTION]},
        answer=messages.TokenCount,
        refusals=_COUNTING,
        error=messages.MessageError,
    ),
    ("post", "/tokenize"): Operation(
        summary="Token ids of a text, or of a conversation as it would be prompted",
        body=TokenizeBody,
        example={"messages": [_QUESTION]},
        answer=answers.Tokens,
        refusals=_COUNTING,
    ),
    ("post", "/detokenize"): Operation(
        summary="The text of token ids",
        body=DetokenizeBody,
        example={"tokens": [72, 105]},
        answer=answers.Text,
        refusals=_COUNTING,
    ),
    **{
        (method, path): Operation(
            summary=summary, answer=answers.Health if method == "get" else None, refusals=refusals
        )
        for method in ("get", "head")
        for path, summary, refusals in (
            ("/health", "Whether requests are taken", _ASKING),
            ("/ready", "Whether requests are taken", _ASKING),
            ("/live", "Whether the server runs", ()),
        )
    },
    ("get", "/metrics"): Operation(
        summary="Counters and times, for Prometheus", media_type="text/plain", refusals=(500,)
    ),
    ("get", "/openapi.json"): Operation(summary="This document", refusals=(500,)),
}
