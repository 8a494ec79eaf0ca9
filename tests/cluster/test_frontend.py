"""Frontend: options to a GenerationRequest, TokenEvents to events, the cell's iterator closed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import replace
from typing import Any, cast

import pytest
from scripted_cell import (
    ARGS,
    CARD,
    CONFIG,
    CONTEXT,
    END_THINK,
    EOS,
    THINK,
    TOOL_CALLS,
    VOCAB,
    FakeCell,
    Script,
)

from ostro.actors.engine.request import (
    GRAMMAR_FAILED,
    FinishReason,
    GenerationRequest,
    TokenEvent,
    TokenLogprob,
)
from ostro.actors.engine.stopwatch import ShardSeconds
from ostro.actors.errors import (
    DeadlineError,
    InvalidRequestError,
    NotFoundError,
    OstroError,
    OverloadedError,
)
from ostro.cluster.frontend import Frontend
from ostro.cluster.generation import (
    AnswerFormat,
    ChatGeneration,
    ChatMessage,
    Constraint,
    Finished,
    GenerationEvent,
    GenerationOptions,
    Started,
    TextDelta,
    TextGeneration,
    Tool,
    ToolCallDone,
    ToolChoice,
)
from ostro.cluster.prompt import PromptBuilder
from ostro.configs.deployment import DeploymentConfig, ServingConfig
from ostro.configs.errors import ConfigError
from ostro.configs.reasoning import EFFORTS, EffortConfig, ReasoningConfig, default_efforts

HELLO = (ChatMessage(role="user", text="Hi"),)
TOOLS = (Tool(name="f"),)
JSON = AnswerFormat(constraint=Constraint.JSON_OBJECT)
REGEX = AnswerFormat(constraint=Constraint.REGEX, text="(a", where="structured_outputs.regex")


@pytest.fixture
def script(prompts: PromptBuilder) -> Script:
    return Script(prompts)


def frontend_of(
    prompts: PromptBuilder, cell: FakeCell, config: DeploymentConfig = CONFIG
) -> Frontend:
    return Frontend(cell, prompts, CARD, config)


def read(events: AsyncIterator[GenerationEvent]) -> list[GenerationEvent]:
    async def collect() -> list[GenerationEvent]:
        return [event async for event in events]

    return asyncio.run(collect())


def chat(
    prompts: PromptBuilder,
    script: Script | None = None,
    *,
    messages: tuple[ChatMessage, ...] = HELLO,
    tools: tuple[Tool, ...] = (),
    tool_choice: str = "auto",
    config: DeploymentConfig = CONFIG,
    model: str = "",
    **options: Any,
) -> tuple[list[GenerationEvent], GenerationRequest]:
    cell = FakeCell((script or Script(prompts).step("ok").end()).events)
    request = ChatGeneration(
        messages=messages,
        tools=tools,
        tool_choice=ToolChoice(mode=tool_choice),
        model=model,
        options=GenerationOptions(**options),
    )
    events = read(frontend_of(prompts, cell, config).chat(request))
    assert not cell.is_open
    return events, cell.requests[0]


def generate(
    prompts: PromptBuilder, prompt: str | tuple[int, ...], script: Script, **options: Any
) -> tuple[list[GenerationEvent], GenerationRequest]:
    cell = FakeCell(script.events)
    request = TextGeneration(prompts=(prompt,), options=GenerationOptions(**options))
    return read(frontend_of(prompts, cell).generate(request)), cell.requests[0]


def deltas(events: list[GenerationEvent]) -> list[TextDelta]:
    return [event for event in events if isinstance(event, TextDelta)]


def texts(events: list[GenerationEvent], *, thinking: bool = False) -> list[str]:
    return [delta.text for delta in deltas(events) if delta.thinking is thinking]


def finish(events: list[GenerationEvent]) -> Finished:
    last = events[-1]
    assert isinstance(last, Finished)
    return last


# ---- the request that the cell gets


def test_chat_takes_its_defaults_from_the_effort(prompts: PromptBuilder) -> None:
    _, request = chat(prompts)
    assert (request.sampling.temperature, request.sampling.top_p) == (0.3, 1.0)
    assert request.sampling.banned_token_ids == (THINK,)
    assert request.thinking is not None
    assert request.thinking.budget_tokens == 0
    assert request.stop.max_tokens == CONTEXT - len(request.prompt_token_ids)
    assert request.stop.eos_token_id == EOS
    assert request.scheduling_class == 0


def test_chat_turns_an_effort_into_a_budget(prompts: PromptBuilder) -> None:
    _, request = chat(prompts, effort="medium", priority=3)
    assert request.sampling.temperature == 0.7
    assert request.sampling.banned_token_ids == ()
    assert request.scheduling_class == 1 + 3
    thinking = request.thinking
    assert thinking is not None
    assert (thinking.begin_token_id, thinking.end_token_id) == (THINK, END_THINK)
    assert (thinking.budget_tokens, thinking.soft_zone_tokens) == (8192, 1024)
    assert thinking.closing_token_ids == prompts.closing_token_ids
    assert not thinking.starts_open


@pytest.mark.parametrize(
    ("effort", "asked", "budget", "soft_zone", "is_banned"),
    [
        ("high", None, None, 0, False),
        ("low", -1, None, 0, False),
        ("low", 80, 80, 10, False),
        ("high", 0, 0, 0, True),
        ("none", 7, 7, 0, False),
        ("high", 10**30, CONTEXT, 0, False),
    ],
)
def test_chat_lets_a_budget_override_the_effort(
    prompts: PromptBuilder,
    effort: str,
    asked: int | None,
    budget: int | None,
    soft_zone: int,
    is_banned: bool,
) -> None:
    events, request = chat(prompts, effort=effort, thinking_token_budget=asked)
    assert request.thinking is not None
    assert request.thinking.budget_tokens == budget
    assert request.thinking.soft_zone_tokens == soft_zone
    assert (THINK in request.sampling.banned_token_ids) is is_banned
    assert isinstance(events[0], Started)
    assert (events[0].effort, events[0].budget_tokens) == (effort, budget)


def test_chat_continues_open_thinking(prompts: PromptBuilder, script: Script) -> None:
    prefix = ChatMessage(role="assistant", thinking="Let me", prefix=True)
    script.step(" see", END_THINK, "Yes").end()
    events, request = chat(prompts, script, messages=(*HELLO, prefix), effort="high")
    assert request.thinking is not None
    assert request.thinking.starts_open
    assert (texts(events, thinking=True), texts(events)) == ([" see"], ["Yes"])


def test_chat_passes_every_option_on(prompts: PromptBuilder) -> None:
    _, request = chat(
        prompts,
        request_id="mine",
        temperature=0,
        top_p=0.5,
        top_k=10**30,
        min_p=0.1,
        presence_penalty=1,
        frequency_penalty=-1,
        repetition_penalty=1.5,
        seed=-1,
        logit_bias={7: -100},
        max_tokens=20,
        min_tokens=5,
        stop_token_ids=(9,),
        ignore_eos=True,
        num_logprobs=3,
        cache_key="tenant",
    )
    sampling = request.sampling
    assert (request.request_id, request.cache_salt) == ("mine", "tenant")
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.0, 0.5, VOCAB)
    assert (sampling.min_p, sampling.repetition_penalty) == (0.1, 1.5)
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (1.0, -1.0)
    assert (sampling.seed, sampling.num_logprobs) == (2**63 - 1, 3)
    assert sampling.logit_bias == {7: -100.0}
    assert (request.stop.max_tokens, request.stop.min_tokens) == (20, 5)
    assert (request.stop.stop_token_ids, request.stop.ignore_eos) == ((9,), True)


def test_chat_draws_an_id_and_a_seed_of_its_own(prompts: PromptBuilder) -> None:
    made = [chat(prompts, request_id="")[1] for _ in range(2)]
    assert len({request.request_id for request in made}) == 2
    assert len({request.sampling.seed for request in made}) == 2


def test_chat_bans_tool_calls_when_the_choice_is_none(prompts: PromptBuilder) -> None:
    _, request = chat(prompts, tools=TOOLS, tool_choice="none", effort="high")
    assert request.sampling.banned_token_ids == (TOOL_CALLS,)
    assert '"f"' in prompts.table.decode(request.prompt_token_ids)


def test_generate_takes_text_or_token_ids_without_thinking(
    prompts: PromptBuilder, script: Script
) -> None:
    script.step("a", THINK, "b").end()
    events, request = generate(prompts, "Hi", script)
    assert request.prompt_token_ids == prompts.text("Hi")
    assert request.thinking is None
    assert texts(events) == ["ab"]
    _, request = generate(prompts, (1, 70), script)
    assert request.prompt_token_ids == [1, 70]


# ---- refusals


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"effort": "ultra"}, "reasoning_effort"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": 10**400}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"top_k": 1.0}, "top_k"),
        ({"min_p": -0.1}, "min_p"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"frequency_penalty": -3}, "frequency_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty"),
        ({"seed": 1.5}, "seed"),
        ({"logit_bias": {VOCAB: 1}}, "logit_bias"),
        ({"logit_bias": {-1: 1}}, "logit_bias"),
        ({"logit_bias": {1: 101}}, "logit_bias"),
        ({"logit_bias": {1: float("nan")}}, "logit_bias"),
        ({"num_choices": 0}, "n"),
        ({"num_choices": 17}, "n"),
        ({"num_choices": True}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -5}, "max_tokens"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"min_tokens": 6, "max_tokens": 5}, "min_tokens"),
        ({"num_logprobs": 21}, "top_logprobs"),
        ({"stop": ("a",) * 17}, "stop"),
        ({"stop": ("",)}, "stop"),
        ({"stop": ("a" * 1025,)}, "stop"),
        ({"stop": ("\ud800",)}, "stop"),
        ({"stop_token_ids": (VOCAB,)}, "stop_token_ids"),
        ({"thinking_token_budget": -2}, "thinking_token_budget"),
        ({"priority": 2**40}, "priority"),
        ({"queue_timeout_s": 0}, "queue_timeout"),
        ({"request_id": "\ud800"}, "request_id"),
        ({"request_id": "a" * 257}, "request_id"),
        ({"cache_key": "\ud800"}, "prompt_cache_key"),
    ],
    ids=str,
)
def test_chat_refuses_options_out_of_range(
    prompts: PromptBuilder, options: dict[str, Any], param: str
) -> None:
    cell = FakeCell([])
    request = ChatGeneration(messages=HELLO, options=GenerationOptions(**options))
    with pytest.raises(InvalidRequestError, match=param) as caught:
        read(frontend_of(prompts, cell).chat(request))
    assert caught.value.param == param
    assert cell.requests == []


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"options": GenerationOptions(answer_format=REGEX)}, "structured_outputs.regex"),
        ({"tool_choice": ToolChoice(mode="required", name="g")}, "tool_choice"),
        ({"tool_choice": ToolChoice(mode="required"), "tools": ()}, "tool_choice"),
    ],
    ids=str,
)
def test_chat_refuses_what_no_answer_can_satisfy(
    prompts: PromptBuilder, fields: dict[str, Any], param: str
) -> None:
    cell = FakeCell([])
    request = ChatGeneration(**{"messages": HELLO, "tools": TOOLS, **fields})
    with pytest.raises(InvalidRequestError, match=param) as caught:
        read(frontend_of(prompts, cell).chat(request))
    assert (caught.value.code, caught.value.param) == ("unsupported_value", param)
    assert not cell.requests


@pytest.mark.parametrize(
    ("fields", "param"),
    [({"answer_format": JSON}, "response_format"), ({"tool_choice": "required"}, "tools")],
)
def test_an_answer_that_its_grammar_stops_is_the_requests_fault(
    prompts: PromptBuilder, script: Script, fields: dict[str, Any], param: str
) -> None:
    script.step(finish_reason=FinishReason.ERROR, error_code=GRAMMAR_FAILED, error_message="stuck")
    with pytest.raises(InvalidRequestError, match="stuck") as caught:
        chat(prompts, script, tools=TOOLS, **fields)
    assert (caught.value.code, caught.value.param) == (GRAMMAR_FAILED, param)


def test_a_forced_call_comes_out_as_a_call(prompts: PromptBuilder, script: Script) -> None:
    script.step(TOOL_CALLS, "f", ARGS, "{}").step(finish_reason=FinishReason.STOP)
    events, request = chat(prompts, script, tools=TOOLS, tool_choice="required")
    assert request.grammar is not None
    assert [event.call.name for event in events if isinstance(event, ToolCallDone)] == ["f"]
    assert finish(events).reason == "tool_calls"


def test_chat_names_the_efforts_there_are(prompts: PromptBuilder) -> None:
    with pytest.raises(InvalidRequestError, match=", ".join(EFFORTS)) as caught:
        chat(prompts, effort="ultra")
    assert caught.value.code == "unsupported_value"


def test_chat_refuses_another_model(prompts: PromptBuilder) -> None:
    chat(prompts, model="small")
    with pytest.raises(NotFoundError) as caught:
        chat(prompts, model="large")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


@pytest.mark.parametrize("length", [600, 20_000], ids=["short", "off-loop"])
def test_chat_refuses_a_prompt_beyond_the_context(prompts: PromptBuilder, length: int) -> None:
    messages = (ChatMessage(role="user", text="9" * length),)
    with pytest.raises(InvalidRequestError) as caught:
        chat(prompts, messages=messages)
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "messages")


@pytest.mark.parametrize(
    ("prompt", "code"),
    [
        ((), "invalid_value"),
        ((VOCAB,), "invalid_value"),
        ((-1,), "invalid_value"),
        ((1,) * CONTEXT, "context_length_exceeded"),
        ("9" * CONTEXT, "context_length_exceeded"),
    ],
    ids=["empty", "beyond", "negative", "long-ids", "long-text"],
)
def test_generate_refuses_a_bad_prompt(
    prompts: PromptBuilder, script: Script, prompt: str | tuple[int, ...], code: str
) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        generate(prompts, prompt, script)
    assert (caught.value.code, caught.value.param) == (code, "prompt")


def test_generate_has_no_thinking_budget(prompts: PromptBuilder, script: Script) -> None:
    with pytest.raises(InvalidRequestError, match="thinking_token_budget"):
        generate(prompts, "Hi", script, thinking_token_budget=5)


def test_frontend_refuses_a_tokenizer_larger_than_the_model(prompts: PromptBuilder) -> None:
    with pytest.raises(ConfigError, match="vocab_size"):
        Frontend(FakeCell([]), prompts, replace(CARD, vocab_size=VOCAB - 1), CONFIG)


# ---- the events that a face gets


def test_chat_streams_thinking_then_answer(prompts: PromptBuilder, script: Script) -> None:
    script.step(THINK, num_cached_tokens=16, seconds=ShardSeconds(0.25, 0.5))
    script.step("so", num_thinking_tokens=2)
    script.step(END_THINK, num_thinking_tokens=2, thinking_ended_by="budget")
    script.step("Yes").end(num_thinking_tokens=2, thinking_ended_by="budget")
    events, request = chat(prompts, script, effort="low", request_id="mine")
    assert events[0] == Started(
        request_id="mine",
        model="small",
        num_prompt_tokens=len(request.prompt_token_ids),
        num_cached_tokens=16,
        effort="low",
        budget_tokens=2048,
    )
    assert events[1:-1] == [TextDelta(text="so", thinking=True), TextDelta(text="Yes")]
    end = finish(events)
    assert (end.reason, end.matched_stop, end.stop_token_id) == ("stop", None, None)
    assert end.usage.completion_tokens == script.num_tokens
    assert (end.usage.cached_prompt_tokens, end.usage.thinking_tokens) == (16, 2)
    assert (end.reasoning.thinking_tokens, end.reasoning.ended_by) == (2, "budget")
    timing = end.timing
    assert timing.queued_s == 0.25
    assert timing.first_token_s is not None
    assert timing.first_answer_token_s is not None
    assert timing.first_token_s <= timing.first_answer_token_s <= timing.total_s


def test_the_last_event_tells_the_parts_of_the_time(prompts: PromptBuilder, script: Script) -> None:
    script.step("Yes", seconds=ShardSeconds(0.001, 0.002))
    script.end(seconds=ShardSeconds(0.001, 0.002, 0.004, {"attention": 0.001, "sample": 0.002}))
    timing = finish(chat(prompts, script)[0]).timing
    assert (timing.queued_s, timing.prefill_s, timing.decode_s) == (0.001, 0.002, 0.004)
    parts = timing.parts()
    assert (parts["attention"], parts["sample"]) == (0.001, 0.002)
    assert parts["between_steps"] == pytest.approx(0.003)
    assert parts["gateway"] == pytest.approx(max(timing.total_s - 0.007, 0.0))


def test_a_stop_string_ends_the_time_without_the_shards_word(
    prompts: PromptBuilder, script: Script
) -> None:
    script.step("Yes", seconds=ShardSeconds(0.0, 0.0)).step(" STOP")
    timing = finish(chat(prompts, script, stop=("STOP",))[0]).timing
    assert timing.first_token_s is not None
    assert timing.decode_s == timing.total_s - timing.first_token_s
    assert set(timing.parts()) == {"gateway", "queue", "prefill", "decode"}


def test_times_that_a_shard_did_not_tell_are_left_out(
    prompts: PromptBuilder, script: Script
) -> None:
    script.step("Yes").end()
    timing = finish(chat(prompts, script)[0]).timing
    assert (timing.queued_s, timing.prefill_s, timing.parts()) == (0.0, None, {})


def test_chat_gives_one_delta_per_step_and_channel(prompts: PromptBuilder, script: Script) -> None:
    script.step(THINK, "one two", END_THINK, "three four").end()
    events, _ = chat(prompts, script, effort="high")
    assert deltas(events) == [
        TextDelta(text="one two", thinking=True),
        TextDelta(text="three four"),
    ]


def test_chat_leaves_thinking_out_when_asked(prompts: PromptBuilder, script: Script) -> None:
    script.step(THINK, "so", END_THINK, "Yes").end(num_thinking_tokens=1)
    events, _ = chat(prompts, script, effort="high", omit_thinking=True, return_token_ids=True)
    assert [delta.thinking for delta in deltas(events)] == [False, False]
    assert finish(events).usage.thinking_tokens == 1


def test_chat_gives_tool_calls_after_the_text(prompts: PromptBuilder, script: Script) -> None:
    script.step("Well.").step(TOOL_CALLS, "f", ARGS, '{"a": 1}').step(TOOL_CALLS, "g", ARGS, "{}")
    events, _ = chat(prompts, script.end(), tools=TOOLS)
    calls = [event for event in events if isinstance(event, ToolCallDone)]
    assert texts(events) == ["Well."]
    assert [(c.index, c.call.name, c.call.arguments) for c in calls] == [
        (0, "f", '{"a": 1}'),
        (1, "g", "{}"),
    ]
    assert finish(events).reason == "tool_calls"


def test_chat_gives_a_cut_tool_call_as_text(prompts: PromptBuilder, script: Script) -> None:
    script.step(TOOL_CALLS, "f", ARGS, '{"a": ').end(FinishReason.LENGTH)
    events, _ = chat(prompts, script, tools=TOOLS, max_tokens=5)
    assert texts(events) == ['f{"a": ']
    assert finish(events).reason == "length"


@pytest.mark.parametrize(
    ("reason", "max_tokens", "shown"),
    [
        (FinishReason.LENGTH, 5, "length"),
        (FinishReason.LENGTH, None, "model_length"),
        (FinishReason.LENGTH, 10**30, "model_length"),
        (FinishReason.MODEL_LENGTH, 5, "model_length"),
        (FinishReason.CANCELLED, 5, "cancelled"),
    ],
)
def test_chat_names_the_limit_that_was_met(
    prompts: PromptBuilder, script: Script, reason: FinishReason, max_tokens: int, shown: str
) -> None:
    events, _ = chat(prompts, script.step("a").end(reason), max_tokens=max_tokens)
    assert finish(events).reason == shown


def test_chat_stops_at_a_stop_string_and_closes_the_cell(
    prompts: PromptBuilder, script: Script
) -> None:
    script.step("one ST").step("OP", " two").step(" three").end()
    cell = FakeCell(script.events)
    request = ChatGeneration(messages=HELLO, options=GenerationOptions(stop=("STOP", "x")))

    async def serve() -> list[GenerationEvent]:
        events = []
        async for event in frontend_of(prompts, cell).chat(request):
            events.append(event)
            assert cell.is_open is not (cell.num_played > 1)
        return events

    events = asyncio.run(serve())
    assert "".join(texts(events)) == "one "
    assert (finish(events).reason, finish(events).matched_stop) == ("stop", "STOP")
    used = [*prompts.text("one ST", add_bos=False), *prompts.text("OP", add_bos=False)]
    assert finish(events).usage.completion_tokens == len(used)
    assert cell.num_played == 2


def test_chat_hides_the_text_of_a_stop_token(prompts: PromptBuilder, script: Script) -> None:
    [token] = prompts.text("!", add_bos=False)
    script.step("a").step(token, finish_reason=FinishReason.STOP, stop_token_id=token)
    events, _ = chat(prompts, script, stop_token_ids=(token,), return_token_ids=True)
    assert "".join(texts(events)) == "a"
    assert deltas(events)[-1].token_ids == (token,)
    assert finish(events).stop_token_id == token


def test_chat_gives_all_token_ids_when_asked(prompts: PromptBuilder, script: Script) -> None:
    script.step(THINK, "so", END_THINK, "Yes", TOOL_CALLS, "f", ARGS, "{}").end()
    events, _ = chat(prompts, script, tools=TOOLS, effort="high", return_token_ids=True)
    given = [token_id for delta in deltas(events) for token_id in delta.token_ids]
    assert given == [token_id for event in script.events for token_id in event.token_ids]


def test_chat_gives_the_logprobs_of_tokens_that_are_new(
    prompts: PromptBuilder, script: Script
) -> None:
    token_ids = [prompts.text(letter, add_bos=False)[0] for letter in "abc"]
    logprobs = [TokenLogprob(i, -0.5, [(i, -0.5)]) for i in token_ids]
    script.step(*token_ids[:2], logprobs=logprobs[:2])
    script.events.append(TokenEvent("r.0", 1, token_ids[1:], logprobs=logprobs[1:]))
    script.num_tokens = len(token_ids)
    events, _ = chat(prompts, script.end(FinishReason.LENGTH), num_logprobs=1)
    told = [entry.token_id for delta in deltas(events) for entry in delta.logprobs]
    assert told == token_ids


def test_chat_gives_logprobs_of_text_tokens_only(prompts: PromptBuilder, script: Script) -> None:
    [token, *_] = ids = prompts.text("a", add_bos=False)
    logprobs = [TokenLogprob(i, -0.5, [(i, -0.5), (EOS, -1.0)]) for i in ids]
    script.step("a", logprobs=logprobs)
    script.end(logprobs=[TokenLogprob(EOS, -0.1, [(EOS, -0.1)])])
    events, _ = chat(prompts, script, num_logprobs=2)
    [entry] = [entry for delta in deltas(events) for entry in delta.logprobs]
    assert (entry.token_id, entry.text, entry.logprob) == (token, b"a", -0.5)
    assert entry.top == ((token, b"a", -0.5), (EOS, b"</s>", -1.0))


def test_chat_drops_tokens_that_come_twice(prompts: PromptBuilder, script: Script) -> None:
    [a, b, c] = prompts.text("a", add_bos=False) * 3
    events = [
        TokenEvent("r", 0, [a, b]),
        TokenEvent("r", 1, [b]),
        TokenEvent("r", 0, [a, b, c], finish_reason=FinishReason.LENGTH),
    ]
    script.events = events
    answer, _ = chat(prompts, script, max_tokens=3)
    assert "".join(texts(answer)) == "aaa"
    assert finish(answer).usage.completion_tokens == 3


# ---- failures


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("invalid_value", InvalidRequestError),
        ("queue_full", OverloadedError),
        ("context_length_exceeded", InvalidRequestError),
        ("something_new", OstroError),
        (None, OstroError),
    ],
)
def test_chat_raises_what_an_error_event_says(
    prompts: PromptBuilder, script: Script, code: str | None, kind: type[OstroError]
) -> None:
    script.step("a").step(
        finish_reason=FinishReason.ERROR, error_code=code, error_message="rank 2 is gone"
    )
    with pytest.raises(OstroError, match="rank 2 is gone") as caught:
        chat(prompts, script)
    assert type(caught.value) is kind
    assert caught.value.code == (code or "internal")


def test_chat_lets_the_cells_errors_through(prompts: PromptBuilder) -> None:
    cell = FakeCell([OverloadedError("full", retry_after_s=2.0)])
    with pytest.raises(OverloadedError) as caught:
        read(frontend_of(prompts, cell).chat(ChatGeneration(messages=HELLO)))
    assert caught.value.retry_after_s == 2.0


@pytest.mark.parametrize("first_index", [1, 5])
def test_chat_fails_when_tokens_were_lost(
    prompts: PromptBuilder, script: Script, first_index: int
) -> None:
    script.events = [TokenEvent("r", first_index, [70])]
    with pytest.raises(OstroError, match="lost"):
        chat(prompts, script)


def test_chat_fails_when_the_stream_has_no_end(prompts: PromptBuilder, script: Script) -> None:
    with pytest.raises(OstroError, match="without an end"):
        chat(prompts, script.step("a"))


@pytest.mark.parametrize(
    ("queue_timeout_s", "request_timeout_s", "has_begun", "words"),
    [
        (0.01, 60.0, False, "queue timeout of 0.01 s"),
        (None, 0.02, False, "request timeout of 0.02 s"),
        (2.0, 2.5, True, "request timeout of 2.5 s"),
    ],
)
def test_chat_keeps_its_deadlines_and_closes_the_cell(
    prompts: PromptBuilder,
    script: Script,
    queue_timeout_s: float | None,
    request_timeout_s: float,
    has_begun: bool,
    words: str,
) -> None:
    cell = FakeCell(script.step("a").events if has_begun else [], hangs=True)
    config = replace(CONFIG, serving=ServingConfig(request_timeout_s=request_timeout_s))
    options = GenerationOptions(queue_timeout_s=queue_timeout_s)
    with pytest.raises(DeadlineError, match=words):
        read(
            frontend_of(prompts, cell, config).chat(ChatGeneration(messages=HELLO, options=options))
        )
    assert not cell.is_open


def test_closing_the_answer_closes_the_cell(prompts: PromptBuilder, script: Script) -> None:
    cell = FakeCell(script.step("a").events, hangs=True)

    async def leave_early() -> bool:
        answer = frontend_of(prompts, cell).chat(ChatGeneration(messages=HELLO))
        async with aclosing(cast("AsyncGenerator[GenerationEvent, None]", answer)) as events:
            assert isinstance(await anext(events), Started)
            assert cell.is_open
        return cell.is_open

    assert asyncio.run(leave_early()) is False


def test_cancelling_the_reader_closes_the_cell(prompts: PromptBuilder) -> None:
    cell = FakeCell([], hangs=True)

    async def cancel() -> bool:
        async def consume() -> None:
            async for _ in frontend_of(prompts, cell).chat(ChatGeneration(messages=HELLO)):
                pass

        task = asyncio.create_task(consume())
        await cell.was_asked.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return cell.is_open

    assert asyncio.run(cancel()) is False


# ---- the rest


def test_frontend_tokenizes_and_detokenizes(prompts: PromptBuilder) -> None:
    frontend = frontend_of(prompts, FakeCell([]))

    def tokenized(effort: str | None) -> list[int]:
        return asyncio.run(frontend.tokenize_chat(HELLO, (), effort))

    ids = tokenized("high")
    assert ids == chat(prompts, effort="high")[1].prompt_token_ids
    assert asyncio.run(frontend.detokenize(ids)).endswith("[INST]Hi[/INST]")
    greeting = asyncio.run(frontend.tokenize_text("Hi", add_bos=False))
    assert asyncio.run(frontend.detokenize(greeting)) == "Hi"
    assert tokenized(None) == tokenized("none")


def test_frontend_counts_the_prompt_of_an_effort_that_may_not_think(prompts: PromptBuilder) -> None:
    efforts = default_efforts() | {"high": EffortConfig(prompt_value="high", budget_tokens=0)}
    config = replace(CONFIG, reasoning=ReasoningConfig(efforts=efforts))
    frontend = frontend_of(prompts, FakeCell([]), config)
    counted = asyncio.run(frontend.tokenize_chat(HELLO, (), "high"))
    assert counted == chat(prompts, effort="high", config=config)[1].prompt_token_ids


@pytest.mark.parametrize("token_id", [-1, VOCAB])
def test_detokenize_refuses_ids_out_of_range(prompts: PromptBuilder, token_id: int) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        asyncio.run(frontend_of(prompts, FakeCell([])).detokenize([token_id]))
    assert caught.value.param == "tokens"


def test_tokenize_chat_refuses_an_unknown_effort(prompts: PromptBuilder) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        asyncio.run(frontend_of(prompts, FakeCell([])).tokenize_chat(HELLO, (), "ultra"))
    assert caught.value.param == "reasoning_effort"
