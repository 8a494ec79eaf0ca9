"""/v1/responses behind a real server, asked by httpx and the real openai and mistralai clients."""

from __future__ import annotations

import json

import httpx
import mistralai.client as mistral
import openai
import pydantic
import pytest
from http_face import face, mistral_client, openai_client
from scripted_frontend import (
    ALIAS,
    CALL,
    FINISHED,
    MODEL,
    STARTED,
    THOUGHTFUL,
    WITH_LOGPROBS,
    ScriptedFrontend,
)

from ostro.actors.errors import InvalidRequestError, OverloadedError, ShardLostError
from ostro.cluster.generation import Constraint, Finished, TextDelta

ASK = {"model": MODEL, "input": "Say hello."}
WEATHER = {
    "type": "function",
    "name": "weather",
    "description": "The weather in a city",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    "strict": True,
}
WITH_CALL = (*THOUGHTFUL[:-1], CALL, FINISHED)
EVENTS_WITH_CALL = [
    "response.created",
    "response.in_progress",
    "response.output_item.added",
    "response.content_part.added",
    "response.reasoning_text.delta",
    "response.reasoning_text.delta",
    "response.reasoning_text.done",
    "response.content_part.done",
    "response.output_item.done",
    "response.output_item.added",
    "response.content_part.added",
    "response.output_text.delta",
    "response.output_text.delta",
    "response.output_text.done",
    "response.content_part.done",
    "response.output_item.done",
    "response.output_item.added",
    "response.function_call_arguments.delta",
    "response.function_call_arguments.done",
    "response.output_item.done",
    "response.completed",
]
PIXEL = "data:image/png;base64,iVBORw0KGgo="


class Weather(pydantic.BaseModel):
    city: str


def ended(reason: str) -> Finished:
    return Finished(
        reason=reason, usage=FINISHED.usage, reasoning=FINISHED.reasoning, timing=FINISHED.timing
    )


def streamed(http: httpx.Client, **fields) -> list[dict]:
    """The data of the events of one stream, each under its own name."""
    answer = http.post("/v1/responses", json=ASK | {"stream": True} | fields)
    assert answer.headers["content-type"].startswith("text/event-stream")
    frames = [frame.split("\n") for frame in answer.text.split("\n\n") if frame[:1] != ":"]
    assert frames.pop() == [""]  # no [DONE]
    events = [json.loads(data.removeprefix("data: ")) for _, data in frames]
    assert [name for name, _ in frames] == [f"event: {event['type']}" for event in events]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    return events


# ---- answers, as the clients read them


@pytest.mark.parametrize("make_client", [openai_client, mistral_client])
def test_both_clients_read_thinking_text_and_calls(make_client):
    with face(ScriptedFrontend(*WITH_CALL)) as http, make_client(http) as client:
        answer = client.responses.create(
            model=ALIAS, input="Say hello.", instructions="Be brief.", tools=[WEATHER]
        )
    thinking, message, call = answer.output
    assert (thinking.content[0].text, thinking.summary) == ("Let me see.", [])
    assert (message.content[0].text, message.status) == ("Hello", "completed")
    assert (call.name, call.arguments, call.call_id) == (
        "weather",
        '{"city": "Oslo"}',
        "abcDEF123",
    )
    assert (answer.id, answer.model, answer.status) == ("gen-1", MODEL, "completed")
    assert (answer.usage.input_tokens, answer.usage.output_tokens) == (7, 11)
    assert answer.usage.input_tokens_details.cached_tokens == 4
    assert answer.usage.output_tokens_details.reasoning_tokens == 5
    assert answer.reasoning.effort == "low"
    assert answer.instructions == "Be brief."
    assert answer.tools[0].name == "weather"
    assert answer.completed_at >= answer.created_at > 0


