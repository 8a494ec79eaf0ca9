"""The HTTP face behind a real server, asked by httpx and the real openai and mistralai clients."""

from __future__ import annotations

import json

import httpx
import mistralai.client as mistral
import openai
import pytest
from http_face import HELLO, face, mistral_client, openai_client, sse
from scripted_frontend import (
    ALIAS,
    CALL,
    FINISHED,
    MODEL,
    STARTED,
    THOUGHTFUL,
    WITH_LOGPROBS,
    ScriptedFrontend,
    served,
)

from ostro.actors.errors import (
    CheckpointError,
    DeadlineError,
    InvalidRequestError,
    NotReadyError,
    OverloadedError,
    ShardLostError,
)
from ostro.cluster.generation import TextDelta
from ostro.cluster.http_ingress import build_http_app
from ostro.cluster.metrics import Metrics
from ostro.configs.deployment import ServingConfig

CHAT = {"model": MODEL, "messages": HELLO}


# ---- answers, as the clients read them


def test_openai_client_reads_a_whole_answer():
    with face(ScriptedFrontend()) as http, openai_client(http) as client:
        answer = client.chat.completions.create(model=MODEL, messages=HELLO)
    message = answer.choices[0].message
    assert (message.content, message.reasoning_content) == ("Hello", "Let me see.")
    assert message.reasoning == "Let me see."
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens_details.reasoning_tokens == 5
    assert answer.usage.prompt_tokens_details.cached_tokens == 4
    assert answer.reasoning == {"effort": "low", "budget": 2048, "tokens": 5, "ended_by": "model"}
    assert answer._request_id


def test_openai_client_reads_a_stream_with_a_usage_chunk():
    with face(ScriptedFrontend()) as http, openai_client(http) as client:
        chunks = list(
            client.chat.completions.create(
                model=MODEL, messages=HELLO, stream=True, stream_options={"include_usage": True}
            )
        )
    assert chunks[0].choices[0].delta.role == "assistant"
    deltas = [chunk.choices[0].delta for chunk in chunks[:-1]]
    assert "".join(delta.content or "" for delta in deltas) == "Hello"
    thinking = [getattr(delta, "reasoning_content", "") for delta in deltas]
    assert "".join(thinking) == "Let me see."
    assert chunks[-1].choices == []
    assert chunks[-1].usage.total_tokens == 18
    assert chunks[-2].usage is None
    assert chunks[-2].choices[0].finish_reason == "stop"


def test_openai_stream_helper_gathers_the_answer():
    with (
        face(ScriptedFrontend()) as http,
        openai_client(http) as client,
        client.chat.completions.stream(model=MODEL, messages=HELLO) as stream,
    ):
        final = stream.get_final_completion()
    assert final.choices[0].message.content == "Hello"
    assert final.usage.completion_tokens == 11


@pytest.mark.parametrize("stream", [False, True])
def test_openai_client_reads_tool_calls_and_logprobs(stream):
    frontend = ScriptedFrontend(*WITH_LOGPROBS[:-1], CALL, FINISHED)
    with face(frontend) as http, openai_client(http) as client:
        answer = client.chat.completions.create(
            model=MODEL, messages=HELLO, stream=stream, logprobs=True, top_logprobs=2
        )
        if stream:
            choices = [chunk.choices[0] for chunk in answer]
            calls = [call for choice in choices for call in choice.delta.tool_calls or ()]
            tokens = [t for choice in choices if choice.logprobs for t in choice.logprobs.content]
        else:
            calls = answer.choices[0].message.tool_calls
            tokens = answer.choices[0].logprobs.content
    assert [call.id for call in calls] == ["abcDEF123"]
    assert calls[0].function.name == "weather"
    assert json.loads(calls[0].function.arguments) == {"city": "Oslo"}
    assert [(t.token, t.bytes, t.token_id) for t in tokens] == [
        ("Hel", [72, 101, 108], 5),
        ("lo", [108, 111], 6),
    ]
    assert [len(t.top_logprobs) for t in tokens] == [2, 1]
    assert frontend.asked[0].options.num_logprobs == 2


