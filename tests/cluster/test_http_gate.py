"""Who gets in over HTTP: every route, every scope, and what the audit log says of it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import socket

import anthropic
import httpx
import mistralai.client as mistral
import openai
import pytest
from door_keys import (
    ADMIN,
    CONTROL,
    COUNTED,
    EXPIRED,
    GENERATE,
    LIMITED,
    MAX_TOKENS,
    OBSERVE,
    bearer,
    key_id,
    make_door,
)
from fastapi.routing import APIRoute
from scripted_frontend import MODEL, THOUGHTFUL, ScriptedFrontend, served
from wait_for import wait_for

from ostro.actors.errors import QuotaError, SpentQuotaError
from ostro.cluster.audit import AuditLog
from ostro.cluster.door import Door
from ostro.cluster.http_ingress import build_http_app
from ostro.cluster.key_ring import KeyRing
from ostro.cluster.metrics import Metrics
from ostro.configs.deployment import ServingConfig
from ostro.configs.security import SecurityConfig

HELLO = [{"role": "user", "content": "Say hello."}]
CHAT = {"model": MODEL, "messages": HELLO}
CHAT_PATH = "/v1/chat/completions"
CONTROL_PATH = "/v1/chat/completions/control"
OPEN_PATHS = {"/health", "/live", "/ready"}
ANY_KEY_PATHS = {"/openapi.json", "/v1/models", "/v1/models/{name:path}"}


def build(frontend: ScriptedFrontend, door: Door, **serving):
    return build_http_app(lambda: frontend, ServingConfig(**serving), Metrics(MODEL), door=door)


@contextlib.contextmanager
def face(frontend: ScriptedFrontend | None = None, door: Door | None = None, **serving):
    app = build(frontend or ScriptedFrontend(), door or make_door(), **serving)
    with served(app) as url, httpx.Client(base_url=url, timeout=20) as client:
        yield client


@pytest.fixture(scope="module")
def shared():
    with face() as client:
        yield client


def every_route() -> list[tuple[str, str]]:
    app = build(ScriptedFrontend(), make_door())
    routes = [route for route in app.routes if isinstance(route, APIRoute)]
    assert len(routes) == len(app.routes), "a route of another kind: see that the gate is before it"
    return sorted((method, route.path) for route in routes for method in route.methods)


def ask(client: httpx.Client, method: str, path: str, key: str | None) -> httpx.Response:
    url = path.replace("{name:path}", MODEL)
    return client.request(method, url, json={}, headers=bearer(key) if key else {})


# ---- every route


@pytest.mark.parametrize(("method", "path"), every_route())
def test_a_route_asks_for_a_key_unless_it_is_known_to_be_open(shared, method, path):
    status = ask(shared, method, path, None).status_code
    assert (status == 401) is (path not in OPEN_PATHS)


@pytest.mark.parametrize(("method", "path"), every_route())
def test_a_route_takes_a_key_for_generating_unless_it_is_known_to_need_another(
    shared, method, path
):
    refused = {CONTROL_PATH, "/mistral" + CONTROL_PATH, "/metrics"}
    assert (ask(shared, method, path, GENERATE).status_code == 403) is (path in refused)


@pytest.mark.parametrize(("method", "path"), every_route())
def test_a_key_for_observing_sees_nothing_else(shared, method, path):
    allowed = OPEN_PATHS | ANY_KEY_PATHS | {"/metrics"}
    status = ask(shared, method, path, OBSERVE).status_code
    assert (status == 403) is (path.removeprefix("/mistral") not in allowed)


@pytest.mark.parametrize(("method", "path"), every_route())
def test_an_admins_key_opens_every_route(shared, method, path):
    assert ask(shared, method, path, ADMIN).status_code not in (401, 403)


def test_a_route_that_nobody_thought_of_needs_a_key_for_generating(shared):
    for key, status in ((None, 401), (OBSERVE, 403), (GENERATE, 404)):
        assert ask(shared, "POST", "/v1/brand/new", key).status_code == status


@pytest.mark.parametrize("path", ["/ready/../v1/chat/completions", "//live", "/live/x", "/LIVE"])
def test_what_looks_like_an_open_route_is_none(shared, path):
    assert ask(shared, "POST", path, None).status_code == 401


def test_the_openapi_document_tells_which_routes_ask_for_a_key(shared):
    paths = shared.get("/openapi.json", headers=bearer(OBSERVE)).json()["paths"]
    for path, methods in paths.items():
        for operation in methods.values():
            assert ("401" in operation["responses"]) is (path not in OPEN_PATHS)
            assert ("security" in operation) is (path not in OPEN_PATHS)
    assert paths["/metrics"]["get"]["security"][0] == {"bearer": ["observe"]}
    assert {"403", "408"} <= set(paths[CHAT_PATH]["post"]["responses"])


# ---- keys


@pytest.mark.parametrize(
    ("headers", "status", "code"),
    [
        ({}, 401, "missing_api_key"),
        ({"authorization": "Bearer"}, 401, "missing_api_key"),
        ({"authorization": f"Basic {GENERATE}"}, 401, "missing_api_key"),
        (bearer("ostro-unknown"), 401, "invalid_api_key"),
        ({"x-api-key": "ostro-unknown\xe9"}, 401, "invalid_api_key"),
        (bearer(EXPIRED), 401, "expired_api_key"),
        (bearer(OBSERVE), 403, "missing_scope"),
        (bearer(GENERATE), 200, None),
        ({"authorization": f"bearer  {GENERATE}"}, 200, None),
        ({"x-api-key": GENERATE}, 200, None),
    ],
)
def test_a_key_comes_as_a_bearer_token_or_as_x_api_key(shared, headers, status, code):
    raw = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
    answer = shared.post(CHAT_PATH, json=CHAT, headers=raw)
    assert answer.status_code == status
    if code is not None:
        assert answer.json()["error"]["code"] == code
        assert "x-request-id" in answer.headers
    assert (answer.headers.get("www-authenticate") == 'Bearer realm="ostro"') is (status == 401)


def test_a_refusal_names_the_key_by_its_id_alone(shared):
    text = shared.post(CHAT_PATH, json=CHAT, headers=bearer(OBSERVE)).text
    assert key_id(OBSERVE) in text
    assert OBSERVE not in text


def test_the_clients_know_a_refusal_for_what_it_is(shared):
    url = str(shared.base_url).rstrip("/")
    stranger, watcher = "ostro-unknown", OBSERVE
    with (
        openai.OpenAI(base_url=f"{url}/v1", api_key=stranger) as client,
        pytest.raises(openai.AuthenticationError, match="not known here"),
    ):
        client.chat.completions.create(**CHAT)
    with (
        openai.OpenAI(base_url=f"{url}/v1", api_key=watcher) as client,
        pytest.raises(openai.PermissionDeniedError, match="this needs generate"),
    ):
        client.chat.completions.create(**CHAT)
    with (
        anthropic.Anthropic(base_url=url, api_key=stranger) as client,
        pytest.raises(anthropic.AuthenticationError, match="not known here"),
    ):
        client.messages.create(**CHAT, max_tokens=5)
    with (
        mistral.Mistral(server_url=url, api_key=stranger) as client,
        pytest.raises(mistral.errors.SDKError) as caught,
    ):
        client.chat.complete(**CHAT)
    assert caught.value.status_code == 401


def test_a_stranger_is_refused_before_the_body_comes(shared):
    with socket.create_connection((shared.base_url.host, shared.base_url.port), 10) as connection:
        connection.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 1000000\r\n\r\n"
        )
        assert connection.recv(1000).startswith(b"HTTP/1.1 401 ")


def test_a_body_that_does_not_come_is_given_up():
    with (
        face(body_timeout_s=0.2) as client,
        socket.create_connection((client.base_url.host, client.base_url.port), 10) as connection,
    ):
        head = f"POST {CHAT_PATH} HTTP/1.1\r\nhost: x\r\nx-api-key: {GENERATE}\r\n"
        connection.sendall(head.encode() + b"content-length: 1000000\r\n\r\n{")
        assert connection.recv(1000).startswith(b"HTTP/1.1 408 ")


def test_nobody_gets_in_before_the_keys_have_come():
    config = SecurityConfig(key_file="keys.yaml")
    door = Door(KeyRing(is_open=False), AuditLog(config), config)
    with face(door=door) as client:
        assert ask(client, "POST", CHAT_PATH, ADMIN).status_code == 503
        assert ask(client, "GET", "/live", None).status_code == 200


def test_metrics_may_be_open():
    with face(door=make_door(open_metrics=True)) as client:
        client.post(CHAT_PATH, json=CHAT)
        answer = client.get("/metrics")
    assert answer.status_code == 200
    assert 'ostro_api_key_refusals_total{code="missing_api_key"' in answer.text


def test_a_websocket_is_closed():
    app, sent = build(ScriptedFrontend(), make_door()), []

    async def send(message):
        sent.append(message)

    async def receive():
        return {"type": "websocket.connect"}

    scope = {"type": "websocket", "path": "/v1/models", "headers": []}
    asyncio.run(app(scope, receive, send))
    assert [message["type"] for message in sent] == ["websocket.close"]


# ---- whose request it is


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", [CHAT_PATH, "/v1/completions", "/v1/messages"])
def test_the_tenant_is_the_keys_whatever_the_caller_says(path, stream):
    frontend = ScriptedFrontend()
    body = {**CHAT, "prompt": "Say", "max_tokens": 5, "stream": stream, "tenant": "ops"}
    with face(frontend) as client:
        assert client.post(path, json=body, headers=bearer(GENERATE)).status_code == 200
    assert [request.options.tenant for request in frontend.asked] == ["acme"]


def test_without_keys_nobody_is_the_tenant():
    frontend = ScriptedFrontend()
    with face(frontend, Door.wide_open()) as client:
        assert client.post(CHAT_PATH, json=CHAT).status_code == 200
        body = {"id": "gen-1", "action": "cancel"}
        assert client.post(CONTROL_PATH, json=body).json()["applied"]
    assert frontend.asked[0].options.tenant == ""
    assert frontend.cell.steered_tenants == [None]


@pytest.mark.parametrize(("key", "tenant"), [(CONTROL, "acme"), (ADMIN, None)])
@pytest.mark.parametrize("action", ["cancel", "reasoning_end"])
def test_control_is_of_the_tenants_own_generations_unless_an_admin_asks(key, tenant, action):
    frontend = ScriptedFrontend()
    with face(frontend) as client:
        body = {"id": "gen-1", "action": action}
        assert client.post(CONTROL_PATH, json=body, headers=bearer(key)).json()["applied"]
    assert frontend.cell.steered_tenants == [tenant]


@pytest.mark.parametrize(("asked", "given"), [(None, MAX_TOKENS), (MAX_TOKENS, MAX_TOKENS), (7, 7)])
def test_max_tokens_is_at_most_the_tenants(asked, given):
    frontend = ScriptedFrontend()
    with face(frontend) as client:
        body = {**CHAT, "max_tokens": asked}
        assert client.post(CHAT_PATH, json=body, headers=bearer(LIMITED)).status_code == 200
    assert frontend.asked[0].options.max_tokens == given


def test_more_max_tokens_than_the_tenant_may_have_are_refused(shared):
    body = {**CHAT, "max_tokens": MAX_TOKENS + 1}
    answer = shared.post(CHAT_PATH, json=body, headers=bearer(LIMITED))
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["code"], error["param"]) == ("above_quota", "max_tokens")


def test_more_max_tokens_than_the_tenant_may_have_are_refused_in_the_dialects_words(shared):
    body = {"input": "Hi.", "max_output_tokens": MAX_TOKENS + 1}
    answer = shared.post("/mistral/v1/responses", json=body, headers=bearer(LIMITED))
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, "max_output_tokens")
    assert error["message"].startswith("max_output_tokens=")


def test_a_quota_that_is_used_up_is_429_with_the_time_to_wait():
    used_up = QuotaError("used up", param="tokens_per_minute", retry_after_s=12.3)
    with face(ScriptedFrontend(used_up)) as client:
        answer = client.post(CHAT_PATH, json=CHAT, headers=bearer(GENERATE))
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "13")
    error = answer.json()["error"]
    assert (error["type"], error["code"]) == ("rate_limit_error", "quota_exceeded")
    assert error["param"] == "tokens_per_minute"


def test_a_quota_that_was_spent_a_moment_ago_is_refused_without_a_look_at_the_prompt():
    now_s = [1000.0]
    spent = SpentQuotaError("spent", param="tokens_per_minute", retry_after_s=30.0)
    frontend = ScriptedFrontend(spent)

    def ask_as(key: str) -> tuple[int, str | None]:
        answer = client.post(CHAT_PATH, json=CHAT, headers=bearer(key))
        return answer.status_code, answer.headers.get("retry-after")

    with face(frontend, make_door(clock=lambda: now_s[0])) as client:
        assert ask_as(LIMITED) == (429, "30")
        frontend.script = THOUGHTFUL
        now_s[0] += 0.9
        assert ask_as(LIMITED) == (429, "30")  # of 29.1 s
        assert ask_as(GENERATE) == (200, None)
        counted = client.get("/metrics", headers=bearer(OBSERVE)).text
        assert (
            'admission_rejections_total{model_name="tiny-small-4",reason="quota_exceeded"} 2'
            in (counted)
        )
        now_s[0] += 0.2
        assert ask_as(LIMITED) == (200, None)


COUNTED_BODIES = {
    "/tokenize": {"prompt": "Hi."},
    "/detokenize": {"tokens": [72, 105]},
    "/v1/messages/count_tokens": {"model": MODEL, "messages": HELLO},
    "/v1/responses/input_tokens": {"model": MODEL, "input": "Hi."},
}


@pytest.mark.parametrize("path", COUNTED_BODIES)
def test_what_generates_nothing_counts_as_a_request_of_who_has_a_quota_of_them(path):
    frontend = ScriptedFrontend()
    with face(frontend) as client:

        def ask_as(key: str) -> httpx.Response:
            return client.post(path, json=COUNTED_BODIES[path], headers=bearer(key))

        assert ask_as(COUNTED).status_code == 200
        assert ask_as(LIMITED).status_code == ask_as(GENERATE).status_code == 200
        assert frontend.cell.counted_tenants == ["counted"]
        frontend.cell.quota_error = QuotaError(
            "used up", param="requests_per_minute", retry_after_s=12.3
        )
        refused = ask_as(COUNTED)
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "13")


def test_what_is_refused_before_it_is_tokenized_is_not_counted():
    frontend = ScriptedFrontend()
    with face(frontend) as client:
        for body in ({}, {"prompt": "Hi.", "model": "another"}):
            answer = client.post("/tokenize", json=body, headers=bearer(COUNTED))
            assert answer.status_code in (400, 404)
    assert frontend.cell.counted_tenants == []


# ---- the audit log


@pytest.fixture
def audited(caplog):
    """What was written since the last call."""
    caplog.set_level(logging.INFO, logger="ostro.audit")

    def lines() -> list[dict]:
        found = [r.getMessage() for r in caplog.records if r.name == "ostro.audit"]
        caplog.clear()
        return [json.loads(line) for line in found]

    return lines


@pytest.mark.parametrize("stream", [False, True])
def test_a_generation_leaves_one_line_without_any_text(audited, stream):
    headers = {**bearer(GENERATE), "x-request-id": "req-7"}
    with face() as client:
        client.get("/live")
        body = {**CHAT, "messages": [{"role": "user", "content": "mellon"}], "stream": stream}
        assert client.post(CHAT_PATH, json=body, headers=headers).status_code == 200
    (line,) = audited()
    assert line.pop("time").endswith("+00:00")
    assert 0 <= line.pop("duration_s") < 20
    assert line == {
        "request_id": "req-7",
        "generation_id": "gen-1",
        "tenant": "acme",
        "key_id": key_id(GENERATE),
        "route": f"POST {CHAT_PATH}",
        "status": 200,
        "finish_reason": "stop",
        "prompt_tokens": 7,
        "completion_tokens": 11,
        "client": "127.0.0.1",
    }


def test_a_refused_caller_leaves_a_line_without_the_key(audited, caplog):
    with face() as client:
        client.post(CHAT_PATH, json=CHAT, headers=bearer("ostro-unknown"))
    text = caplog.text
    (line,) = audited()
    assert (line["status"], line["tenant"], line["key_id"]) == (401, "", "")
    assert "ostro-unknown" not in text


def test_a_failure_leaves_a_line(audited):
    with face(ScriptedFrontend(RuntimeError("broken"))) as client:
        assert client.post(CHAT_PATH, json=CHAT, headers=bearer(GENERATE)).status_code == 500
    assert [line["status"] for line in audited()] == [500]


def test_a_client_that_leaves_is_seen_in_its_line(audited):
    frontend = ScriptedFrontend(*THOUGHTFUL[:3], None)
    body = {**CHAT, "stream": True}
    with face(frontend) as client:
        with client.stream("POST", CHAT_PATH, json=body, headers=bearer(GENERATE)) as answer:
            next(answer.iter_raw())
        assert frontend.closed.wait(10)
    (line,) = audited()
    assert (line["status"], line["finish_reason"]) == (200, None)
    assert (line["prompt_tokens"], line["completion_tokens"]) == (7, None)


def test_a_client_that_leaves_in_its_body_is_no_failure_of_ours(audited, caplog):
    with (
        face() as client,
        socket.create_connection((client.base_url.host, client.base_url.port), 10) as connection,
    ):
        head = f"POST {CHAT_PATH} HTTP/1.1\r\nhost: x\r\nx-api-key: {GENERATE}\r\n"
        connection.sendall(head.encode() + b"content-length: 1000000\r\n\r\n{")
        connection.close()
        wait_for(lambda: CHAT_PATH in caplog.text)
    text = caplog.text
    assert [line["status"] for line in audited()] == [400]
    assert "Traceback" not in text


@pytest.mark.parametrize(
    ("forwarded_for", "num_proxies", "client"),
    [
        ([], 0, "127.0.0.1"),
        (["10.1.2.3"], 0, "10.1.2.3"),
        (["6.6.6.6", "10.1.2.3"], 0, "10.1.2.3"),
        (["6.6.6.6, 7.7.7.7", "10.1.2.3"], 1, "7.7.7.7"),
        (["10.1.2.3"], 1, "10.1.2.3"),
        (["6" * 1000, "10.1.2.3"], 1, "6" * 64),
    ],
)
def test_an_address_is_believed_as_far_as_proxies_are_trusted(
    audited, forwarded_for, num_proxies, client
):
    headers = [*bearer(GENERATE).items(), *(("x-forwarded-for", one) for one in forwarded_for)]
    with face(door=make_door(num_trusted_proxies=num_proxies)) as http:
        http.get("/v1/models", headers=headers)
    assert [line["client"] for line in audited()] == [client]