def test_openai_client_reads_a_stream_of_typed_events():
    with face(ScriptedFrontend(*WITH_CALL)) as http, openai_client(http) as client:
        events = list(client.responses.create(model=MODEL, input="Say hello.", stream=True))
    assert [event.type for event in events] == EVENTS_WITH_CALL
    deltas = [event.delta for event in events if event.type.endswith(".delta")]
    assert deltas == ["Let ", "me see.", "Hel", "lo", '{"city": "Oslo"}']
    assert [item.type for item in events[-1].response.output] == [
        "reasoning",
        "message",
        "function_call",
    ]
    assert events[-1].response.usage.total_tokens == 18


def test_mistral_client_reads_a_stream_of_typed_events():
    with (
        face(ScriptedFrontend(*WITH_CALL)) as http,
        mistral_client(http, "/mistral") as client,
        client.responses.create(model=MODEL, input="Say hello.", stream=True) as stream,
    ):
        frames = list(stream)
    assert [frame.event for frame in frames] == EVENTS_WITH_CALL
    assert [frame.data.type for frame in frames] == EVENTS_WITH_CALL


def test_whole_answer_and_stream_tell_the_same():
    with face(ScriptedFrontend(*WITH_CALL)) as http:
        whole = http.post("/v1/responses", json=ASK).json()
        last = streamed(http)[-1]["response"]
    times = ("created_at", "completed_at")
    assert {k: v for k, v in whole.items() if k not in times} == {
        k: v for k, v in last.items() if k not in times
    }
    assert whole["store"] is False


def test_openai_stream_helper_gathers_the_answer():
    with (
        face(ScriptedFrontend(*WITH_CALL)) as http,
        openai_client(http) as client,
        client.responses.stream(model=MODEL, input="Say hello.") as stream,
    ):
        texts = [event.snapshot for event in stream if event.type == "response.output_text.delta"]
        final = stream.get_final_response()
    assert texts == ["Hel", "Hello"]
    assert final.output_text == "Hello"


def test_openai_client_parses_a_structured_answer():
    frontend = ScriptedFrontend(STARTED, TextDelta(text='{"city": "Oslo"}'), FINISHED)
    with face(frontend) as http, openai_client(http) as client:
        answer = client.responses.parse(model=MODEL, input="Where?", text_format=Weather)
        with client.responses.stream(model=MODEL, input="Where?", text_format=Weather) as stream:
            streamed = stream.get_final_response()
    assert answer.output_parsed == streamed.output_parsed == Weather(city="Oslo")
    asked = frontend.asked[0].options.answer_format
    assert asked.constraint is Constraint.JSON_SCHEMA
    assert json.loads(asked.text)["required"] == ["city"]


def test_openai_client_parses_the_arguments_of_a_call():
    tool = openai.pydantic_function_tool(Weather, name="weather")
    frontend = ScriptedFrontend(STARTED, CALL, FINISHED)
    with face(frontend) as http, openai_client(http) as client:
        answer = client.responses.parse(model=MODEL, input="Rain?", tools=[WEATHER])
        assert tool["function"]["name"] == answer.output[0].name
    assert answer.output[0].parsed_arguments == {"city": "Oslo"}
    assert frontend.asked[0].tools[0].strict


@pytest.mark.parametrize("stream", [False, True])
def test_openai_client_reads_logprobs(stream):
    with face(ScriptedFrontend(*WITH_LOGPROBS)) as http, openai_client(http) as client:
        answer = client.responses.create(
            model=MODEL,
            input="Say hello.",
            include=["message.output_text.logprobs"],
            top_logprobs=2,
            stream=stream,
        )
        events = list(answer) if stream else []
    final = events[-1].response if stream else answer
    logprobs = final.output[0].content[0].logprobs
    assert [(entry.token, entry.logprob) for entry in logprobs] == [("Hel", -0.1), ("lo", -0.2)]
    assert logprobs[0].top_logprobs[1].token == "J"
    told = [e.logprobs[0].token for e in events if e.type == "response.output_text.delta"]
    assert told == (["Hel", "lo"] if stream else [])


