"""The Anthropic dialect behind a real server, asked by the anthropic client and httpx."""

from __future__ import annotations

import contextlib
import dataclasses
import json

import anthropic
import pydantic
import pytest
from http_face import HELLO, face
from scripted_frontend import CALL, FINISHED, MODEL, STARTED, THOUGHTFUL, ScriptedFrontend

from ostro.actors.errors import (
    CheckpointError,
    DeadlineError,
    InvalidRequestError,
    NotReadyError,
    OverloadedError,
    ShardLostError,
)
from ostro.cluster.generation import TextDelta, ToolCall, ToolCallDone

ASKED = {"model": MODEL, "max_tokens": 64, "messages": HELLO}
TOOL = {"name": "weather", "input_schema": {"type": "object", "properties": {"city": {}}}}
WITH_CALLS = (
    *THOUGHTFUL[:-1],
    CALL,
    ToolCallDone(index=1, call=ToolCall(call_id="xyzDEF456", name="now", arguments="{}")),
)


def finished(reason="stop", **fields):
    return dataclasses.replace(FINISHED, reason=reason, **fields)


@contextlib.contextmanager
def client_of(frontend, *, max_retries=0, **serving):
    with (
        face(frontend, **serving) as http,
        anthropic.Anthropic(
            base_url=str(http.base_url),
            api_key="none",
            max_retries=max_retries,
            _strict_response_validation=True,
        ) as client,
    ):
        yield client


def kinds(message):
    return [block.type for block in message.content]


# ---- answers, as the client reads them


def test_the_client_reads_a_whole_message():
    with client_of(ScriptedFrontend()) as client:
        message = client.messages.create(**ASKED)
    assert (message.id, message.model, message.role) == ("gen-1", MODEL, "assistant")
    assert kinds(message) == ["thinking", "text"]
    assert message.content[0].thinking == "Let me see."
    assert message.content[0].signature
    assert message.content[1].text == "Hello"
    assert (message.stop_reason, message.stop_sequence) == ("end_turn", None)
    usage = message.usage
    assert (usage.input_tokens, usage.cache_read_input_tokens) == (3, 4)
    assert (usage.output_tokens, usage.output_tokens_details.thinking_tokens) == (11, 5)
    assert usage.cache_creation_input_tokens == 0
    assert message._request_id


def test_the_stream_helper_gathers_what_a_whole_message_says():
    frontend = ScriptedFrontend(*WITH_CALLS, finished("tool_calls"))
    with client_of(frontend) as client:
        whole = client.messages.create(**ASKED)
        with client.messages.stream(**ASKED) as stream:
            texts = list(stream.text_stream)
            streamed = stream.get_final_message()
    assert texts == ["Hel", "lo"]
    assert kinds(whole) == ["thinking", "text", "tool_use", "tool_use"]
    assert [block.to_dict() for block in streamed.content] == [
        block.to_dict() for block in whole.content
    ]
    assert [whole.content[2].id, whole.content[2].input] == ["toolu_abcDEF123", {"city": "Oslo"}]
    assert whole.content[3].input == {}
    assert whole.stop_reason == streamed.stop_reason == "tool_use"
    assert streamed.usage.to_dict() == whole.usage.to_dict()


def test_a_stream_is_a_row_of_blocks_one_open_at_a_time():
    frontend = ScriptedFrontend(*WITH_CALLS, TextDelta(text="So."), finished())
    with client_of(frontend) as client:
        events = list(client.messages.create(**ASKED, stream=True))
    assert [event.type for event in events][:2] == ["message_start", "content_block_start"]
    assert [event.type for event in events][-2:] == ["message_delta", "message_stop"]
    opened: list[int] = []
    is_open = False
    for event in events[1:-2]:
        if event.type == "content_block_start":
            assert not is_open
            opened.append(event.index)
            is_open = True
        assert is_open
        assert event.index == opened[-1]
        is_open = event.type != "content_block_stop"
    assert not is_open
    assert opened == [0, 1, 2, 3, 4]
    deltas = [event.delta.type for event in events if event.type == "content_block_delta"]
    assert deltas == [
        *("thinking_delta", "thinking_delta", "signature_delta", "text_delta", "text_delta"),
        *("input_json_delta", "input_json_delta", "text_delta"),
    ]


def test_the_beta_client_reads_both_forms():
    with client_of(ScriptedFrontend()) as client:
        whole = client.beta.messages.create(**ASKED, betas=["context-management-2025-06-27"])
        with client.beta.messages.stream(**ASKED) as stream:
            streamed = stream.get_final_message()
    assert kinds(whole) == kinds(streamed) == ["thinking", "text"]


