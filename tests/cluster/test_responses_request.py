"""Items of /v1/responses as conversations, and its options as ours."""

from __future__ import annotations

import base64

import pytest

from ostro.actors.errors import InvalidRequestError
from ostro.cluster.error_table import in_words_of
from ostro.cluster.generation import ChatGeneration, Constraint, ToolChoice
from ostro.cluster.responses_fields import OWN_NAMES
from ostro.cluster.responses_request import chat_generation
from ostro.cluster.responses_schema import ResponsesRequest

PIXEL = "data:image/png;base64," + base64.b64encode(b"png").decode()
TOOLS = [{"type": "function", "name": name, "parameters": {}} for name in ("f", "g")]
USER = {"type": "message", "role": "user", "content": "Hi"}
THINKING = {
    "type": "reasoning",
    "summary": [],
    "content": [{"type": "reasoning_text", "text": "Hm."}],
}
CALL = {"type": "function_call", "call_id": "call_1", "name": "f", "arguments": "{}"}
RESULT = {"type": "function_call_output", "call_id": "call_1", "output": "1"}


def said(text: str) -> dict:
    return {"role": "assistant", "content": [{"type": "output_text", "text": text}]}


def generation(*items: dict, **fields) -> ChatGeneration:
    body = {"input": list(items) or "Hi", **fields}
    return chat_generation(ResponsesRequest.model_validate(body))


def test_instructions_come_first_and_a_string_is_the_user() -> None:
    system, user = generation(instructions="Be brief.").messages
    assert (system.role, system.text, system.where) == ("system", "Be brief.", "instructions")
    assert (user.role, user.text, user.where) == ("user", "Hi", "input")


@pytest.mark.parametrize(
    ("items", "turns"),
    [
        ([THINKING, said("a"), CALL], [("Hm.", "a", 1)]),
        ([THINKING, CALL], [("Hm.", "", 1)]),
        ([said("a"), CALL, CALL | {"call_id": "call_2"}], [(None, "a", 2)]),
        ([THINKING, THINKING, said("a")], [("Hm.Hm.", "a", 0)]),
        ([said("a"), said("b")], [(None, "a", 0), (None, "b", 0)]),
        ([said("a"), THINKING, said("b")], [(None, "a", 0), ("Hm.", "b", 0)]),
        ([CALL, THINKING], [(None, "", 1), ("Hm.", "", 0)]),
        ([THINKING | {"content": None}, said("a")], [(None, "a", 0)]),
        ([{"role": "assistant", "content": "a", "phase": "commentary"}], [(None, "a", 0)]),
        ([said("") | {"content": [{"type": "refusal", "refusal": "No."}]}], [(None, "No.", 0)]),
    ],
)
def test_items_in_the_order_of_a_turn_are_one_message(items, turns) -> None:
    messages = generation(USER, *items, USER).messages
    assert [message.role for message in messages] == [
        "user",
        *["assistant"] * len(turns),
        "user",
    ]
    told = [(m.thinking, m.text, len(m.tool_calls)) for m in messages[1:-1]]
    assert told == turns


def test_calls_and_results_find_each_other_and_know_their_places() -> None:
    _, turn, result = generation(USER, THINKING, CALL, RESULT).messages
    assert turn.where == "input[1]"
    assert result.where == "input[3]"
    assert result.tool_call_id == turn.tool_calls[0].call_id
    assert len(result.tool_call_id or "") == 9


def test_images_stand_where_they_stood_in_the_text() -> None:
    image = {"type": "input_image", "image_url": PIXEL, "detail": "auto"}
    parts = [{"type": "input_text", "text": "See"}, image, {"type": "input_text", "text": "!"}]
    user, _, result = generation(
        USER | {"content": parts}, CALL, RESULT | {"output": [image]}
    ).messages
    assert (user.text, user.images[0].at) == ("See!", 3)
    assert user.images[0].where == "input[0].content[1]"
    assert result.images[0].where == "input[2].output[0]"


def test_options_are_ours() -> None:
    options = generation(
        reasoning={"effort": "high"},
        max_output_tokens=5,
        temperature=0.5,
        top_p=0.9,
        top_k=-1,
        stop="\n",
        min_tokens=2,
        ignore_eos=True,
        seed=7,
        prompt_cache_key="key",
        include=["message.output_text.logprobs"],
        top_logprobs=4,
        thinking_token_budget=3,
    ).options
    assert (options.effort, options.max_tokens, options.thinking_token_budget) == ("high", 5, 3)
    assert (options.temperature, options.top_p, options.top_k) == (0.5, 0.9, 0)
    assert (options.stop, options.seed, options.cache_key) == (("\n",), 7, "key")
    assert (options.num_logprobs, options.min_tokens, options.ignore_eos) == (4, 2, True)


@pytest.mark.parametrize(
    ("form", "constraint", "text"),
    [
        ({"type": "json_object"}, Constraint.JSON_OBJECT, ""),
        (
            {"type": "json_schema", "name": "a", "schema": {"b": {}, "a": "\u00e9"}},
            Constraint.JSON_SCHEMA,
            '{"b": {}, "a": "\u00e9"}',
        ),
    ],
)
def test_the_form_of_the_answer_keeps_the_order_of_its_schema(form, constraint, text) -> None:
    asked = generation(text={"format": form}).options.answer_format
    assert asked is not None
    assert (asked.constraint, asked.text, asked.where) == (constraint, text, "text.format")


def test_text_needs_no_form() -> None:
    assert generation(text={"format": {"type": "text"}}).options.answer_format is None


def allowed(mode: str, *names: str) -> dict:
    tools = [{"type": "function", "name": name} for name in names]
    return {"type": "allowed_tools", "mode": mode, "tools": tools}


@pytest.mark.parametrize(
    ("choice", "expected", "names"),
    [
        (None, ToolChoice(), ["f", "g"]),
        ("none", ToolChoice(mode="none"), ["f", "g"]),
        ("required", ToolChoice(mode="required"), ["f", "g"]),
        (
            {"type": "function", "name": "g"},
            ToolChoice(mode="required", name="g"),
            ["f", "g"],
        ),
        (allowed("auto", "g"), ToolChoice(), ["g"]),
        (allowed("required", "g", "f"), ToolChoice(mode="required"), ["f", "g"]),
    ],
)
def test_tool_choices(choice, expected, names) -> None:
    asked = generation(tools=TOOLS, tool_choice=choice)
    assert asked.tool_choice == expected
    assert [tool.name for tool in asked.tools] == names


def test_parallel_calls_can_be_forbidden() -> None:
    assert not generation(tools=TOOLS, parallel_tool_calls=False).tool_choice.parallel


@pytest.mark.parametrize(
    ("param", "message", "own_param", "own_message"),
    [
        ("messages", "messages: too long", "input", "input: too long"),
        ("messages", "these messages are odd", "input", "these messages are odd"),
        ("reasoning_effort", "reasoning_effort must", "reasoning.effort", "reasoning.effort must"),
        ("temperature", "temperature must", "temperature", "temperature must"),
        (None, "no", None, "no"),
    ],
)
def test_refusals_are_told_in_the_words_of_the_dialect(
    param, message, own_param, own_message
) -> None:
    told = in_words_of(InvalidRequestError(message, code="odd", param=param), OWN_NAMES)
    assert (told.param, told.message, told.code) == (own_param, own_message, "odd")