@pytest.mark.parametrize(
    ("reason", "status", "details"),
    [
        ("length", "incomplete", {"reason": "max_output_tokens"}),
        ("model_length", "incomplete", {"reason": "max_output_tokens"}),
        ("cancelled", "cancelled", None),
    ],
)
def test_an_answer_that_was_cut_is_told_as_such(reason, status, details):
    with face(ScriptedFrontend(*THOUGHTFUL[:-1], ended(reason))) as http:
        with openai_client(http) as client:
            events = list(client.responses.create(model=MODEL, input="Hi", stream=True))
        whole = http.post("/v1/responses", json=ASK).json()
    assert events[-1].type == "response.incomplete"
    assert (whole["status"], whole["incomplete_details"]) == (status, details)
    assert [item["status"] for item in whole["output"]] == ["completed", "incomplete"]
    assert whole["completed_at"] is None
    assert events[-1].response.status == status


def test_the_id_of_a_response_is_known_before_it_has_begun_and_works_with_control():
    frontend = ScriptedFrontend()
    with face(frontend) as http:
        answer = http.post("/v1/responses", json=ASK).json()
        http.post("/v1/responses", json=ASK | {"request_id": "mine"})
        control = {"id": answer["id"], "action": "reasoning_end"}
        applied = http.post("/v1/chat/completions/control", json=control).json()["applied"]
    assert applied
    assert frontend.asked[0].options.request_id.startswith("resp_")
    assert frontend.asked[1].options.request_id == "mine"


# ---- failures


def test_a_failure_mid_stream_is_a_typed_event_for_both_clients():
    frontend = ScriptedFrontend(*THOUGHTFUL[:-1], ShardLostError("attention shard 0 was lost"))
    with face(frontend) as http:
        with openai_client(http) as client:
            last = list(client.responses.create(model=MODEL, input="Hi", stream=True))[-1]
        with (
            mistral_client(http) as client,
            client.responses.create(model=MODEL, input="Hi", stream=True) as stream,
        ):
            assert [frame.event for frame in stream][-1] == "response.failed"
    assert (last.type, last.response.status) == ("response.failed", "failed")
    assert last.response.error.code == "server_error"
    assert last.response.error.message == "attention shard 0 was lost"
    assert last.response.error.type == "unavailable_error"
    assert last.response.output[-1].status == "incomplete"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (OverloadedError("full"), "rate_limit_exceeded"),
        (InvalidRequestError("messages: too long", param="messages"), "invalid_prompt"),
        (ZeroDivisionError("secret"), "server_error"),
    ],
    ids=["overloaded", "invalid", "internal"],
)
def test_a_stream_that_was_opened_by_a_comment_can_still_fail(error, code):
    with face(ScriptedFrontend(0.3, error), keep_alive_s=0.1) as http:
        events = streamed(http)
        with (
            openai_client(http) as client,
            client.responses.stream(model=MODEL, input="Hi") as stream,
        ):
            types = [event.type for event in stream]
    assert types == ["response.created", "response.in_progress", "response.failed"]
    assert events[-1]["response"]["error"]["code"] == code
    assert events[0]["response"]["id"] == events[-1]["response"]["id"]
    assert "secret" not in json.dumps(events)


@pytest.mark.parametrize("stream", [False, True])
def test_a_failure_before_the_first_event_has_its_own_status(stream):
    error = InvalidRequestError("max_tokens must be at least 1", param="max_tokens")
    with face(ScriptedFrontend(error)) as http:
        answer = http.post("/v1/responses", json=ASK | {"stream": stream})
    told = answer.json()["error"]
    assert (answer.status_code, told["param"]) == (400, "max_output_tokens")
    assert told["message"] == "max_output_tokens must be at least 1"


# ---- what goes in