def test_mistral_client_reads_thinking_chunks_in_a_whole_answer():
    with face(ScriptedFrontend()) as http, mistral_client(http) as client:
        answer = client.chat.complete(model=MODEL, messages=HELLO)
    thinking, text = answer.choices[0].message.content
    assert (thinking.type, thinking.closed) == ("thinking", True)
    assert thinking.thinking[0].text == "Let me see."
    assert text.text == "Hello"
    assert answer.usage.additional_properties["num_cached_tokens"] == 4


def test_mistral_client_reads_a_stream_of_chunks_with_tool_calls():
    frontend = ScriptedFrontend(*THOUGHTFUL[:-1], CALL, FINISHED)
    with (
        face(frontend) as http,
        mistral_client(http) as client,
        client.chat.stream(model=MODEL, messages=HELLO) as stream,
    ):
        choices = [event.data.choices[0] for event in stream]
    contents = [choice.delta.content for choice in choices]
    lists = [content for content in contents if isinstance(content, list)]
    assert [part.type for content in lists for part in content] == [
        *("thinking", "thinking", "thinking", "text")
    ]
    assert lists[-1][0].closed is True
    assert lists[-1][1].text == "Hel"
    assert "".join(content for content in contents if isinstance(content, str)) == "lo"
    calls = [call for choice in choices for call in choice.delta.tool_calls or ()]
    assert [(call.id, call.function.name) for call in calls] == [("abcDEF123", "weather")]
    assert choices[-1].finish_reason == "stop"


def test_mistral_client_keeps_logprobs():
    with face(ScriptedFrontend(*WITH_LOGPROBS)) as http, mistral_client(http) as client:
        answer = client.chat.complete(model=MODEL, messages=HELLO, logprobs=True, top_logprobs=1)
    assert [token.token_id for token in answer.choices[0].logprobs.content] == [5, 6]


def test_thinking_form_follows_the_field_then_the_path_then_the_client():
    with face(ScriptedFrontend()) as http:

        def content(path: str = "/v1", agent: str = "curl", **fields):
            answer = http.post(
                f"{path}/chat/completions", json=CHAT | fields, headers={"user-agent": agent}
            )
            return answer.json()["choices"][0]["message"]["content"]

        assert content() == "Hello"
        assert isinstance(content(path="/mistral/v1"), list)
        assert isinstance(content(agent="mistral-client-python/3.7.0"), list)
        assert content(path="/mistral/v1", reasoning_format="fields") == "Hello"
        assert isinstance(content(reasoning_format="chunks"), list)


def test_thinking_is_left_out_when_asked():
    frontend = ScriptedFrontend()
    with face(frontend) as http:
        http.post("/v1/chat/completions", json=CHAT | {"reasoning_format": "none"})
    assert frontend.asked[0].options.omit_thinking


def test_every_chunk_has_a_finish_reason_key_and_the_finish_chunk_the_usage():
    with face(ScriptedFrontend()) as http:
        answer = http.post("/v1/chat/completions", json=CHAT | {"stream": True})
    chunks = sse(answer.text)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert all("finish_reason" in chunk["choices"][0] for chunk in chunks)
    assert {chunk["id"] for chunk in chunks} == {"gen-1"}
    assert chunks[0]["reasoning"] == {"effort": "low", "budget": 2048}
    assert chunks[-1]["usage"]["prompt_tokens_details"] == {
        "cached_tokens": 4,
        "image_tokens": 3,
    }
    assert chunks[-1]["reasoning"]["ended_by"] == "model"


@pytest.mark.parametrize("stream", [False, True])
def test_text_completions_are_served_with_logprobs_and_token_ids(stream):
    frontend = ScriptedFrontend(*WITH_LOGPROBS)
    fields = {"prompt": "Say", "logprobs": 1, "return_token_ids": True, "stream": stream}
    with face(frontend) as http:
        answer = http.post("/v1/completions", json={"model": MODEL, **fields})
    choices = (
        [chunk["choices"][0] for chunk in sse(answer.text)]
        if stream
        else [answer.json()["choices"][0]]
    )
    assert "".join(choice["text"] for choice in choices) == "Hello"
    assert [i for choice in choices for i in choice.get("token_ids", [])] == [5, 6]
    logprobs = [choice["logprobs"] for choice in choices if choice["logprobs"]]
    assert [offset for part in logprobs for offset in part["text_offset"]] == [0, 3]
    assert frontend.asked[0].options.max_tokens == 16


