"""Forms of answers and choices of tools as clients of OpenAI, Mistral and vLLM write them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from ostro.actors.errors import InvalidRequestError
from ostro.cluster.generation import AnswerFormat, ChatGeneration, Constraint, ToolChoice
from ostro.cluster.openai_request import chat_generation, text_generation
from ostro.cluster.openai_schema import ChatCompletionRequest, CompletionRequest

SCHEMA = {"type": "object", "properties": {"z": {"type": "null"}, "a": {"type": "null"}}}
TOOLS = [{"type": "function", "function": {"name": name}} for name in ("f", "g", "h")]


def generation(**fields: Any) -> ChatGeneration:
    body = {"messages": [{"role": "user", "content": "hi"}], **fields}
    return chat_generation(ChatCompletionRequest.model_validate(body))


def function(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def allowed(*names: str, mode: str = "auto") -> dict[str, Any]:
    tools = [function(name) for name in names]
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}


@pytest.mark.parametrize(
    ("fields", "constraint", "text", "where"),
    [
        (
            {"response_format": {"type": "json_object"}},
            Constraint.JSON_OBJECT,
            "",
            "response_format",
        ),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": SCHEMA, "strict": False},
                }
            },
            Constraint.JSON_SCHEMA,
            json.dumps(SCHEMA),
            "response_format.json_schema.schema",
        ),
        (
            {"structured_outputs": {"json": SCHEMA}},
            Constraint.JSON_SCHEMA,
            json.dumps(SCHEMA),
            "structured_outputs.json",
        ),
        (
            {"structured_outputs": {"json": "{}"}},
            Constraint.JSON_SCHEMA,
            "{}",
            "structured_outputs.json",
        ),
        (
            {"structured_outputs": {"regex": "a+"}},
            Constraint.REGEX,
            "a+",
            "structured_outputs.regex",
        ),
        (
            {"structured_outputs": {"choice": ['say "a"', "b\n"]}},
            Constraint.LARK,
            'start: "say \\"a\\"" | "b\\n"',
            "structured_outputs.choice",
        ),
        (
            {"structured_outputs": {"grammar": 'start: "a"'}},
            Constraint.LARK,
            'start: "a"',
            "structured_outputs.grammar",
        ),
        (
            {"structured_outputs": {"json_object": True}},
            Constraint.JSON_OBJECT,
            "",
            "structured_outputs.json_object",
        ),
    ],
)
def test_forms_of_answers(
    fields: dict[str, Any], constraint: Constraint, text: str, where: str
) -> None:
    expected = AnswerFormat(constraint=constraint, text=text, where=where)
    assert generation(**fields).options.answer_format == expected
    body = CompletionRequest.model_validate({"prompt": "a", **fields})
    assert text_generation(body).options.answer_format == expected


def test_text_is_no_form() -> None:
    assert generation(response_format={"type": "text"}).options.answer_format is None


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (None, ToolChoice()),
        ("auto", ToolChoice()),
        ("none", ToolChoice(mode="none")),
        ("required", ToolChoice(mode="required")),
        ("any", ToolChoice(mode="required")),
        (function("g"), ToolChoice(mode="required", name="g")),
        ({"function": {"name": "g"}}, ToolChoice(mode="required", name="g")),
    ],
)
def test_choices_of_tools(choice: Any, expected: ToolChoice) -> None:
    asked = generation(tools=TOOLS, tool_choice=choice)
    assert (asked.tool_choice, len(asked.tools)) == (expected, 3)


@pytest.mark.parametrize("mode", ["auto", "required"])
def test_tools_that_are_not_allowed_are_left_out(mode: str) -> None:
    asked = generation(tools=TOOLS, tool_choice=allowed("h", "f", mode=mode))
    assert [tool.name for tool in asked.tools] == ["f", "h"]
    assert asked.tool_choice == ToolChoice(mode=mode)


def test_calls_one_at_a_time_and_strict_tools() -> None:
    strict = {"type": "function", "function": {"name": "f", "strict": True}}
    asked = generation(tools=[*TOOLS, strict], parallel_tool_calls=False)
    assert not asked.tool_choice.parallel
    assert [tool.strict for tool in asked.tools] == [False, False, False, True]


def test_a_tool_knows_the_place_of_its_parameters_whichever_are_left_out() -> None:
    (tool,) = generation(tools=TOOLS, tool_choice=allowed("h")).tools
    assert tool.where == "tools[2].function.parameters"


def test_defaults_that_clients_send_along_ask_for_no_form() -> None:
    along = outputs(regex="a", whitespace_pattern=None, disable_any_whitespace=False)
    answer_format = generation(guided_json=None, **along).options.answer_format
    assert answer_format is not None
    assert answer_format.where == "structured_outputs.regex"


def outputs(**fields: Any) -> dict[str, Any]:
    return {"structured_outputs": fields}


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "unknown type": ({"response_format": {"type": "xml"}}, "response_format.type"),
    "no schema": (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
        "response_format.json_schema.schema",
    ),
    "no form": (outputs(), "structured_outputs"),
    "two forms": (outputs(regex="a", choice=["a"]), "structured_outputs"),
    "no choice": (outputs(choice=[]), "structured_outputs.choice"),
    "gbnf": (outputs(grammar='root ::= "a"'), "structured_outputs.grammar"),
    "unknown form": (outputs(regex="a", structural_tag="x"), "structured_outputs.structural_tag"),
    "old names": ({"guided_json": {"type": "object"}}, "guided_json"),
    "both": (
        {"response_format": {"type": "json_object"}, **outputs(regex="a")},
        "structured_outputs",
    ),
    "unknown choice": ({"tool_choice": "maybe"}, "tool_choice"),
    "nameless": ({"tool_choice": {"type": "function"}}, "tool_choice"),
    "custom": ({"tool_choice": {"type": "custom"}}, "tool_choice"),
    "allowed nothing": ({"tool_choice": {"type": "allowed_tools"}}, "tool_choice"),
    "allowed none": ({"tool_choice": allowed()}, "tool_choice.allowed_tools.tools"),
    "allowed unknown": ({"tool_choice": allowed("x")}, "tool_choice.allowed_tools.tools"),
    "allowed mode": (
        {"tool_choice": allowed("f", mode="none")},
        "tool_choice.allowed_tools.mode",
    ),
}


@pytest.mark.parametrize(("fields", "param"), BAD.values(), ids=BAD)
def test_what_is_not_known_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequestError) as refusal:
        generation(tools=TOOLS, **fields)
    assert (refusal.value.code, refusal.value.param) == ("unsupported_value", param)