@pytest.mark.parametrize(
    ("event", "reason", "sequence"),
    [
        (finished("length"), "max_tokens", None),
        (finished("model_length"), "model_context_window_exceeded", None),
        (finished(matched_stop="END"), "stop_sequence", "END"),
        (finished("tool_calls", matched_stop="END"), "tool_use", None),
        (finished("cancelled"), "end_turn", None),
    ],
)
def test_stop_reasons_are_the_dialects(event, reason, sequence):
    with client_of(ScriptedFrontend(STARTED, event)) as client:
        whole = client.messages.create(**ASKED)
        *_, last, _ = client.messages.create(**ASKED, stream=True)
    assert (whole.stop_reason, whole.stop_sequence) == (reason, sequence)
    assert (last.delta.stop_reason, last.delta.stop_sequence) == (reason, sequence)
    assert whole.content == []


def test_a_whole_turn_goes_back_as_it_came():
    frontend = ScriptedFrontend(*WITH_CALLS, finished("tool_calls"))
    with client_of(frontend) as client:
        message = client.messages.create(**ASKED, tools=[TOOL])
        results = [
            {"type": "tool_result", "tool_use_id": block.id, "content": "rain"}
            for block in message.content
            if block.type == "tool_use"
        ]
        turn = {"role": "assistant", "content": message.content}
        messages = [*HELLO, turn, {"role": "user", "content": results}]
        client.messages.create(**ASKED | {"messages": messages}, tools=[TOOL])
    _, turn, first, second = frontend.asked[1].messages
    assert (turn.thinking, turn.text) == ("Let me see.", "Hello")
    assert turn.tool_calls == tuple(done.call for done in WITH_CALLS[-2:])
    assert [first.tool_call_id, second.tool_call_id] == ["abcDEF123", "xyzDEF456"]


def test_numbers_in_the_input_of_a_call_keep_their_digits():
    call = ToolCall(
        call_id="abcDEF123", name="f", arguments='{"n": 123456789012345678901234567890}'
    )
    frontend = ScriptedFrontend(STARTED, ToolCallDone(index=0, call=call), finished("tool_calls"))
    with client_of(frontend) as client:
        message = client.messages.create(**ASKED)
    assert message.content[0].input == {"n": 123456789012345678901234567890}


def test_a_parsed_answer_asks_for_the_schema_and_reads_it():
    class Sum(pydantic.BaseModel):
        total: int

    frontend = ScriptedFrontend(STARTED, TextDelta(text='{"total": 4}'), FINISHED)
    with client_of(frontend) as client:
        message = client.messages.parse(**ASKED, output_format=Sum)
    assert message.parsed_output == Sum(total=4)
    schema = json.loads(frontend.asked[0].options.answer_format.text)
    assert schema["properties"]["total"]["type"] == "integer"


def test_tokens_are_counted():
    with client_of(ScriptedFrontend()) as client:
        counted = client.messages.count_tokens(
            model=MODEL, messages=HELLO, system="Be kind.", tools=[TOOL]
        )
        assert counted._request_id
        with pytest.raises(anthropic.NotFoundError):
            client.messages.count_tokens(model="gpt", messages=HELLO)
    assert counted.input_tokens == 3


def test_comments_of_a_silent_stream_do_not_disturb_the_client():
    with (
        client_of(ScriptedFrontend(0.3, *THOUGHTFUL), keep_alive_s=0.05) as client,
        client.messages.stream(**ASKED) as stream,
    ):
        assert stream.get_final_text() == "Hello"


# ---- headers


def test_both_headers_for_keys_and_the_headers_of_the_dialect_are_taken():
    frontend = ScriptedFrontend()
    with face(frontend) as http:
        for headers in ({"x-api-key": "k"}, {"authorization": "Bearer k"}):
            headers |= {"anthropic-version": "2023-06-01", "anthropic-beta": "a,b"}
            answer = http.post("/v1/messages?beta=true", json=ASKED, headers=headers)
            assert answer.status_code == 200
    assert len(frontend.asked) == 2


def test_the_request_id_is_told_under_both_names():
    with face(ScriptedFrontend()) as http:
        for body in (ASKED, ASKED | {"stream": True}, {}):
            answer = http.post("/v1/messages", json=body, headers={"x-request-id": "mine"})
            assert answer.headers["request-id"] == answer.headers["x-request-id"] == "mine"


def test_unknown_fields_are_named_or_refused():
    body = ASKED | {"context_management": {"edits": []}}
    with face(ScriptedFrontend()) as http:
        answer = http.post("/v1/messages", json=body)
        assert answer.headers["x-ignored-fields"] == "context_management"
        refused = http.post("/v1/messages", json=body | {"strict": True})
    assert refused.status_code == 422
    assert refused.json()["error"]["details"]["param"] == "context_management"


def test_an_unknown_field_of_another_dialect_is_refused_under_its_own_name():
    body = ASKED | {"stop": ["x"], "strict": True}  # `stop` is what the request model says
    with face(ScriptedFrontend()) as http:
        refused = http.post("/v1/messages", json=body)
    error = refused.json()["error"]
    assert (refused.status_code, error["details"]["param"]) == (422, "stop")
    assert error["message"] == "stop: no such field is known"