def test_openai_client_reads_a_text_completion():
    with face(ScriptedFrontend()) as http, openai_client(http) as client:
        answer = client.completions.create(model=MODEL, prompt=[1, 2, 3])
    assert answer.choices[0].text == "Hello"


# ---- models, tokens, control, health


def test_both_clients_read_the_model_cards():
    with face(ScriptedFrontend()) as http:
        with openai_client(http) as client:
            assert [model.id for model in client.models.list()] == [MODEL]
            assert client.models.retrieve(MODEL).created == 1700000000
        with mistral_client(http) as client:
            assert client.models.list().data[0].capabilities.reasoning
            assert client.models.retrieve(model_id=MODEL).max_context_length == 4096
        assert http.get("/v1/models/other").json()["error"]["param"] == "model"


def test_a_model_answers_to_its_aliases_under_its_own_name():
    with face(ScriptedFrontend()) as http, openai_client(http) as client:
        assert [model.aliases for model in client.models.list()] == [[ALIAS]]
        assert client.models.retrieve(ALIAS).id == MODEL
        assert client.chat.completions.create(model=ALIAS, messages=HELLO).model == MODEL


def test_tokenize_and_detokenize():
    with face(ScriptedFrontend()) as http:
        text = http.post("/tokenize", json={"prompt": "ab"}).json()
        bare = http.post("/tokenize", json={"prompt": "ab", "add_special_tokens": False}).json()
        chat = http.post("/tokenize", json={"messages": HELLO}).json()
        back = http.post("/detokenize", json={"tokens": [97, 98]}).json()
        neither = http.post("/tokenize", json={})
        idle = [
            http.post("/tokenize", json=fields).headers["x-ignored-fields"]
            for fields in (
                {"prompt": "ab", "reasoning_effort": "high"},
                {"messages": HELLO, "add_special_tokens": False},
            )
        ]
        beyond = http.post("/detokenize", json={"tokens": [1000]})
    assert text == {"count": 3, "max_model_len": 4096, "tokens": [1, 97, 98]}
    assert bare["tokens"] == [97, 98]
    assert chat["tokens"] == [1, 1, 0]
    assert back == {"prompt": "ab"}
    assert idle == ["reasoning_effort", "add_special_tokens"]
    assert neither.status_code == 400
    assert beyond.json()["error"]["param"] == "tokens"


