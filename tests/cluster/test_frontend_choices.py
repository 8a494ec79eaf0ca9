"""Frontend: several choices of a prompt and several prompts, as one answer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from itertools import chain, zip_longest
from typing import Any, cast

import pytest
from scripted_cell import ARGS, CARD, CONFIG, END_THINK, THINK, TOOL_CALLS, FakeCell, Script

from ostro.actors.engine.request import FinishReason, TokenEvent
from ostro.actors.errors import InvalidRequestError, OstroError, OverloadedError, ShardLostError
from ostro.cluster.frontend import Frontend
from ostro.cluster.generation import (
    ChatGeneration,
    ChatMessage,
    Finished,
    GenerationEvent,
    GenerationOptions,
    Started,
    TextDelta,
    TextGeneration,
    Tool,
    ToolCallDone,
)
from ostro.cluster.prompt import PromptBuilder

HELLO = (ChatMessage(role="user", text="Hi"),)
VOCAB = CARD.vocab_size


def interleaved(*scripts: Script) -> list[TokenEvent]:
    """One event of each in turn, as steps bring them."""
    rounds = zip_longest(*(script.events for script in scripts))
    return [event for event in chain.from_iterable(rounds) if event is not None]


def chat(num_choices: int, **options: Any) -> ChatGeneration:
    return ChatGeneration(
        messages=HELLO,
        tools=(Tool(name="f"),),
        options=GenerationOptions(num_choices=num_choices, **options),
    )


def texts(*prompts: str | tuple[int, ...], echo: bool = False, **options: Any) -> TextGeneration:
    return TextGeneration(prompts=prompts, echo=echo, options=GenerationOptions(**options))


def read(
    prompts: PromptBuilder, cell: FakeCell, request: ChatGeneration | TextGeneration
) -> list[GenerationEvent]:
    frontend = Frontend(cell, prompts, CARD, CONFIG)
    is_chat = isinstance(request, ChatGeneration)

    async def collect(events: AsyncIterator[GenerationEvent]) -> list[GenerationEvent]:
        return [event async for event in events]

    return asyncio.run(collect(frontend.chat(request) if is_chat else frontend.generate(request)))


def told(events: list[GenerationEvent]) -> dict[int, str]:
    """The answer text of each choice."""
    found: dict[int, str] = {}
    for event in events:
        if isinstance(event, TextDelta) and not event.thinking:
            found[event.choice] = found.get(event.choice, "") + event.text
    return found


def ends(events: list[GenerationEvent]) -> list[Finished]:
    return [event for event in events if isinstance(event, Finished)]


def two_answers(prompts: PromptBuilder) -> FakeCell:
    first = Script(prompts).step("one", num_cached_tokens=0).step(" two").end()
    second = Script(prompts, 1).step("three", num_cached_tokens=16).end()
    return FakeCell(interleaved(first, second))


# ---- what the cell gets


def test_choices_of_a_prompt_are_one_request(prompts: PromptBuilder) -> None:
    cell = two_answers(prompts)
    read(prompts, cell, chat(2, seed=5))
    (request,) = cell.requests
    assert (request.choice, request.num_choices, request.sampling.seed) == (0, 2, 5)


def test_every_prompt_is_a_request_with_its_own_places_under_one_id(
    prompts: PromptBuilder,
) -> None:
    scripts = [Script(prompts, choice).step("a").end() for choice in range(4)]
    cell = FakeCell(interleaved(*scripts))
    events = read(prompts, cell, texts("Hi", (1, 70), num_choices=2))
    assert [request.prompt_token_ids for request in cell.requests] == [prompts.text("Hi"), [1, 70]]
    assert [(request.choice, request.num_choices) for request in cell.requests] == [(0, 2), (2, 2)]
    assert len({request.request_id for request in cell.requests}) == 1
    started = events[0]
    assert isinstance(started, Started)
    assert started.num_choices == 4
    assert started.num_prompt_tokens == len(prompts.text("Hi")) + 2


# ---- what the face gets


def test_choices_come_as_their_tokens_do(prompts: PromptBuilder) -> None:
    events = read(prompts, two_answers(prompts), chat(2))
    kinds = [(type(event).__name__, getattr(event, "choice", None)) for event in events]
    assert kinds == [
        ("Started", None),
        ("TextDelta", 0),
        ("TextDelta", 1),
        ("TextDelta", 0),
        ("Finished", 1),
        ("Finished", 0),
    ]
    assert told(events) == {0: "one two", 1: "three"}


def test_usage_counts_the_prompt_once_and_the_choices_that_have_ended(
    prompts: PromptBuilder,
) -> None:
    cell = two_answers(prompts)
    early, last = ends(read(prompts, cell, chat(2)))
    num_tokens = [len(prompts.text(text, add_bos=False)) for text in ("one", " two", "three")]
    assert (early.is_last, last.is_last) == (False, True)
    assert early.usage.completion_tokens == num_tokens[2] + 1
    assert last.usage.completion_tokens == sum(num_tokens) + 2
    assert last.usage.prompt_tokens == len(cell.requests[0].prompt_token_ids)
    assert last.usage.cached_prompt_tokens == 0  # what the first choice found, not what it left
    assert last.timing.total_s >= early.timing.total_s


def test_cached_tokens_of_several_prompts_add_up(prompts: PromptBuilder) -> None:
    scripts = [
        Script(prompts, choice).step("a", num_cached_tokens=cached).end(num_cached_tokens=cached)
        for choice, cached in enumerate((16, 32, 0, 48))
    ]
    last = ends(read(prompts, FakeCell(interleaved(*scripts)), texts("a", "b", num_choices=2)))[-1]
    assert last.usage.cached_prompt_tokens == 16 + 0


def test_each_choice_thinks_calls_and_ends_for_itself(prompts: PromptBuilder) -> None:
    thinks = Script(prompts).step(THINK, "hm", num_thinking_tokens=1)
    thinks.step(END_THINK, "so", num_thinking_tokens=1, thinking_ended_by="model")
    calls = Script(prompts, 1).step(TOOL_CALLS, "f", ARGS, "{}").step(TOOL_CALLS, "f", ARGS, "{}")
    is_cut = Script(prompts, 2).step("cut")
    cell = FakeCell(interleaved(thinks.end(), calls.end(), is_cut.end(FinishReason.LENGTH)))
    events = read(prompts, cell, chat(3, effort="high", max_tokens=5))
    by_choice = {end.choice: end for end in ends(events)}
    assert [by_choice[choice].reason for choice in range(3)] == ["stop", "tool_calls", "length"]
    assert [by_choice[choice].reasoning.thinking_tokens for choice in range(3)] == [1, 0, 0]
    assert by_choice[0].reasoning.ended_by == "model"
    assert ends(events)[-1].usage.thinking_tokens == 1
    assert told(events) == {0: "so", 2: "cut"}
    calls_done = [event for event in events if isinstance(event, ToolCallDone)]
    assert [(call.choice, call.index) for call in calls_done] == [(1, 0), (1, 1)]


def test_a_stop_string_ends_its_choice_and_drops_it_in_the_cell(prompts: PromptBuilder) -> None:
    stops = Script(prompts).step("one STOP").step(" late").end()
    goes_on = Script(prompts, 1).step("a").step("b").step("c").end()
    cell = FakeCell(interleaved(stops, goes_on))
    events = read(prompts, cell, chat(2, stop=("STOP",)))
    assert told(events) == {0: "one ", 1: "abc"}
    assert [end.matched_stop for end in ends(events)] == ["STOP", None]
    assert cell.dropped == ["r.0"]


def test_the_last_choice_at_a_stop_string_closes_the_cell_instead(prompts: PromptBuilder) -> None:
    cell = FakeCell(
        interleaved(Script(prompts).step("a").end(), Script(prompts, 1).step("b").step("STOP"))
    )
    events = read(prompts, cell, chat(2, stop=("STOP",)))
    assert [end.choice for end in ends(events)] == [0, 1]
    assert (cell.dropped, cell.is_open) == ([], False)


def test_echo_begins_every_choice_with_its_prompt(prompts: PromptBuilder) -> None:
    [token] = prompts.text("b", add_bos=False)
    scripts = [Script(prompts, choice).step("!").end() for choice in range(4)]
    events = read(
        prompts, FakeCell(interleaved(*scripts)), texts("a\n", (token,), echo=True, num_choices=2)
    )
    assert told(events) == {0: "a\n!", 1: "a\n!", 2: "b!", 3: "b!"}
    assert ends(events)[-1].usage.completion_tokens == 4 * 2


# ---- refusals


@pytest.mark.parametrize(
    ("request_", "param", "words"),
    [
        (texts(), "prompt", "from 1 to 64"),
        (texts(*["a"] * 65), "prompt", "not 65"),
        (texts("a", ()), "prompt[1]", "at least one token"),
        (texts((5,), (VOCAB,)), "prompt[1]", "token ids from 0"),
        (texts("a", "9" * 600), "prompt[1]", "600|601"),
        (texts("a", echo=True, num_logprobs=0), "echo", "logprobs"),
        (texts("a", num_choices=17), "n", "at most 16"),
        (chat(0), "n", "at least 1"),
    ],
    ids=["none", "many", "empty", "beyond", "long", "echo", "choices", "no choices"],
)
def test_what_is_refused_is_named(
    prompts: PromptBuilder, request_: ChatGeneration | TextGeneration, param: str, words: str
) -> None:
    cell = FakeCell([])
    with pytest.raises(InvalidRequestError, match=words) as caught:
        read(prompts, cell, request_)
    assert caught.value.param == param
    assert not cell.requests


# ---- failures


def failing(prompts: PromptBuilder, failure: TokenEvent | OstroError) -> FakeCell:
    first, second = Script(prompts).step("a").end(), Script(prompts, 1).step("b")
    return FakeCell([*interleaved(first, second), failure])


@pytest.mark.parametrize("says", ["event", "error"])
def test_the_failure_of_one_choice_fails_the_request(prompts: PromptBuilder, says: str) -> None:
    failed: TokenEvent | OstroError = ShardLostError("rank 1 was lost")
    if says == "event":
        failed = TokenEvent(
            "r.1",
            1,
            [],
            finish_reason=FinishReason.ERROR,
            error_code="queue_full",
            error_message="full",
            choice=1,
        )
    cell = failing(prompts, failed)
    with pytest.raises(OverloadedError if says == "event" else ShardLostError):
        read(prompts, cell, chat(2))
    assert not cell.is_open


def test_an_error_after_a_choice_has_ended_at_a_stop_string_is_not_its_own(
    prompts: PromptBuilder,
) -> None:
    stopped = (
        Script(prompts).step("STOP").step(finish_reason=FinishReason.ERROR, error_code="internal")
    )
    cell = FakeCell(interleaved(stopped, Script(prompts, 1).step("a").step("b").end()))
    assert told(read(prompts, cell, chat(2, stop=("STOP",)))) == {1: "ab"}


def test_leaving_in_the_middle_closes_the_cell(prompts: PromptBuilder) -> None:
    cell = two_answers(prompts)

    async def leave() -> None:
        answer = Frontend(cell, prompts, CARD, CONFIG).chat(chat(2))
        async with aclosing(cast("AsyncGenerator[GenerationEvent, None]", answer)) as events:
            async for event in events:
                if isinstance(event, TextDelta) and event.choice == 1:
                    assert cell.is_open
                    return

    asyncio.run(leave())
    assert not cell.is_open


def test_a_cancel_ends_every_choice(prompts: PromptBuilder) -> None:
    scripts = [Script(prompts, choice).step("a").end(FinishReason.CANCELLED) for choice in range(2)]
    events = read(prompts, FakeCell(interleaved(*scripts)), chat(2))
    assert [end.reason for end in ends(events)] == ["cancelled", "cancelled"]
