"""The OpenAPI document of the HTTP face.

`openapi_operations` says what goes in and out of each route; the shapes come from the models that
requests are checked with, and from those that describe answers.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from importlib.metadata import version

import msgspec
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from ostro.cluster.access import ANY_KEY, OPEN, route_needs
from ostro.cluster.http_timing import ASKING_HEADER, TIMING_HEADER
from ostro.cluster.openapi_operations import OPERATIONS, Json, Operation

_COMPONENTS = "#/components/schemas/"
_REFUSALS = {
    400: "The request makes no sense or is not served; the error names the field",
    401: "There are API keys, and none that is good was shown",
    403: "The API key that was shown is not good for this",
    404: "There is no such model",
    408: "The body did not arrive in time",
    413: "The body is too large",
    422: "Fields of the body have a wrong type, or are unknown and `strict` was asked for",
    429: "Queues are full, or a quota is used up; the error's `param` names the quota",
    500: "The server failed",
    503: "The server is loading, draining or being mended",
    504: "A deadline passed",
}
_WORTH_A_RETRY = (429, 503)
_KEYS: Json = {
    "bearer": {"type": "http", "scheme": "bearer", "description": "Where there are API keys"},
    "header": {"type": "apiKey", "in": "header", "name": "x-api-key"},
}


def _header(description: str, kind: str = "string") -> Json:
    return {"description": description, "schema": {"type": kind}}


_REQUEST_ID: Json = {"x-request-id": _header("The caller's id of this request, or one made up")}
_ASKS_TIMING: Json = {
    "name": ASKING_HEADER,
    "in": "header",
    "description": "1: tell where the time went, in the header server-timing or a last comment",
    "schema": {"type": "string"},
}


@functools.cache
def document() -> bytes:
    """The document, as JSON."""
    paths: dict[str, Json] = {}
    for (method, path), operation in OPERATIONS.items():
        paths.setdefault(path, {})[method] = _operation_fields(method, path, operation)
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
            "components": {"schemas": _definitions(), "securitySchemes": _KEYS},
        }
    )


def _definitions() -> Json:
    """The schema of every model by its name; no two models have the same."""
    models = sorted(set(_models()), key=lambda model: model.__name__)
    _, definitions = models_json_schema(
        [(model, "validation") for model in models], ref_template=_COMPONENTS + "{model}"
    )
    schemas: Json = definitions["$defs"]
    return schemas


def _models() -> Iterator[type[BaseModel]]:
    for op in OPERATIONS.values():
        yield from (model for model in (op.body, op.answer, op.event, op.error) if model)


def _operation_fields(method: str, path: str, operation: Operation) -> Json:
    words = path.strip("/").replace(".", "/").replace("{", "").replace("}", "").split("/")
    fields: Json = {
        "summary": operation.summary,
        "operationId": "_".join([method, *words]),
        "responses": {
            "200": _answer(operation, has_body=method != "head"),
            **{
                str(status): _refusal(status, operation, has_body=method != "head")
                for status in _refusals_of(path, operation)
            },
        },
    }
    if (needs := route_needs(path)) is not None:
        # Without a requirement too: a deployment need not have keys.
        fields["security"] = [*({name: sorted(needs)} for name in _KEYS), {}]
    if "{name}" in path:
        place = {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}
        fields["parameters"] = [place]
    if operation.event is not None:
        fields["parameters"] = [_ASKS_TIMING]
    if operation.body is not None:
        fields["requestBody"] = {"required": True, "content": _body(operation.body, operation)}
    return fields


def _refusals_of(path: str, operation: Operation) -> list[int]:
    """What a route refuses by itself, and what its gate and its body's reader do before."""
    needs = route_needs(path)
    before = [] if needs is OPEN else [401] if needs == ANY_KEY else [401, 403]
    slow = [] if operation.body is None else [408]
    return sorted({*operation.refusals, *before, *slow})


def _body(model: type[BaseModel], operation: Operation) -> Json:
    examples = {"whole": {"value": operation.example}}
    if operation.event is not None:
        examples["stream"] = {"value": {**operation.example, "stream": True}}
    return {"application/json": {"schema": _reference(model), "examples": examples}}


def _answer(operation: Operation, *, has_body: bool) -> Json:
    headers = dict(_REQUEST_ID)
    if operation.body is not None:
        headers["x-ignored-fields"] = _header("Fields of the body that were not heeded")
    if operation.event is not None:
        headers[TIMING_HEADER] = _header(
            "Milliseconds by part, for those who asked; see the request"
        )
    answer: Json = {"description": "The answer", "headers": headers}
    if has_body:
        schema = {} if operation.answer is None else {"schema": _reference(operation.answer)}
        answer["content"] = {operation.media_type: schema, **_events(operation)}
    return answer


def _events(operation: Operation) -> Json:
    if operation.event is None:
        return {}
    data: Json = {
        "type": "string",
        "contentMediaType": "application/json",
        "contentSchema": _reference(operation.event),
    }
    if operation.ends_in_done:
        data = {"anyOf": [{"const": "[DONE]"}, data]}
    properties = {"event": {"type": "string"}, "data": data}
    item = {"type": "object", "required": ["data"], "properties": properties}
    return {"text/event-stream": {"itemSchema": item}}


def _refusal(status: int, operation: Operation, *, has_body: bool) -> Json:
    headers = dict(_REQUEST_ID)
    if status == 401:
        headers["www-authenticate"] = _header("How to show a key")
    if status in _WORTH_A_RETRY:
        headers["retry-after"] = _header("Seconds after which a retry is worth it", "integer")
    refusal: Json = {"description": _REFUSALS[status], "headers": headers}
    if has_body:
        refusal["content"] = {"application/json": {"schema": _reference(operation.error)}}
    return refusal


def _reference(model: type[BaseModel]) -> Json:
    return {"$ref": _COMPONENTS + model.__name__}
