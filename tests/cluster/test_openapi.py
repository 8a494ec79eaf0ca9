"""The OpenAPI document: complete, and true of what the server does."""

from __future__ import annotations

import json
import re

import documented
import httpx
import hypothesis
import pytest
from http_face import face
from schemathesis.checks import not_a_server_error
from scripted_frontend import (
    CALL,
    FINISHED,
    MODEL,
    STARTED,
    WITH_LOGPROBS,
    ScriptedFrontend,
)
from starlette.routing import Route

from ostro.actors.errors import DeadlineError, NotReadyError, OverloadedError, ShardLostError
from ostro.cluster.generation import TextDelta
from ostro.cluster.http_ingress import build_http_app
from ostro.cluster.metrics import Metrics
from ostro.cluster.openapi import document
from ostro.configs.deployment import ServingConfig

SCRIPT = (STARTED, TextDelta(text="Hm.", thinking=True), *WITH_LOGPROBS[1:-1], CALL, FINISHED)
API = documented.api(paths="^/(?!mistral/)")  # which has the same routes once more
WHOLE_API = documented.api(coverage=True)
DOCUMENT = json.loads(document())
# Path, example and body of every route that generates, whole and streamed.
GENERATING = [
    pytest.param(path, example["value"], id=f"{path}-{name}")
    for path, operations in DOCUMENT["paths"].items()
    if "504" in operations.get("post", {}).get("responses", {}) and "mistral" not in path
    for name, example in operations["post"]["requestBody"]["content"]["application/json"][
        "examples"
    ].items()
]


# What brings more fields into an answer.
MORE = {
    "/v1/chat/completions": {"logprobs": True, "top_logprobs": 2, "return_token_ids": True},
    "/v1/completions": {"logprobs": 2, "return_token_ids": True},
    "/v1/responses": {"include": ["message.output_text.logprobs"], "top_logprobs": 2},
}


@pytest.fixture(scope="module")
def url():
    with face(ScriptedFrontend(*SCRIPT)) as http:
        yield str(http.base_url)


def test_every_route_is_documented_and_no_other():
    app = build_http_app(lambda: None, ServingConfig(), Metrics(MODEL))
    routes = {
        (method.lower(), re.sub(r"{(\w+):path}", r"{\1}", route.path))
        for route in app.routes
        if isinstance(route, Route)
        for method in route.methods
    }
    documented_routes = {
        (method, path) for path, operations in DOCUMENT["paths"].items() for method in operations
    }
    assert routes == documented_routes


def test_no_two_models_have_one_name():
    assert [name for name in DOCUMENT["components"]["schemas"] if "__" in name] == []


def test_the_document_is_served(url):
    assert httpx.get(f"{url}/openapi.json").json() == DOCUMENT


@API.parametrize()
@hypothesis.settings(max_examples=24, derandomize=True, database=None)
def test_what_is_asked_at_random_is_answered_as_documented(case, url):
    documented.check(case, url, MODEL)


@pytest.mark.slow
@WHOLE_API.parametrize()
@hypothesis.settings(max_examples=100, database=None)
def test_whatever_is_asked_is_answered_as_documented(case, url):
    documented.check(case, url, MODEL)


@pytest.mark.parametrize(("path", "body"), GENERATING)
def test_the_examples_are_answered(path, body, url):
    case = API[path]["POST"].Case(body=dict(body), media_type="application/json")
    answer = documented.check(case, url, MODEL, **MORE.get(path, {}))
    assert answer.status_code == 200


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (OverloadedError("full"), 429),
        (NotReadyError("loading"), 503),
        (DeadlineError("late"), 504),
        (RuntimeError("a bug"), 500),
    ],
)
@pytest.mark.parametrize(("path", "body"), GENERATING)
def test_failures_are_told_as_documented(path, body, error, status):
    case = API[path]["POST"].Case(body=dict(body), media_type="application/json")
    with face(ScriptedFrontend(error)) as http:
        answer = documented.check(case, str(http.base_url), MODEL, excluded=(not_a_server_error,))
    assert answer.status_code == status


@pytest.mark.parametrize(
    ("path", "body"), [case for case in GENERATING if case.values[1].get("stream")]
)
def test_a_stream_that_fails_does_so_as_documented(path, body):
    case = API[path]["POST"].Case(body=dict(body), media_type="application/json")
    with face(ScriptedFrontend(*SCRIPT[:-1], ShardLostError("lost"))) as http:
        answer = documented.check(case, str(http.base_url), MODEL)
    assert b"lost" in answer.content
