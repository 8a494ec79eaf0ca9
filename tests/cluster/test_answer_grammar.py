"""Which answers a request's grammar takes, and which field is named where there can be none."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from scripted_cell import ARGS, EOS
from scripted_cell import CARD as SMALL
from scripted_cell import TOOL_CALLS as CALLS
from scripted_cell import VOCAB as VOCABULARY

from ostro.actors.engine.answer_grammar import AnswerGrammar
from ostro.actors.engine.grammar import MAX_GRAMMAR_BYTES, GrammarCompiler
from ostro.actors.engine.request import GrammarParams
from ostro.actors.errors import InvalidRequestError
from ostro.cluster.answer_grammar import AnswerGrammars
from ostro.cluster.generation import (
    AnswerFormat,
    ChatGeneration,
    ChatMessage,
    Constraint,
    GenerationOptions,
    Tool,
    ToolChoice,
)
from ostro.cluster.prompt import PromptBuilder

CARD = replace(SMALL, end_token_ids=(7,))
HELLO = ChatMessage(role="user", text="Hi")
PAIR: dict[str, object] = {
    "type": "object",
    "properties": {"b": {"type": "integer"}, "a": {"type": "boolean"}},
    "required": ["b"],
}
TOOLS = (
    Tool(name="add", parameters={"properties": {"x": {"type": "integer"}}, "required": ["x"]}),
    Tool(name="look-up", parameters={}),
)


@pytest.fixture(scope="module")
def grammars(prompts: PromptBuilder) -> AnswerGrammars:
    return AnswerGrammars(prompts, CARD)


class Language:
    """What a grammar takes: texts, and calls as (name, arguments)."""

    def __init__(self, params: GrammarParams | None, prompts: PromptBuilder) -> None:
        assert params is not None
        self.params = params
        self._prompts = prompts
        self._compiler = GrammarCompiler(prompts.model_dir, VOCABULARY)

    def takes(self, *parts: str | tuple[str, str]) -> bool:
        """Whether the parts make a whole answer."""
        matcher = self._compiler.compile(self.params.text).result(20)
        AnswerGrammar(matcher, self.params)
        token_ids: list[int] = []
        for part in parts:
            if isinstance(part, str):
                token_ids += self._prompts.text(part, add_bos=False)
            else:
                name, arguments = (self._prompts.text(text, add_bos=False) for text in part)
                token_ids += [CALLS, *name, ARGS, *arguments]
        return bool(matcher.try_consume_tokens(token_ids) == len(token_ids)) and bool(
            matcher.is_accepting()
        )


@pytest.fixture
def language(grammars: AnswerGrammars, prompts: PromptBuilder) -> Any:
    def of(
        answer: AnswerFormat | None = None,
        tools: tuple[Tool, ...] = (),
        prefix: str | None = None,
        **choice: Any,
    ) -> Language:
        messages = [HELLO]
        if prefix is not None:
            messages.append(ChatMessage(role="assistant", text=prefix, prefix=True))
        chat = ChatGeneration(
            messages=tuple(messages),
            tools=tools,
            tool_choice=ToolChoice(**choice),
            options=GenerationOptions(answer_format=answer),
        )
        return Language(grammars.chat(chat), prompts)

    return of


def schema(found: dict[str, object], **fields: Any) -> AnswerFormat:
    return AnswerFormat(constraint=Constraint.JSON_SCHEMA, text=json.dumps(found), **fields)


def regex(text: str) -> AnswerFormat:
    return AnswerFormat(constraint=Constraint.REGEX, text=text, where="regex")


def lark(text: str) -> AnswerFormat:
    return AnswerFormat(constraint=Constraint.LARK, text=text, where="lark")


def strict(*names: str) -> tuple[Tool, ...]:
    return tuple(
        Tool(name=tool.name, parameters=tool.parameters, strict=tool.name in names)
        for tool in TOOLS
    )


# ---- answers


def test_a_turn_of_which_nothing_is_asked_is_free(grammars: AnswerGrammars) -> None:
    for choice in (ToolChoice(), ToolChoice(mode="none", parallel=False)):
        chat = ChatGeneration(messages=(HELLO,), tools=TOOLS, tool_choice=choice)
        assert grammars.chat(chat) is None
    assert grammars.chat(ChatGeneration(messages=(HELLO,))) is None
    assert grammars.text(None) is None


def test_any_object_is_an_object(language: Any) -> None:
    form = language(AnswerFormat(constraint=Constraint.JSON_OBJECT))
    assert form.takes('{"a": [1, {}], "b": null}')
    assert not form.takes("[1]")
    assert not form.takes('{"a": }')
    assert not form.takes("It is {}")


@pytest.mark.parametrize(
    "text",
    [
        '{"b": 1}',
        '{"b":1,"a":true}',
        '\n{\n  "b": 1,\n  "a": false\n}',
        '{"b": 1, "more": "x"}',
    ],
)
def test_a_schema_takes_its_json_in_usual_layouts(language: Any, text: str) -> None:
    assert language(schema(PAIR)).takes(text)


@pytest.mark.parametrize(
    "text",
    ['{"a": true}', '{"a": true, "b": 1}', '{"b": "1"}', '{"b":  1}', '{"b": 1} '],
    ids=["required", "order", "type", "blanks", "after the end"],
)
def test_a_schema_takes_nothing_else(language: Any, text: str) -> None:
    assert not language(schema(PAIR)).takes(text)


def test_the_schema_may_set_options_of_the_compiler(language: Any) -> None:
    blanks = {"x-guidance": {"whitespace_flexible": False, "whitespace_pattern": None}}
    assert not language(schema({**PAIR, **blanks})).takes('{"b": 1}')
    either: dict[str, object] = {"oneOf": [{"type": "string"}, {"minLength": 3, "type": "string"}]}
    with pytest.raises(InvalidRequestError, match="oneOf"):
        language(schema(either))
    assert language(schema({**either, "x-guidance": {"coerce_one_of": True}})).takes('"abcd"')


@pytest.mark.parametrize("expression", ["[0-9]{2}/[a-z]+", "^[0-9]{2}/[a-z]+$"])
def test_an_expression_is_matched_as_a_whole(language: Any, expression: str) -> None:
    form = language(regex(expression))
    assert form.takes("12/ab")
    assert not form.takes("12/")
    assert not form.takes(" 12/ab")


def test_a_callers_grammar_has_rules_of_its_own(language: Any) -> None:
    form = language(lark('start: call "!"\ncall: "hi" | "ho"'), TOOLS)
    assert form.takes("ho!")
    assert form.takes(("add", '{"x": 1}'))
    assert not form.takes("add!")


def test_a_prefix_is_the_beginning_of_the_answer(language: Any) -> None:
    form = language(schema(PAIR), prefix='{"b": ')
    assert form.takes(" 12}")
    assert not form.takes('{"b": 12}')


@pytest.mark.parametrize("text", ["Sure: ", '{"a"', '{"b": 1}'])
def test_a_prefix_of_no_answer_is_refused(language: Any, text: str) -> None:
    with pytest.raises(InvalidRequestError) as refusal:
        language(schema({**PAIR, "additionalProperties": False}), prefix=text)
    assert refusal.value.param == "messages"


@pytest.mark.parametrize("text", ['{"a": ', "Hi  ", "a\n", "a \n "])
def test_a_prefix_is_told_to_the_grammar_as_it_stands_in_the_prompt(
    grammars: AnswerGrammars, prompts: PromptBuilder, text: str
) -> None:
    messages = (HELLO, ChatMessage(role="assistant", text=text, prefix=True))
    options = GenerationOptions(answer_format=regex("(.|\n)+"))
    params = grammars.chat(ChatGeneration(messages=messages, options=options))
    assert params is not None
    prompt = prompts.chat(messages, (), "none").token_ids
    assert tuple(prompt[-len(params.prefix_token_ids) :]) == params.prefix_token_ids


def test_thinking_is_held_to_its_end_mark(grammars: AnswerGrammars) -> None:
    chat = ChatGeneration(messages=(HELLO,), options=GenerationOptions(answer_format=regex("a")))
    params = grammars.chat(chat)
    assert params is not None
    assert set(params.held_token_ids) == {EOS, 7, CALLS}


def test_a_raw_continuation_is_held_too(grammars: AnswerGrammars, prompts: PromptBuilder) -> None:
    form = Language(grammars.text(schema(PAIR)), prompts)
    assert form.takes('{"b": 3}')
    assert not form.takes("b")


# ---- calls


def test_a_required_call_is_made_with_arguments_of_its_schema(language: Any) -> None:
    form = language(tools=TOOLS, mode="required")
    assert form.takes(("add", '{"x": 3}'))
    assert form.takes(("look-up", "{}"), ("add", '{"x": 3}'))
    assert not form.takes("I will not")
    assert not form.takes(("add", "{}"))
    assert not form.takes(("add", '{"x": 3, "y": 4}'))
    assert not form.takes(("subtract", "{}"))


def test_a_named_tool_is_called_once(language: Any) -> None:
    form = language(tools=TOOLS, mode="required", name="add")
    assert form.takes(("add", '{"x": 3}'))
    assert not form.takes(("look-up", "{}"))
    assert not form.takes(("add", '{"x": 3}'), ("add", '{"x": 3}'))


def test_one_call_alone_where_calls_are_not_to_be_parallel(language: Any) -> None:
    form = language(tools=TOOLS, parallel=False)
    assert form.takes("Let me see", ("add", '{"any": "thing"}'))
    assert form.takes("No")
    assert not form.takes(("add", "{}"), ("add", "{}"))


def test_strict_tools_get_arguments_of_their_schema_and_others_any(language: Any) -> None:
    form = language(tools=strict("add"))
    assert form.takes("Text {}")
    assert form.takes("Text", ("look-up", '{"any": 1}'), ("add", '{"x": 3}'))
    assert not form.takes(("add", '{"any": 1}'))


def test_an_answer_of_a_form_or_calls_and_no_other_text(language: Any) -> None:
    form = language(schema(PAIR), TOOLS)
    assert form.takes('{"b": 1}')
    assert form.takes(("add", '{"x": 1}'))
    assert not form.takes("Well", ("add", '{"x": 1}'))
    assert not form.takes('{"b": 1}', ("add", '{"x": 1}'))


def test_a_required_call_leaves_no_room_for_an_answer(language: Any) -> None:
    form = language(schema(PAIR), TOOLS, mode="required")
    assert not form.takes('{"b": 1}')
    assert form.takes(("look-up", "{}"))


def test_a_schema_says_itself_which_further_arguments_there_may_be(language: Any) -> None:
    open_ended = Tool(name="f", parameters={"type": "object", "additionalProperties": True})
    either = Tool(name="g", parameters={"anyOf": [PAIR, {"type": "object", "maxProperties": 0}]})
    form = language(tools=(open_ended, either), mode="required")
    assert form.takes(("f", '{"any": 1}'))
    assert form.takes(("g", '{"b": 1, "c": 2}'))


# ---- refusals


def deep() -> dict[str, object]:
    found: dict[str, object] = {"type": "string"}
    for _ in range(300):
        found = {"type": "array", "items": found}
    return found


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (schema({"type": "objekt"}), "objekt"),
        (schema({"$ref": "http://127.0.0.1/x"}), "retriev"),
        (schema(deep()), "recursion|deep"),
        (schema({"x-guidance": 3}), "x-guidance"),
        (AnswerFormat(constraint=Constraint.JSON_SCHEMA, text="[1]"), "object"),
        (AnswerFormat(constraint=Constraint.JSON_SCHEMA, text="{"), "object"),
        (AnswerFormat(constraint=Constraint.JSON_SCHEMA, text='{"a": "\ud800"}'), "object"),
        (regex("(a"), "unclosed"),
        (regex("(?=a)b"), "look"),
        (regex("\ud800"), "Unicode"),
        (lark("start: b"), "unknown name"),
        (lark("start: @arguments0"), "arguments0"),
        (lark('start: "' + "a" * MAX_GRAMMAR_BYTES + '"'), "at most"),
    ],
)
def test_forms_that_make_no_sense_are_refused_by_name(
    language: Any, answer: AnswerFormat, why: str
) -> None:
    with pytest.raises(InvalidRequestError, match=why) as refusal:
        language(answer)
    assert refusal.value.param == answer.where


@pytest.mark.parametrize(
    ("tools", "choice", "param"),
    [
        (TOOLS, {"mode": "maybe"}, "tool_choice"),
        ((), {"mode": "required"}, "tool_choice"),
        (TOOLS, {"mode": "required", "name": "divide"}, "tool_choice"),
        (
            (*TOOLS, Tool(name="f", parameters={"type": "array"}, strict=True)),
            {},
            "tools[2].function.parameters",
        ),
        (
            (*TOOLS, Tool(name="f", parameters={"properties": {"a": {"type": "x"}}})),
            {"mode": "required"},
            "tools[2].function.parameters",
        ),
    ],
)
def test_choices_and_schemas_of_tools_are_refused_by_name(
    language: Any, tools: tuple[Tool, ...], choice: dict[str, Any], param: str
) -> None:
    with pytest.raises(InvalidRequestError) as refusal:
        language(tools=tools, **choice)
    assert refusal.value.param == param


def test_tools_that_are_too_much_together_are_refused(language: Any) -> None:
    tools = tuple(
        Tool(name=f"f{i}", parameters={"description": "d" * 5000}, strict=True) for i in range(80)
    )
    with pytest.raises(InvalidRequestError, match="at most") as refusal:
        language(tools=tools)
    assert refusal.value.param == "tools"