def test_sealed_thinking_is_named_as_of_no_effect():
    sealed = {"type": "redacted_thinking", "data": "EqQB"}
    turn = {"role": "assistant", "content": [sealed, {"type": "text", "text": "Hi."}]}
    with face(ScriptedFrontend()) as http:
        answer = http.post("/v1/messages", json=ASKED | {"messages": [*HELLO, turn, *HELLO]})
    assert answer.headers["x-ignored-fields"] == "messages[1].content[0]"


# ---- errors


ERRORS = {
    "invalid": (InvalidRequestError("no"), anthropic.BadRequestError, "invalid_request_error"),
    "queues are full": (OverloadedError("full"), anthropic.RateLimitError, "rate_limit_error"),
    "loading": (NotReadyError("loading"), anthropic.InternalServerError, "overloaded_error"),
    "shard lost": (ShardLostError("lost"), anthropic.InternalServerError, "overloaded_error"),
    "deadline": (DeadlineError("late"), anthropic.InternalServerError, "timeout_error"),
    "ours": (CheckpointError("/secret/path"), anthropic.InternalServerError, "api_error"),
    "a bug": (RuntimeError("secret"), anthropic.InternalServerError, "api_error"),
}


@pytest.mark.parametrize(("error", "kind", "word"), ERRORS.values(), ids=ERRORS)
@pytest.mark.parametrize("stream", [False, True])
def test_a_failure_before_the_first_event_has_its_own_status(error, kind, word, stream):
    with (
        client_of(ScriptedFrontend(error)) as client,
        pytest.raises(kind) as raised,
    ):
        client.messages.create(**ASKED, stream=stream)
    told = raised.value
    assert told.type == word
    assert told.body["type"] == "error"
    assert told.request_id == told.body["request_id"] != ""
    assert told.error_code == told.body["error"]["details"]["error_code"]
    assert "secret" not in str(told.body)


def test_a_failure_mid_stream_is_an_error_event():
    frontend = ScriptedFrontend(*THOUGHTFUL[:-1], ShardLostError("experts-1 is lost"))
    with client_of(frontend) as client:
        stream = client.messages.create(**ASKED, stream=True)
        with pytest.raises(anthropic.APIStatusError, match="experts-1 is lost") as raised:
            list(stream)
    assert raised.value.type == "overloaded_error"


@pytest.mark.parametrize(
    ("error", "is_worth_it"), [(OverloadedError("full", retry_after_s=0.01), True), (None, False)]
)
def test_the_client_tries_again_where_it_is_worth_its_while(error, is_worth_it):
    frontend = ScriptedFrontend(error or InvalidRequestError("no"))
    with (
        client_of(frontend, max_retries=1) as client,
        pytest.raises(anthropic.APIStatusError) as raised,
    ):
        client.messages.create(**ASKED)
    assert len(frontend.asked) == 1 + is_worth_it
    assert ("retry-after" in raised.value.response.headers) is is_worth_it


REFUSED = {
    "no JSON": (b"{", 400, "invalid_request_error", None),
    "not served": (
        ASKED | {"tools": [{"type": "bash_20250124", "name": "bash"}]},
        400,
        "invalid_request_error",
        "tools[0]",
    ),
    "wrong type": (
        ASKED | {"messages": [{"role": "user", "content": [{"type": 5}]}]},
        422,
        "invalid_request_error",
        "messages[0].content[0].type",
    ),
    "other model": (ASKED | {"model": "gpt"}, 404, "not_found_error", "model"),
    "too large": (ASKED | {"system": "a" * 9000}, 413, "request_too_large", None),
}


@pytest.mark.parametrize(("body", "status", "word", "param"), REFUSED.values(), ids=REFUSED)
def test_bad_input_is_refused_in_the_dialects_form(body, status, word, param):
    with face(ScriptedFrontend(), max_body_bytes=8192) as http:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        answer = http.post("/v1/messages", content=data)
    told = answer.json()
    assert (answer.status_code, told["error"]["type"]) == (status, word)
    assert told["error"]["details"]["param"] == param


@pytest.mark.parametrize(
    ("param", "name"), [("stop", "stop_sequences"), ("reasoning_effort", "output_config.effort")]
)
def test_refusals_name_a_field_as_its_caller_knows_it(param, name):
    error = InvalidRequestError(f"{param} is no good", param=param)
    with face(ScriptedFrontend(error)) as http:
        told = http.post("/v1/messages", json=ASKED).json()["error"]
    assert (told["details"]["param"], told["message"]) == (name, f"{name} is no good")


@pytest.mark.parametrize(
    ("method", "path", "status"), [("GET", "/v1/messages", 405), ("POST", "/v1/messages/a", 404)]
)
def test_unknown_routes_and_methods_have_the_dialects_form(method, path, status):
    with face(ScriptedFrontend()) as http:
        answer = http.request(method, path)
    assert (answer.status_code, answer.json()["type"]) == (status, "error")
