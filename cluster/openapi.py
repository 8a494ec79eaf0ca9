"""The OpenAPI document of the HTTP face.

Routes take raw requests, so nothing of it can be read off their signatures: `_OPERATIONS` says
what goes in and out of each. The shapes come from the models that requests are checked with, and
from those of `openapi_answers`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version

import msgspec
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from ostro.cluster import openapi_answers as answers
from ostro.cluster.messages_schema import CountTokensRequest, MessagesRequest
from ostro.cluster.openai_schema import (
    ChatCompletionRequest,
    CompletionRequest,
    ControlBody,
    DetokenizeBody,
    TokenizeBody,
    Wire,
)

Json = dict[str, object]

_REFUSALS = {
    400: "The request makes no sense or is not served; the error names the field",
    404: "There is no such model",
    413: "The body is too large",
    422: "Fields of the body have a wrong type, or are unknown and `strict` was asked for",
    429: "Queues are full",
    500: "The server failed",
    503: "The server is loading, draining or being mended",
    504: "A deadline passed",
}
_WORTH_A_RETRY = (429, 503)
_READING = (400, 413, 422, 500, 503)
_GENERATING = (400, 404, 413, 422, 429, 500, 503, 504)
_ASKING = (500, 503)


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """What goes in and out of one route.

    Attributes:
        event: One event of the answer as a stream, where there is such a form.
        media_type: Of an answer that is not JSON; it has no model.
        refusals: Statuses that errors have.
    """

    summary: str
    answer: type[BaseModel] | None = None
    body: type[Wire] | None = None
    event: type[BaseModel] | None = None
    media_type: str = "application/json"
    refusals: tuple[int, ...] = _ASKING
    error: type[BaseModel] = answers.Error


_CHAT = Operation(
    summary="One assistant turn of a conversation",
    body=ChatCompletionRequest,
    answer=answers.ChatCompletion,
    event=answers.ChatCompletionChunk,
    refusals=_GENERATING,
)
_COMPLETION = Operation(
    summary="A raw continuation of a text or of token ids",
    body=CompletionRequest,
    answer=answers.Completion,
    event=answers.Completion,
    refusals=_GENERATING,
)
_CONTROL = Operation(
    summary="End the thinking of a running generation, or cancel it",
    body=ControlBody,
    answer=answers.ControlResult,
    refusals=_READING,
)
_MODELS = Operation(summary="The served models", answer=answers.ModelList)
_MODEL = Operation(
    summary="A served model by its name", answer=answers.Model, refusals=(404, *_ASKING)
)
_OPERATIONS: dict[tuple[str, str], Operation] = {
    **{
        (method, prefix + path): operation
        for prefix in ("/v1", "/mistral/v1")
        for method, path, operation in (
            ("post", "/chat/completions", _CHAT),
            ("post", "/completions", _COMPLETION),
            ("post", "/chat/completions/control", _CONTROL),
            ("get", "/models", _MODELS),
            ("get", "/models/{name}", _MODEL),
        )
    },
    ("post", "/v1/messages"): Operation(
        summary="One assistant turn, in the Anthropic dialect",
        body=MessagesRequest,
        answer=answers.MessageAnswer,
        event=answers.MessageEvent,
        refusals=_GENERATING,
        error=answers.MessageError,
    ),
    ("post", "/v1/messages/count_tokens"): Operation(
        summary="How long the prompt of a message would be",
        body=CountTokensRequest,
        answer=answers.TokenCount,
        refusals=(404, *_READING),
        error=answers.MessageError,
    ),
    ("post", "/tokenize"): Operation(
        summary="Token ids of a text, or of a conversation as it would be prompted",
        body=TokenizeBody,
        answer=answers.Tokens,
        refusals=_READING,
    ),
    ("post", "/detokenize"): Operation(
        summary="The text of token ids",
        body=DetokenizeBody,
        answer=answers.Text,
        refusals=_READING,
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


@functools.cache
def document() -> bytes:
    """The document, as JSON."""
    schemas = _schemas()
    paths: dict[str, Json] = {}
    for (method, path), operation in _OPERATIONS.items():
        paths.setdefault(path, {})[method] = _operation_fields(method, path, operation, schemas)
    return msgspec.json.encode(
        {
            "openapi": "3.2.0",  # the first that can describe the events of a stream
            "info": {
                "title": "Ostro",
                "version": version("ostro"),
                "description": "A serving cluster for Mistral Small 4. Unknown fields of a body "
                "are named in `x-ignored-fields`, or refused where `strict` is true.",
            },
            "paths": paths,
            "components": {"schemas": schemas.definitions},
        }
    )


@dataclass(frozen=True, slots=True)
class _Schemas:
    """Every model's schema, and how to name it."""

    references: Mapping[type[BaseModel], Json]
    definitions: Json

    def content(self, model: type[BaseModel]) -> Json:
        return {"application/json": {"schema": self.references[model]}}

    def events(self, model: type[BaseModel]) -> Json:
        data = {
            "type": "string",
            "contentMediaType": "application/json",
            "contentSchema": self.references[model],
        }
        properties = {"event": {"type": "string"}, "data": data}
        item = {"type": "object", "required": ["data"], "properties": properties}
        return {"text/event-stream": {"itemSchema": item}}


def _schemas() -> _Schemas:
    bodies = {op.body for op in _OPERATIONS.values() if op.body is not None}
    models = sorted({*bodies, *_answer_models()}, key=lambda model: model.__name__)
    schemas, definitions = models_json_schema(
        [(model, "validation") for model in models], ref_template="#/components/schemas/{model}"
    )
    references = {model: schemas[(model, "validation")] for model in models}
    return _Schemas(references, definitions["$defs"])


def _answer_models() -> Iterator[type[BaseModel]]:
    for operation in _OPERATIONS.values():
        yield from filter(None, (operation.answer, operation.event, operation.error))


def _operation_fields(method: str, path: str, operation: Operation, schemas: _Schemas) -> Json:
    fields: Json = {
        "summary": operation.summary,
        "operationId": "_".join([method, *path.strip("/").replace(".", "/").split("/")]),
        "responses": _responses(operation, schemas, has_body=method != "head"),
    }
    if "{name}" in path:
        place = {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}
        fields["parameters"] = [place]
    if operation.body is not None:
        fields["requestBody"] = {"required": True, "content": schemas.content(operation.body)}
    return fields


def _responses(operation: Operation, schemas: _Schemas, *, has_body: bool) -> Json:
    headers: Json = {"x-request-id": _header("The caller's id of this request, or one made up")}
    answer: Json = {"description": "The answer", "headers": dict(headers)}
    if operation.body is not None:
        answer["headers"] = {
            **headers,
            "x-ignored-fields": _header("Fields of the body that were not heeded"),
        }
    if operation.answer is not None:
        events = {} if operation.event is None else schemas.events(operation.event)
        answer["content"] = {**schemas.content(operation.answer), **events}
    elif has_body:
        answer["content"] = {operation.media_type: {}}
    responses: Json = {"200": answer}
    for status in operation.refusals:
        refusal: Json = {"description": _REFUSALS[status], "headers": dict(headers)}
        if status in _WORTH_A_RETRY:
            after = _header("Seconds after which a retry is worth its while", "integer")
            refusal["headers"] = {**headers, "retry-after": after}
        if has_body:
            refusal["content"] = schemas.content(operation.error)
        responses[str(status)] = refusal
    return responses


def _header(description: str, kind: str = "string") -> Json:
    return {"description": description, "schema": {"type": kind}}