def test_an_answer_goes_back_in_as_it_came():
    frontend = ScriptedFrontend(*WITH_CALL)
    with face(frontend) as http, openai_client(http) as client:
        first = client.responses.create(model=MODEL, input="Rain in Oslo?", tools=[WEATHER])
        result = {"type": "function_call_output", "call_id": "abcDEF123", "output": "Dry."}
        again = client.responses.with_raw_response.create(
            model=MODEL,
            input=[{"role": "user", "content": "Rain in Oslo?"}, *first.output, result],
            tools=[WEATHER],
        )
    assert "x-ignored-fields" not in again.headers
    user, turn, tool = frontend.asked[1].messages
    assert (user.role, user.text) == ("user", "Rain in Oslo?")
    assert (turn.role, turn.thinking, turn.text) == ("assistant", "Let me see.", "Hello")
    assert turn.tool_calls == (CALL.call,)
    assert (tool.role, tool.text) == ("tool", "Dry.")


def test_the_mistral_client_replays_an_answer_too():
    frontend = ScriptedFrontend(*WITH_CALL)
    with face(frontend) as http, mistral_client(http) as client:
        first = client.responses.create(model=MODEL, input="Rain?", tools=[WEATHER])
        result = {"type": "function_call_output", "call_id": "abcDEF123", "output": "Dry."}
        client.responses.create(
            model=MODEL, input=[{"role": "user", "content": "Rain?"}, *first.output, result]
        )
    assert [message.role for message in frontend.asked[1].messages] == ["user", "assistant", "tool"]
    assert frontend.asked[1].messages[1].thinking == "Let me see."


def test_what_has_no_effect_is_named_or_refused():
    encrypted = {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "gAAAA"}
    fields = {
        "input": [{"role": "user", "content": "Hi"}, encrypted],
        "service_tier": "flex",
        "cache_salt": "pepper",
        "prompt_cache_key": "team",
        "include": ["message.output_text.logprobs", "reasoning.encrypted_content"],
        "reasoning": {"effort": "high", "summary": "auto"},
        "text": {"verbosity": "low"},
    }
    with face(ScriptedFrontend()) as http:
        answer = http.post("/v1/responses", json=ASK | fields)
        strict = http.post("/v1/responses", json=ASK | fields | {"strict": True})
    ignored = (
        "text.verbosity, reasoning.summary, input[1], service_tier, prompt_cache_key, include[1]"
    )
    assert (answer.status_code, answer.headers["x-ignored-fields"]) == (200, ignored)
    assert strict.status_code == 422
    assert [entry["loc"][1] for entry in strict.json()["detail"]] == ignored.split(", ")


def test_the_header_of_ignored_fields_is_bounded():
    items = [{"type": "reasoning", "summary": []}] * 5000 + [{"role": "user", "content": "Hi"}]
    with face(ScriptedFrontend()) as http:
        answer = http.post("/v1/responses", json=ASK | {"input": items})
    assert answer.status_code == 200
    assert len(answer.headers["x-ignored-fields"].split(", ")) == 32


def test_both_clients_count_the_tokens_of_a_prompt():
    asked = {"model": MODEL, "input": "Hi", "instructions": "Be brief.", "tools": [WEATHER]}
    with face(ScriptedFrontend()) as http:
        with openai_client(http) as client:
            assert client.responses.input_tokens.count(**asked).input_tokens == 3
        with mistral_client(http) as client:
            assert client.responses.count_input_tokens(**asked).input_tokens == 3
        other = http.post("/v1/responses/input_tokens", json=ASK | {"model": "gpt"})
        nothing = http.post("/mistral/v1/responses/input_tokens", json={"model": MODEL})
    assert (other.status_code, other.json()["error"]["param"]) == (404, "model")
    assert (nothing.status_code, nothing.json()["error"]["param"]) == (400, "input")


def item(**fields) -> dict:
    return {"input": [fields]}


def content(*parts: dict) -> dict:
    return item(role="user", content=list(parts))


def choice(**fields) -> dict:
    return {"tools": [WEATHER], "tool_choice": fields}


