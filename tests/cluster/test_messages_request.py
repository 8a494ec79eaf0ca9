"""Bodies of the Anthropic dialect to the requests of `generation`."""

from __future__ import annotations

import json

import pytest
from pydantic import ValidationError

from ostro.actors.errors import InvalidRequestError
from ostro.cluster.generation import AnswerFormat, Constraint, ToolChoice
from ostro.cluster.messages_request import message_generation
from ostro.cluster.messages_schema import MessagesRequest
from ostro.cluster.wire_schema import ignored_fields

HI = {"role": "user", "content": "hi"}
PNG = "iVBORw0KGgo="
SCHEMA = {"type": "object", "properties": {"b": {}, "a": {}}}
TOOL = {"name": "weather", "description": "Of a city", "input_schema": SCHEMA}


def generation(*messages, **fields):
    body = {"model": "m", "max_tokens": 9, "messages": list(messages) or [HI], **fields}
    return message_generation(MessagesRequest.model_validate(body))


def use(call_id="toolu_abcDEF123", **fields):
    return {
        "type": "tool_use",
        "id": call_id,
        "name": "weather",
        "input": {"city": "Oslo"},
    } | fields


def result(content, call_id="toolu_abcDEF123", **fields):
    return {"type": "tool_result", "tool_use_id": call_id, "content": content} | fields


def user(*blocks):
    return {"role": "user", "content": list(blocks)}


def assistant(*blocks):
    return {"role": "assistant", "content": list(blocks)}


def text(text):
    return {"type": "text", "text": text}


def image(**source):
    return {"type": "image", "source": source}


def test_what_is_not_asked_for_stays_unset():
    asked = generation()
    assert (asked.options.effort, asked.options.temperature, asked.options.stop) == (None, None, ())
    assert (asked.options.answer_format, asked.tool_choice) == (None, ToolChoice())
    assert asked.options.request_id.startswith("msg_")


def test_every_option_arrives():
    options = generation(
        temperature=0.5, top_p=0.9, top_k=5, stop_sequences=["END"], max_tokens=7
    ).options
    assert (options.temperature, options.top_p, options.top_k) == (0.5, 0.9, 5)
    assert (options.stop, options.max_tokens) == (("END",), 7)


@pytest.mark.parametrize(
    "system", ["Be kind.\n\nBe brief.", [text("Be kind."), text("Be brief.")]], ids=type
)
def test_a_system_prompt_comes_first_its_blocks_as_paragraphs(system):
    first, second = generation(system=system).messages
    assert (first.role, first.text) == ("system", "Be kind.\n\nBe brief.")
    assert (second.role, second.text) == ("user", "hi")


def test_a_system_message_may_stand_among_the_others():
    messages = generation(HI, {"role": "system", "content": "Be brief."}, HI).messages
    assert [message.role for message in messages] == ["user", "system", "user"]


def test_images_keep_their_places_in_the_text():
    (message,) = generation(
        user(
            text("See "),
            image(type="base64", media_type="image/png", data=PNG),
            text("and "),
            image(type="url", url=f"data:image/png;base64,{PNG}"),
        )
    ).messages
    assert message.text == "See and "
    assert [(file.data, file.at) for file in message.images] == [(PNG, 4), (PNG, 8)]
    assert message.images[1].where == "messages[0].content[3]"


def test_a_turn_with_tools_becomes_messages_of_the_tool():
    messages = generation(
        HI,
        assistant(text("I look."), use(), use("toolu_other", name="time")),
        user(
            result("rainy"),
            result([text("broken "), text("clock")], "toolu_other", is_error=True),
            text("And now?"),
        ),
    ).messages
    assert [message.role for message in messages] == ["user", "assistant", "tool", "tool", "user"]
    calls = messages[1].tool_calls
    assert [call.name for call in calls] == ["weather", "time"]
    assert calls[0].call_id == "abcDEF123"
    assert json.loads(calls[0].arguments) == {"city": "Oslo"}
    assert [message.tool_call_id for message in messages[2:4]] == [call.call_id for call in calls]
    assert [message.text for message in messages[2:]] == [
        "rainy",
        "Error: broken clock",
        "And now?",
    ]
    assert messages[3].where == "messages[2].content[1]"


def test_a_result_may_be_an_image_or_nothing():
    seen, empty = generation(
        HI,
        assistant(use()),
        user(result([image(type="base64", data=PNG)]), result(None)),
    ).messages[2:]
    assert seen.images[0].where == "messages[2].content[0].content[0]"
    assert (seen.images[0].at, empty.text) == (0, "")


def test_an_image_in_a_failed_result_stands_behind_the_word():
    message = generation(
        HI, assistant(use()), user(result([image(type="base64", data=PNG)], is_error=True))
    ).messages[2]
    assert (message.text, message.images[0].at) == ("Error: ", 7)


def test_thinking_is_replayed_and_what_is_sealed_is_left_out():
    message = generation(
        HI,
        assistant(
            {"type": "redacted_thinking", "data": "EqQB"},
            {"type": "thinking", "thinking": "Hm.", "signature": "of another server"},
            text("Yes."),
        ),
        HI,
    ).messages[1]
    assert (message.thinking, message.text, message.prefix) == ("Hm.", "Yes.", False)


def test_a_last_assistant_message_is_continued():
    assert generation(HI, {"role": "assistant", "content": "The answer is"}).messages[-1].prefix
    last = generation(HI, assistant({"type": "thinking", "thinking": "Hm."})).messages[-1]
    assert (last.prefix, last.thinking_closed) == (True, True)


