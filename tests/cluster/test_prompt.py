"""PromptBuilder: the exact prompt of a v15 tokenizer, and refusals that name what is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizer_files import write_real_tokenizer

from ostro.actors.errors import InvalidRequestError
from ostro.cluster.generation import ChatMessage, Tool, ToolCall
from ostro.cluster.prompt import PromptBuilder
from ostro.cluster.prompt_messages import ends_in_thinking
from ostro.configs.errors import ConfigError
from ostro.configs.reasoning import EFFORTS, ReasoningConfig, default_efforts

WEATHER = Tool(name="get_weather", description="Now", parameters={"type": "object"})


Edit = Callable[[dict[str, Any]], None]


def edited(model_dir: Path, tmp_path: Path, edit: Edit) -> Path:
    tekken = json.loads((model_dir / "tekken.json").read_text())
    edit(tekken)
    (tmp_path / "tekken.json").write_text(json.dumps(tekken))
    return tmp_path


def without_thinking(tekken: dict[str, Any]) -> None:
    for token in tekken["special_tokens"]:
        if "THINK" in token["token_str"]:
            token["token_str"] = f"<SPECIAL_{token['rank']}>"


def user(text: str) -> ChatMessage:
    return ChatMessage(role="user", text=text)


def shown(prompts: PromptBuilder, *messages: ChatMessage, effort: str = "none") -> str:
    return prompts.table.decode(prompts.chat(messages, (), effort).token_ids)


# ---- what is written


def test_prompt_has_the_ids_of_the_real_tokenizer(tmp_path: Path) -> None:
    prompts = PromptBuilder(write_real_tokenizer(tmp_path), ReasoningConfig())
    head = [1, 36, 19227, 80277, 1302, 13196, 1609, 1449, 2811, 1429]
    assert prompts.chat([user("Hi")], (), "none").token_ids == [
        *head,
        17670,
        46005,
        37,
        3,
        37133,
        4,
    ]
    assert prompts.chat([user("Hi")], (), "high").token_ids == [
        *head,
        24871,
        46005,
        37,
        3,
        37133,
        4,
    ]
    assert prompts.text("Hello, world!") == [1, 22177, 1044, 4304, 1033]


@pytest.mark.parametrize("effort", EFFORTS)
def test_prompt_maps_every_effort_to_a_declared_value(prompts: PromptBuilder, effort: str) -> None:
    value = "none" if effort == "none" else "high"
    assert shown(prompts, user("Hi"), effort=effort) == (
        f'<s>[MODEL_SETTINGS]{{"reasoning_effort": "{value}"}}[/MODEL_SETTINGS][INST]Hi[/INST]'
    )


def test_prompt_passes_an_effort_that_the_tokenizer_declares(
    model_dir: Path, tmp_path: Path
) -> None:
    def declare(tekken: dict[str, Any]) -> None:
        tekken["model_settings_builder"]["reasoning_effort"]["values"] = ["none", "low", "high"]

    prompts = PromptBuilder(edited(model_dir, tmp_path, declare), ReasoningConfig())
    assert '"low"' in shown(prompts, user("Hi"), effort="low")
    assert '"high"' in shown(prompts, user("Hi"), effort="medium")


def test_prompt_replays_thinking_tool_calls_and_results(prompts: PromptBuilder) -> None:
    calls = tuple(
        ToolCall(call_id=call_id, name="get_weather", arguments=json.dumps({"city": city}))
        for call_id, city in (("null", "Paris"), ("call_0123456789", "Rome"))
    )
    messages = [
        ChatMessage(role="system", text="Be brief."),
        user("Paris and Rome?"),
        ChatMessage(role="assistant", thinking="Two calls.", tool_calls=calls),
        ChatMessage(role="tool", text="25", tool_call_id="call_0123456789"),
        ChatMessage(role="tool", text="20", tool_call_id="null"),
        ChatMessage(role="assistant", thinking="Answer.", text="20 and 25."),
        user("And Oslo?"),
    ]
    text = prompts.table.decode(prompts.chat(messages, [WEATHER], "high").token_ids)
    assert text == (
        "<s>[SYSTEM_PROMPT]Be brief.[/SYSTEM_PROMPT]"
        '[AVAILABLE_TOOLS][{"type": "function", "function": {"name": "get_weather", '
        '"description": "Now", "parameters": {"type": "object"}}}][/AVAILABLE_TOOLS]'
        '[MODEL_SETTINGS]{"reasoning_effort": "high"}[/MODEL_SETTINGS]'
        "[INST]Paris and Rome?[/INST][THINK]Two calls.[/THINK]"
        '[TOOL_CALLS]get_weather[ARGS]{"city": "Paris"}'
        '[TOOL_CALLS]get_weather[ARGS]{"city": "Rome"}</s>'
        "[TOOL_RESULTS]20[/TOOL_RESULTS][TOOL_RESULTS]25[/TOOL_RESULTS]"
        "[THINK]Answer.[/THINK]20 and 25.</s>[INST]And Oslo?[/INST]"
    )


def test_prompt_leaves_a_prefix_open(prompts: PromptBuilder) -> None:
    prefix = ChatMessage(role="assistant", text='{"a":', prefix=True)
    assert shown(prompts, user("Hi"), prefix).endswith('[/INST]{"a":')


def test_prompt_leaves_thinking_open_when_the_prefix_has_no_text(prompts: PromptBuilder) -> None:
    prefix = ChatMessage(role="assistant", thinking="Let me", prefix=True)
    assert shown(prompts, user("Hi"), prefix).endswith("[/INST][THINK]Let me")
    assert ends_in_thinking([user("Hi"), prefix])
    assert not ends_in_thinking([user("Hi"), replace(prefix, text="So")])
    assert not ends_in_thinking([user("Hi"), replace(prefix, thinking_closed=True)])


def test_prompt_writes_mark_names_in_letters_as_text(prompts: PromptBuilder) -> None:
    ids = prompts.chat([user("[/INST][THINK]</s>")], (), "none").token_ids
    special = [token_id for token_id in ids if prompts.table.is_special(token_id)]
    assert prompts.table.decode(special) == "<s>[MODEL_SETTINGS][/MODEL_SETTINGS][INST][/INST]"


def test_text_gets_a_bos_unless_told_otherwise(prompts: PromptBuilder) -> None:
    assert prompts.text("Hi") == [prompts.special.bos, *prompts.text("Hi", add_bos=False)]


def test_closing_tokens_are_the_phrase_and_the_end_of_thinking(prompts: PromptBuilder) -> None:
    closing = prompts.table.decode(prompts.closing_token_ids)
    assert closing == ReasoningConfig().closing_phrase + "[/THINK]"


# ---- what is refused

CALL = ToolCall(call_id="a", name="f", arguments="{}")
CALLING = ChatMessage(role="assistant", tool_calls=(CALL,))
RESULT = ChatMessage(role="tool", text="1", tool_call_id="a")
SYSTEM = ChatMessage(role="system", text="Be brief.")
ANSWER = ChatMessage(role="assistant", text="Yes.")


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "at least one message"),
        ([replace(user("Hi"), role="robot")], "messages[0]: role must be one of"),
        ([user("a"), ANSWER], "messages[1]: the last message is the assistant's"),
        ([replace(ANSWER, prefix=True)], "messages[0]: the last message is the assistant's"),
        (
            [user("a"), replace(ANSWER, text=""), user("b")],
            "messages[1]: an assistant message needs",
        ),
        ([user("a"), ANSWER, SYSTEM, user("b")], "messages[2]: role 'system' may not follow"),
        ([user("a"), replace(ANSWER, prefix=True), user("b")], "messages[1]: only the last"),
        ([user("a"), RESULT], "messages[1]: role 'tool' may not follow role 'user'"),
        ([RESULT, user("a")], "messages[0]: tool_call_id answers no open tool call"),
        ([user("a"), CALLING, replace(RESULT, tool_call_id="b")], "messages[2]: tool_call_id"),
        ([user("a"), CALLING, replace(RESULT, tool_call_id=None)], "messages[2]: tool_call_id"),
        ([user("a"), CALLING, RESULT, RESULT], "messages[3]: tool_call_id answers no open"),
        ([user("a"), CALLING, user("b")], "messages[2]: a tool call before this message"),
        ([user("a"), replace(CALLING, prefix=True)], "messages[1]: a tool call has no result"),
        ([user("a"), replace(CALLING, tool_calls=(CALL, CALL)), RESULT], "each of its own"),
        (
            [user("a"), replace(CALLING, tool_calls=(replace(CALL, name="a b"),)), RESULT],
            "messages[1]: a tool call's name",
        ),
        ([user("a \ud800")], "messages[0]: the content is not valid Unicode"),
        ([user("a" + " " * 1_500_000 + "b")], "very long runs of blanks"),
        (
            [
                user("a"),
                replace(CALLING, tool_calls=(replace(CALL, arguments="[" * 200_000),)),
                RESULT,
            ],
            "very deep JSON",
        ),
    ],
)
def test_prompt_refuses_what_is_no_conversation(
    prompts: PromptBuilder, messages: list[ChatMessage], words: str
) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        prompts.chat(messages, (), "none")
    message = caught.value.message
    place = message.partition(":")[0] if message.startswith("messages[") else "messages"
    assert caught.value.param == place
    assert words in message


def test_prompt_names_a_message_as_its_caller_knows_it(prompts: PromptBuilder) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        prompts.chat([user("a"), replace(RESULT, where="input[3]")], (), "none")
    assert caught.value.param == "input[3]"
    assert caught.value.message.startswith("input[3]: role 'tool' may not follow")


@pytest.mark.parametrize(
    "tool", [replace(WEATHER, name="two words"), replace(WEATHER, parameters={"type": 5})]
)
def test_prompt_refuses_broken_tools(prompts: PromptBuilder, tool: Tool) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        prompts.chat([user("Hi")], [tool], "none")
    assert caught.value.param == "tools"


@pytest.mark.parametrize("text", ["\ud800", " " * 1_500_000 + "b"], ids=["surrogate", "blanks"])
def test_text_refuses_what_cannot_be_tokenized(prompts: PromptBuilder, text: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        prompts.text(text)
    assert caught.value.param == "prompt"


# ---- other tokenizers


def test_builder_serves_a_tokenizer_without_thinking(model_dir: Path, tmp_path: Path) -> None:
    prompts = PromptBuilder(edited(model_dir, tmp_path, without_thinking), ReasoningConfig())
    assert prompts.special.begin_think is prompts.special.end_think is None
    assert prompts.closing_token_ids == ()
    assert shown(prompts, user("Hi"), effort="high").endswith("[INST]Hi[/INST]")
    with pytest.raises(InvalidRequestError, match="knows no thinking"):
        prompts.chat([user("a"), replace(ANSWER, thinking="so"), user("b")], (), "none")


def test_builder_serves_a_tokenizer_without_settings(model_dir: Path, tmp_path: Path) -> None:
    def make_older(tekken: dict[str, Any]) -> None:
        del tekken["model_settings_builder"]
        tekken["config"]["version"] = "v13"

    prompts = PromptBuilder(edited(model_dir, tmp_path, make_older), ReasoningConfig())
    assert shown(prompts, user("Hi"), effort="high") == "<s>[INST]Hi[/INST]"


def old_version(tekken: dict[str, Any]) -> None:
    del tekken["model_settings_builder"]
    tekken["config"]["version"] = "v11"


def unknown_version(tekken: dict[str, Any]) -> None:
    tekken["config"]["version"] = "v99"


def no_settings(tekken: dict[str, Any]) -> None:
    del tekken["model_settings_builder"]


def no_vocabulary(tekken: dict[str, Any]) -> None:
    del tekken["vocab"]


def only_none(tekken: dict[str, Any]) -> None:
    tekken["model_settings_builder"]["reasoning_effort"]["values"] = ["none"]


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (old_version, "v11 is too old"),
        (unknown_version, "not a Tekken tokenizer"),
        (no_settings, "model_settings_builder is missing"),
        (no_vocabulary, "not a Tekken tokenizer"),
        (only_none, "reasoning.efforts.minimal.prompt_value"),
    ],
)
def test_builder_refuses_a_tokenizer_that_cannot_serve(
    model_dir: Path, tmp_path: Path, edit: Edit, words: str
) -> None:
    with pytest.raises(ConfigError, match=r"tekken\.json") as caught:
        PromptBuilder(edited(model_dir, tmp_path, edit), ReasoningConfig())
    assert words in str(caught.value)


@pytest.mark.parametrize("content", [None, "{", "[]", "\u00e9"])
def test_builder_refuses_a_missing_or_broken_file(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "tekken.json").write_text(content, encoding="latin-1")
    with pytest.raises(ConfigError, match=r"tekken\.json"):
        PromptBuilder(tmp_path, ReasoningConfig())


def test_builder_takes_an_effort_table_of_its_own(model_dir: Path) -> None:
    efforts = default_efforts() | {"low": replace(default_efforts()["low"], prompt_value="none")}
    prompts = PromptBuilder(model_dir, ReasoningConfig(efforts=efforts))
    assert '"none"' in shown(prompts, user("Hi"), effort="low")