@pytest.mark.parametrize(
    ("path", "fields"), [("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [97]})]
)
def test_tokens_are_those_of_the_served_model_alone(path, fields):
    with face(ScriptedFrontend()) as http:
        assert http.post(path, json=fields | {"model": ALIAS, "strict": True}).status_code == 200
        other = http.post(path, json=fields | {"model": "another"})
    assert (other.status_code, other.json()["error"]["param"]) == (404, "model")


def test_control_ends_thinking_and_cancels():
    frontend = ScriptedFrontend()
    path = "/v1/chat/completions/control"
    with face(frontend) as http:
        ended = http.post(path, json={"id": "gen-1", "action": "reasoning_end"}).json()
        unknown = http.post(path, json={"id": "gen-9", "action": "cancel"}).json()
        wrong = http.post(path, json={"id": "gen-1", "action": "stop"})
    assert (ended["applied"], unknown["applied"]) == (True, False)
    assert frontend.cell.controls == [("end_thinking", "gen-1"), ("cancel", "gen-9")]
    assert wrong.status_code == 422


def test_health_follows_the_cell_and_liveness_does_not():
    frontend = ScriptedFrontend()
    with face(frontend) as http:
        assert [http.get(path).status_code for path in ("/live", "/ready", "/health")] == [200] * 3
        frontend.cell.is_ready = False
        answers = [http.get(path) for path in ("/live", "/ready", "/health")]
    assert [answer.status_code for answer in answers] == [200, 503, 503]
    assert int(answers[1].headers["retry-after"]) >= 1


def test_metrics_are_served_while_there_is_no_frontend():
    def no_frontend():
        raise NotReadyError("loading")

    with served(build_http_app(no_frontend, ServingConfig(), Metrics(MODEL))) as url:
        assert httpx.get(f"{url}/ready").status_code == 503
        assert 'ostro_cell_ready{model_name="tiny-small-4"} 0.0' in httpx.get(f"{url}/metrics").text


# ---- errors


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (OverloadedError("queues are full", retry_after_s=3.2), 429, "queue_full"),
        (NotReadyError("loading"), 503, "not_ready"),
        (ShardLostError("expert shard 1"), 503, "shard_lost"),
        (DeadlineError("too late"), 504, "deadline_exceeded"),
        (CheckpointError("secret path"), 500, "bad_checkpoint"),
        (ZeroDivisionError("secret"), 500, "internal"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_failure_before_the_first_event_has_its_own_status(error, status, code, stream):
    with face(ScriptedFrontend(error)) as http:
        answer = http.post("/v1/chat/completions", json=CHAT | {"stream": stream})
    body = answer.json()
    assert (answer.status_code, body["error"]["code"]) == (status, code)
    assert body["error"] == {key: body[key] for key in ("message", "type", "param", "code")}
    assert "secret" not in answer.text
    assert "detail" not in body
    assert answer.headers.get_list("x-request-id")[0]
    expected = {"queue_full": "4", "not_ready": "2", "shard_lost": "2"}
    assert answer.headers.get("retry-after") == expected.get(code)


def test_a_failure_mid_stream_is_told_to_both_clients():
    frontend = ScriptedFrontend(*THOUGHTFUL[:3], ShardLostError("attention shard 0 was lost"))
    with face(frontend) as http:
        chunks = sse(http.post("/v1/chat/completions", json=CHAT | {"stream": True}).text)
        assert chunks[-1]["choices"][0]["finish_reason"] == "error"
        assert chunks[-1]["error"]["code"] == "shard_lost"
        with (
            openai_client(http) as client,
            pytest.raises(openai.APIError, match="attention shard 0"),
        ):
            list(client.chat.completions.create(model=MODEL, messages=HELLO, stream=True))
        with (
            mistral_client(http) as client,
            client.chat.stream(model=MODEL, messages=HELLO) as stream,
        ):
            assert [e.data.choices[0].finish_reason for e in stream][-1] == "error"


@pytest.mark.parametrize("status", [400, 422, 429])
def test_the_openai_client_reads_error_bodies(status):
    frontend = ScriptedFrontend(OverloadedError("full"))
    bad = {400: {"tool_choice": "maybe"}, 422: {"top_p": "high"}, 429: {}}[status]
    with face(frontend) as http:
        with openai_client(http) as client, pytest.raises(openai.APIStatusError) as told:
            client.chat.completions.create(model=MODEL, messages=HELLO, extra_body=bad)
        assert told.value.status_code == status
        assert told.value.param == next(iter(bad), None)
        assert told.value.request_id


@pytest.mark.parametrize(("model", "status"), [(MODEL, 429), ("other", 404)])
def test_the_mistral_client_reads_error_bodies(model, status):
    frontend = ScriptedFrontend(OverloadedError("full"))
    with (
        face(frontend) as http,
        mistral_client(http) as client,
        pytest.raises(mistral.errors.SDKError) as told,
    ):
        client.chat.complete(model=model, messages=HELLO)
    assert told.value.status_code == status


@pytest.mark.parametrize("path", ["/v1/completions", "/mistral/v1/completions"])
def test_a_completion_is_refused_by_the_name_of_its_own_field(path):
    error = InvalidRequestError("top_logprobs must be at most 20", param="top_logprobs")
    with face(ScriptedFrontend(error)) as http:
        told = http.post(path, json={"prompt": "Hi", "logprobs": 21}).json()["error"]
        chat = http.post("/v1/chat/completions", json=CHAT).json()["error"]
    assert (told["param"], told["message"]) == ("logprobs", "logprobs must be at most 20")
    assert chat["param"] == "top_logprobs"


def test_a_schema_error_lists_its_fields():
    with face(ScriptedFrontend()) as http:
        answer = http.post(
            "/v1/chat/completions", json=CHAT | {"max_tokens": "many", "stop": 5, "n": 1.5}
        )
    body = answer.json()
    assert answer.status_code == 422
    places = [entry["loc"] for entry in body["detail"]]
    assert ["body", "max_tokens"] in places
    assert ["body", "n"] in places
    assert body["error"]["param"] in ("max_tokens", "stop", "n")


def chat(**fields) -> bytes:
    return json.dumps(CHAT | fields).encode()


def message(**fields) -> bytes:
    return chat(messages=[{"role": "user", **fields}])


def image(url: object) -> dict[str, object]:
    return {"type": "image_url", "image_url": url}


TEXT = {"type": "text", "text": "see"}
BAD_BODIES = {
    "no json": (b"{", 400, None),
    "empty": (b"", 400, None),
    "broken utf-8": (b'{"model":"a\xff"}', 400, None),
    "lone surrogate": (b'{"model":"\\ud800"}', 400, None),
    "deep nesting": (b"[" * 100_000, 400, None),
    "not a number": (chat(temperature=0).replace(b"0}", b"NaN}"), 400, None),
    "a list": (b"[]", 422, None),
    "no messages": (chat(messages=[]), 422, "messages"),
    "messages missing": (b'{"model":"m"}', 422, "messages"),
    "unknown model": (chat(model="gpt-5"), 404, "model"),
    "wrong type": (chat(max_tokens="5"), 422, "max_tokens"),
    "boolean number": (chat(max_tokens=True), 422, "max_tokens"),
    "unknown role": (chat(messages=[{"role": "robot"}]), 422, "messages[0].role"),
    "wrong content": (message(content=5), 422, "messages[0].content"),
    "an image over http": (
        message(content=[TEXT, image({"url": "http://example.com/cat.png"})]),
        400,
        "messages[0].content[1]",
    ),
    "an image on the server": (
        message(content=[image("file:///etc/passwd")]),
        400,
        "messages[0].content[0]",
    ),
    "a bare path": (message(content=[image("/etc/passwd")]), 400, "messages[0].content[0]"),
    "bare base64": (message(content=[image("iVBORw0KGgo=")]), 400, "messages[0].content[0]"),
    "an image in no base64": (
        message(content=[image("data:image/svg+xml,<svg/>")]),
        400,
        "messages[0].content[0]",
    ),
    "an image without url": (
        message(content=[{"type": "image_url"}]),
        400,
        "messages[0].content[0].image_url",
    ),
    "an image without its url": (
        message(content=[TEXT, image({"detail": "low"})]),
        422,
        "messages[0].content[1].image_url.url",
    ),
    "another form of image": (
        message(content=[{"type": "input_image", "image_url": "data:image/png;base64,AAAA"}]),
        400,
        "messages[0].content[0]",
    ),
    "audio": (message(content=[{"type": "input_audio"}]), 400, "messages[0].content[0]"),
    "text part without text": (
        message(content=[{"type": "text"}]),
        400,
        "messages[0].content[0].text",
    ),
    "prefix of a user": (message(content="a", prefix=True), 400, "messages[0].prefix"),
    "tool choice": (chat(tool_choice="maybe"), 400, "tool_choice"),
    "nameless tool": (chat(tool_choice={"type": "function"}), 400, "tool_choice"),
    "form of answer": (
        chat(response_format={"type": "json_schema"}),
        400,
        "response_format.json_schema.schema",
    ),
    "best of two": (chat(best_of=2), 400, "best_of"),
    "prompt logprobs": (chat(prompt_logprobs=True), 400, "prompt_logprobs"),
    "prompt mode": (chat(prompt_mode="reasoning"), 400, "prompt_mode"),
    "two seeds": (chat(seed=1, random_seed=2), 400, "seed"),
    "two limits": (chat(max_tokens=1, max_completion_tokens=2), 400, "max_completion_tokens"),
    "lone top_logprobs": (chat(top_logprobs=2), 400, "top_logprobs"),
    "bias without id": (chat(logit_bias={"x": 1}), 400, "logit_bias"),
    "other tool": (chat(tools=[{"type": "web_search"}]), 400, "tools[0]"),
}


@pytest.fixture(scope="module")
def strict_face():
    frontend = ScriptedFrontend()
    with face(frontend, max_body_bytes=200_000) as http:
        yield frontend, http


@pytest.mark.parametrize(("body", "status", "param"), BAD_BODIES.values(), ids=BAD_BODIES)
def test_bad_input_is_refused_by_name(strict_face, body, status, param):
    _, http = strict_face
    answer = http.post("/v1/chat/completions", content=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (status, param)
    assert answer.json()["error"]["type"] in ("invalid_request_error", "not_found_error")
    assert answer.headers["x-request-id"]


@pytest.mark.parametrize("chunked", [False, True])
def test_a_large_body_is_refused_before_it_is_parsed(strict_face, chunked):
    frontend, http = strict_face
    num_asked = len(frontend.asked)
    body = b"x" * 10_000_000
    parts = (body[i : i + 65536] for i in range(0, len(body), 65536))
    answer = http.post("/v1/chat/completions", content=parts if chunked else body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")
    assert len(frontend.asked) == num_asked


def test_a_slash_too_many_is_told_and_redirects_nobody(strict_face):
    _, http = strict_face
    answer = http.post("/v1/chat/completions/", json={}, follow_redirects=False)
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "unknown_route")


def test_unknown_routes_and_methods_have_the_same_error_body(strict_face):
    _, http = strict_face
    lost, wrong = http.get("/v2/nothing"), http.get("/v1/chat/completions")
    assert (lost.status_code, wrong.status_code) == (404, 405)
    assert lost.json()["error"]["code"] == wrong.json()["error"]["code"] == "unknown_route"
    assert wrong.headers["x-request-id"]


def test_unknown_fields_are_named_or_refused(strict_face):
    _, http = strict_face
    fields = {"mood": 1, "messages": [{"role": "user", "content": "a", "colour\n": 2}]}
    answer = http.post("/v1/chat/completions", json=CHAT | fields)
    assert answer.headers["x-ignored-fields"] == "mood, messages[0].colour?"
    strict = http.post("/v1/chat/completions", json=CHAT | fields | {"strict": True})
    assert strict.status_code == 422
    assert strict.json()["detail"][0] == {
        "type": "extra_forbidden",
        "loc": ["body", "mood"],
        "msg": "no such field is known",
        "input": None,
    }


def test_the_callers_request_id_comes_back_unless_it_could_split_a_header(strict_face):
    _, http = strict_face
    assert http.get("/live", headers={"x-request-id": "abc"}).headers["x-request-id"] == "abc"
    odd = http.get("/live", headers={"x-request-id": "a b"}).headers["x-request-id"]
    assert odd != "a b"


# ---- connections


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("chat/completions", CHAT),
        ("completions", {"prompt": "Say hello."}),
        ("responses", {"input": "Say hello."}),
        ("messages", CHAT | {"max_tokens": 9}),
    ],
)
def test_closing_the_connection_closes_the_generation(path, body, stream):
    frontend = ScriptedFrontend(STARTED, TextDelta(text="Hel"), None)
    with face(frontend) as http:
        asked = {"url": f"/v1/{path}", "json": {"model": MODEL, **body, "stream": stream}}
        if stream:
            with http.stream("POST", **asked) as answer:
                assert answer.status_code == 200
                assert next(answer.iter_text())
        else:
            with pytest.raises(httpx.ReadTimeout):
                http.post(**asked, timeout=0.3)
        assert frontend.closed.wait(timeout=5)
    assert (frontend.num_closed, frontend.num_completed) == (1, 0)


def test_the_first_chunk_does_not_wait_for_the_second_event():
    with (
        face(ScriptedFrontend(STARTED, None)) as http,
        http.stream("POST", "/v1/chat/completions", json=CHAT | {"stream": True}) as answer,
    ):
        assert '"role":"assistant"' in next(answer.iter_text())


def test_silence_is_filled_with_comments_even_before_the_first_event():
    frontend = ScriptedFrontend(2.0, *THOUGHTFUL, ZeroDivisionError())
    with face(frontend, keep_alive_s=0.1) as http:
        text = http.post("/v1/chat/completions", json=CHAT | {"stream": True}).text
    assert text.startswith(": keep-alive\n\n: keep-alive\n\n")
    assert sse(text)[-1]["error"]["code"] == "internal"


def test_a_stream_that_was_opened_by_a_comment_can_still_fail():
    frontend = ScriptedFrontend(0.3, OverloadedError("full"))
    with face(frontend, keep_alive_s=0.1) as http:
        answer = http.post("/v1/chat/completions", json=CHAT | {"stream": True})
    assert answer.status_code == 200
    assert sse(answer.text)[-1]["error"]["code"] == "queue_full"