def test_custom_tools_are_offered():
    tools = generation(tools=[TOOL, TOOL | {"type": "custom", "strict": True}]).tools
    assert [(tool.name, tool.description) for tool in tools] == [("weather", "Of a city")] * 2
    assert [tool.strict for tool in tools] == [False, True]
    assert tools[0].parameters == SCHEMA
    assert tools[0].where == "tools[0].input_schema"


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ({"type": "auto"}, ToolChoice()),
        ({"type": "none"}, ToolChoice(mode="none")),
        ({"type": "any"}, ToolChoice(mode="required")),
        ({"type": "tool", "name": "weather"}, ToolChoice(mode="required", name="weather")),
        ({"type": "auto", "disable_parallel_tool_use": True}, ToolChoice(parallel=False)),
    ],
)
def test_tool_choices_are_ours(choice, expected):
    assert generation(tools=[TOOL], tool_choice=choice).tool_choice == expected


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, (None, None, False)),
        ({"output_config": {"effort": "low"}}, ("low", None, False)),
        ({"thinking": {"type": "disabled"}, "output_config": {"effort": "max"}}, ("none", None, 0)),
        ({"thinking": {"type": "adaptive"}}, ("high", None, False)),
        ({"thinking": {"type": "adaptive"}, "output_config": {"effort": "low"}}, ("low", None, 0)),
        ({"thinking": {"type": "enabled", "budget_tokens": 2048}}, ("high", 2048, False)),
        ({"thinking": {"type": "adaptive", "display": "omitted"}}, ("high", None, True)),
    ],
)
def test_thinking_and_effort_are_ours(fields, expected):
    options = generation(**fields).options
    assert (options.effort, options.thinking_token_budget, options.omit_thinking) == expected


@pytest.mark.parametrize(
    ("fields", "ignored"),
    [
        ({"thinking": {"type": "disabled"}, "output_config": {"effort": "high"}}, "effort"),
        ({"thinking": {"type": "adaptive", "budget_tokens": 2048}}, "budget_tokens"),
        ({"thinking": {"type": "disabled", "display": "omitted"}}, "display"),
        ({"thinking": {"type": "adaptive", "display": "summarized"}}, "display"),
    ],
)
def test_what_thinking_does_not_heed_is_named(fields, ignored):
    body = {"model": "m", "max_tokens": 9, "messages": [HI], **fields}
    (path,) = ignored_fields(MessagesRequest.model_validate(body))
    assert path.rpartition(".")[2] == ignored


def test_a_schema_constrains_the_answer_in_the_order_of_its_properties():
    form = {"type": "json_schema", "schema": SCHEMA}
    assert generation(output_config={"format": form}).options.answer_format == AnswerFormat(
        constraint=Constraint.JSON_SCHEMA, text=json.dumps(SCHEMA), where="output_config.format"
    )


REFUSED = {
    "server tool": (
        {"tools": [{"type": "web_search_20250305", "name": "web_search"}]},
        "tools[0]",
    ),
    "tool without schema": ({"tools": [{"name": "f"}]}, "tools[0].input_schema"),
    "choice without name": ({"tool_choice": {"type": "tool"}}, "tool_choice.name"),
    "budget missing": ({"thinking": {"type": "enabled"}}, "thinking.budget_tokens"),
    "budget of nothing": (
        {"thinking": {"type": "enabled", "budget_tokens": 0}},
        "thinking.budget_tokens",
    ),
    "document": (
        {"messages": [user({"type": "document", "source": {"type": "text"}})]},
        "messages[0].content[0]",
    ),
    "call of a user": ({"messages": [user(use())]}, "messages[0].content[0]"),
    "result of an assistant": (
        {"messages": [HI, assistant(result("x"))]},
        "messages[1].content[0]",
    ),
    "result in a result": (
        {"messages": [user(result([result("x")]))]},
        "messages[0].content[0].content[0]",
    ),
    "image in the system prompt": (
        {"system": [image(type="base64", data=PNG)]},
        "system[0]",
    ),
    "file": ({"messages": [user(image(type="file", file_id="f"))]}, "messages[0].content[0]"),
    "image over http": (
        {"messages": [user(image(type="url", url="http://example.com/a.png"))]},
        "messages[0].content[0]",
    ),
    "source missing": ({"messages": [user({"type": "image"})]}, "messages[0].content[0].source"),
    "data missing": (
        {"messages": [user(image(type="base64"))]},
        "messages[0].content[0].source.data",
    ),
    "text missing": ({"messages": [user({"type": "text"})]}, "messages[0].content[0].text"),
    "call without input": (
        {"messages": [HI, assistant(use(input=None))]},
        "messages[1].content[0].input",
    ),
    "result without call": (
        {"messages": [user(result("x", None))]},
        "messages[0].content[0].tool_use_id",
    ),
}


@pytest.mark.parametrize(("fields", "param"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_served_is_refused_by_its_place(fields, param):
    with pytest.raises(InvalidRequestError) as refused:
        generation(**fields)
    assert refused.value.param == param
    assert refused.value.message.startswith(param)


@pytest.mark.parametrize(
    "fields",
    [{"max_tokens": None}, {"messages": []}, {"thinking": {"type": "between_tools"}}],
    ids=str,
)
def test_a_body_of_wrong_types_is_no_request(fields):
    with pytest.raises(ValidationError):
        generation(**fields)


def test_what_is_without_effect_is_known_and_the_rest_is_named():
    mark = {"type": "ephemeral"}
    body = MessagesRequest.model_validate(
        {
            "model": "m",
            "max_tokens": 9,
            "messages": [user(text("hi") | {"cache_control": mark})],
            "system": [text("s") | {"cache_control": mark}],
            "tools": [TOOL | {"cache_control": mark, "input_examples": []}],
            "metadata": {"user_id": "u"},
            "service_tier": "auto",
            "context_management": {},
        }
    )
    assert sorted(ignored_fields(body)) == ["context_management", "tools[0].input_examples"]
