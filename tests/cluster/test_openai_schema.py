"""Bodies of the OpenAI dialect to the requests of `generation`."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from ostro.actors.errors import InvalidRequestError
from ostro.cluster.openai_request import chat_generation, short_call_id, text_generation
from ostro.cluster.openai_schema import ChatCompletionRequest, CompletionRequest
from ostro.cluster.wire_schema import ignored_fields


def chat(*messages, **fields):
    body = {"messages": list(messages) or [{"role": "user", "content": "hi"}], **fields}
    return chat_generation(ChatCompletionRequest.model_validate(body))


def text(**fields):
    return text_generation(CompletionRequest.model_validate({"prompt": "a", **fields}))


def test_what_is_not_asked_for_stays_unset():
    options = chat().options
    assert (options.effort, options.temperature, options.max_tokens) == (None, None, None)
    assert (options.num_logprobs, options.stop, options.cache_key) == (None, (), "")


def test_every_option_arrives():
    options = chat(
        request_id="mine",
        reasoning_effort="xhigh",
        thinking_token_budget=-1,
        temperature=1,
        top_p=0.5,
        top_k=-1,
        min_p=0.1,
        presence_penalty=1.0,
        frequency_penalty=-1.0,
        repetition_penalty=1.1,
        random_seed=7,
        logit_bias={"5": -2.0},
        max_completion_tokens=9,
        min_tokens=2,
        stop="END",
        stop_token_ids=[3],
        ignore_eos=True,
        logprobs=True,
        top_logprobs=4,
        prompt_cache_key="team",
        priority=-1,
        queue_timeout=2.5,
        return_token_ids=True,
    ).options
    assert (options.request_id, options.effort) == ("mine", "xhigh")
    assert (options.thinking_token_budget, options.temperature) == (-1, 1)
    assert (options.top_p, options.top_k, options.min_p) == (0.5, 0, 0.1)
    assert (options.presence_penalty, options.frequency_penalty) == (1.0, -1.0)
    assert (options.repetition_penalty, options.seed) == (1.1, 7)
    assert (options.logit_bias, options.max_tokens, options.min_tokens) == ({5: -2.0}, 9, 2)
    assert (options.stop, options.stop_token_ids, options.ignore_eos) == (("END",), (3,), True)
    assert (options.num_logprobs, options.cache_key, options.priority) == (4, "team", -1)
    assert (options.queue_timeout_s, options.return_token_ids) == (2.5, True)


def test_the_two_names_of_one_option_may_agree():
    assert chat(max_tokens=3, max_completion_tokens=3, seed=1, random_seed=1).options.seed == 1


@pytest.mark.parametrize(
    "fields",
    [
        {"reasoning": "hm", "content": "so"},
        {"reasoning_content": "hm", "content": "so"},
        {"reasoning_content": "hm", "reasoning": "hm", "content": [{"type": "text", "text": "so"}]},
        {
            "content": [
                {"type": "thinking", "thinking": [{"type": "text", "text": "hm"}], "closed": True},
                {"type": "text", "text": "so"},
            ]
        },
        {
            "content": [
                {"type": "thinking", "thinking": "h", "signature": None},
                {"type": "thinking", "thinking": "m"},
                {"type": "text", "text": "s"},
                {"type": "text", "text": "o"},
            ]
        },
    ],
    ids=["reasoning", "reasoning_content", "both", "chunks", "pieces"],
)
def test_thinking_is_replayed_from_every_form(fields):
    message = chat({"role": "assistant", **fields}).messages[0]
    assert (message.thinking, message.text) == ("hm", "so")


def test_tool_calls_and_answers_share_short_ids_and_names():
    call = {"id": "call_0123456789", "function": {"name": "f", "arguments": {"a": 1}}}
    assistant, tool = chat(
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_0123456789", "content": "4"},
    ).messages
    assert assistant.tool_calls[0].call_id == tool.tool_call_id == short_call_id(call["id"])
    assert assistant.tool_calls[0].arguments == '{"a": 1}'


def test_short_call_ids_stay_and_others_become_nine_letters():
    assert short_call_id("abcDEF123") == "abcDEF123"
    assert short_call_id("toolong-1234") == short_call_id("toolong-1234")
    assert short_call_id("toolong-1234") != short_call_id("toolong-1235")
    assert len(short_call_id("")) == 9
    assert short_call_id("x" * 10_000).isalnum()


def test_developer_is_system_and_tools_are_functions():
    request = chat(
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": "hi"},
        tools=[{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
        tool_choice="none",
    )
    assert request.messages[0].role == "system"
    assert (request.tools[0].name, request.tool_choice.mode) == ("f", "none")
    assert request.tools[0].parameters == {"type": "object"}


@pytest.mark.parametrize("fields", [{"prefix": True}, {}], ids=["prefix", "continue_final_message"])
def test_the_last_assistant_message_can_be_continued(fields):
    last = {"role": "assistant", "content": "Once", **fields}
    request = chat(
        {"role": "user", "content": "Tell"}, last, continue_final_message=not fields or None
    )
    assert [message.prefix for message in request.messages] == [False, True]


def test_continuing_a_user_is_refused():
    with pytest.raises(InvalidRequestError, match="only the last message"):
        chat(continue_final_message=True)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a", ("a",)),
        (["a"], ("a",)),
        (["a", "b"], ("a", "b")),
        ([1, 2], ((1, 2),)),
        ([[1, 2]], ((1, 2),)),
        ([[1, 2], [], [3]], ((1, 2), (), (3,))),
        ([], ()),
    ],
)
def test_a_prompt_is_text_or_token_ids_and_there_may_be_several(prompt, expected):
    assert text(prompt=prompt).prompts == expected


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"suffix": "z"}, "suffix"),
        ({"best_of": 2}, "best_of"),
        ({"best_of": 3, "n": 2}, "best_of"),
    ],
)
def test_what_text_completions_do_not_serve_is_named(fields, param):
    with pytest.raises(InvalidRequestError) as told:
        text(**fields)
    assert told.value.param == param


def test_choices_and_echo_are_asked_for():
    asked = text(n=3, best_of=3, echo=True)
    assert (asked.options.num_choices, asked.echo) == (3, True)
    assert (text().options.num_choices, text().echo) == (1, False)


def test_harmless_fields_of_the_clients_are_taken():
    body = ChatCompletionRequest.model_validate(
        {
            "messages": [{"role": "user", "content": "hi", "name": None}],
            "user": "u",
            "metadata": {"a": 1},
            "store": False,
            "service_tier": "auto",
            "n": 1,
            "response_format": {"type": "text"},
            "parallel_tool_calls": True,
            "safe_prompt": False,
            "prompt_logprobs": False,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    )
    assert chat_generation(body).options.max_tokens is None
    assert list(ignored_fields(body)) == []


def test_unknown_fields_are_found_at_every_depth():
    body = ChatCompletionRequest.model_validate(
        {
            "mood": 1,
            "messages": [{"role": "user", "content": [{"type": "text", "text": "a", "x": 1}]}],
            "tools": [{"function": {"name": "f", "mood": True, "parameters": {"free": 1}}}],
        }
    )
    assert list(ignored_fields(body)) == [
        "mood",
        "messages[0].content[0].x",
        "tools[0].function.mood",
    ]


@pytest.mark.parametrize("wrong", ["5", 1.5, True, [], {}])
def test_types_are_taken_strictly(wrong):
    with pytest.raises(ValidationError, match="max_tokens"):
        ChatCompletionRequest.model_validate({"messages": [{"role": "user"}], "max_tokens": wrong})