REFUSED = {
    "background": ({"background": True}, "background"),
    "store": ({"store": True}, "store"),
    "previous response": ({"previous_response_id": "resp_1"}, "previous_response_id"),
    "conversation": ({"conversation": "conv_1"}, "conversation"),
    "prompt template": ({"prompt": {"id": "pmpt_1"}}, "prompt"),
    "moderation": ({"moderation": {"model": "m"}}, "moderation"),
    "truncation": ({"truncation": "auto"}, "truncation"),
    "no input": ({"input": []}, "input"),
    "built-in tool": ({"tools": [WEATHER, {"type": "web_search"}]}, "tools[1]"),
    "tool without name": ({"tools": [{"type": "function"}]}, "tools[0].name"),
    "tool choice": ({"tool_choice": "any"}, "tool_choice"),
    "built-in choice": ({"tool_choice": {"type": "web_search"}}, "tool_choice"),
    "unknown tool": (choice(type="function", name="f"), "tool_choice.name"),
    "required without tools": ({"tool_choice": "required"}, "tool_choice"),
    "no allowed tools": (choice(type="allowed_tools", mode="auto", tools=[]), "tool_choice.tools"),
    "allowed mode": (choice(type="allowed_tools", mode="none"), "tool_choice.mode"),
    "allowed built-in": (
        choice(type="allowed_tools", mode="auto", tools=[{"type": "mcp"}]),
        "tool_choice.tools[0]",
    ),
    "logprobs without include": ({"top_logprobs": 2}, "top_logprobs"),
    "text format": ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
    "no schema": ({"text": {"format": {"type": "json_schema", "name": "a"}}}, "text.format.schema"),
    "item reference": (item(type="item_reference", id="msg_1"), "input[0]"),
    "other item": (item(type="computer_call"), "input[0]"),
    "no role": (item(content="Hi"), "input[0].role"),
    "no content": (item(role="user"), "input[0].content"),
    "a call without id": (
        item(type="function_call", name="f", arguments="{}"),
        "input[0].call_id",
    ),
    "a result without id": (item(type="function_call_output", output=""), "input[0].call_id"),
    "a result without output": (
        item(type="function_call_output", call_id="abcDEF123"),
        "input[0].output",
    ),
    "a file": (content({"type": "input_file", "file_id": "f"}), "input[0].content[0]"),
    "a stored image": (
        content({"type": "input_image", "file_id": "f"}),
        "input[0].content[0].file_id",
    ),
    "an image over http": (
        content({"type": "input_image", "image_url": "http://example.com/cat.png"}),
        "input[0].content[0]",
    ),
    "an image without url": (content({"type": "input_image"}), "input[0].content[0].image_url"),
    "text without text": (content({"type": "input_text"}), "input[0].content[0].text"),
    "an assistant's image": (
        item(role="assistant", content=[{"type": "input_image", "image_url": PIXEL}]),
        "input[0].content[0]",
    ),
}
MISTYPED = {
    "top_p": {"top_p": "high"},
    "input": {"input": 5},
    "input[0].role": item(role="robot", content="Hi"),
    "input[0].content[0].type": content({"text": "Hi"}),
    "include[0]": {"include": ["everything"]},
    "metadata.a": {"metadata": {"a": 1}},
}


@pytest.fixture(scope="module")
def http():
    with face(ScriptedFrontend()) as client:
        yield client


@pytest.mark.parametrize(("fields", "param"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_served_is_refused_by_name(http, fields, param):
    answer = http.post("/v1/responses", json=ASK | fields)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
    assert answer.json()["error"]["message"].startswith(param)


@pytest.mark.parametrize(("param", "fields"), MISTYPED.items(), ids=MISTYPED)
def test_wrong_types_are_named(http, param, fields):
    answer = http.post("/v1/responses", json=ASK | fields)
    assert (answer.status_code, answer.json()["error"]["param"]) == (422, param)


def test_the_openai_client_reads_a_refusal(http):
    with openai_client(http) as client, pytest.raises(openai.BadRequestError) as told:
        client.responses.create(model=MODEL, input="Hi", store=True)
    assert (told.value.param, told.value.code) == ("store", "unsupported_value")


def test_the_mistral_client_reads_a_refusal(http):
    with mistral_client(http) as client, pytest.raises(mistral.errors.MistralError) as told:
        client.responses.create(model=MODEL, input="Hi", tool_choice="required")
    assert told.value.status_code == 400
