"""Both gRPC clients against the real face over a scripted frontend."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from contextlib import aclosing, closing
from dataclasses import replace

import grpc
import pytest
import trustme
from grpc_face import grpc_face
from grpc_thread import serve_in_thread
from scripted_frontend import (
    CALL,
    FINISHED,
    MODEL,
    STARTED,
    THOUGHTFUL,
    ScriptedFrontend,
)
from wire import Wire

from ostro.actors.engine.choice_seed import choice_seed
from ostro.actors.errors import (
    DeadlineError,
    ForbiddenError,
    InvalidRequestError,
    NotFoundError,
    NotReadyError,
    OstroError,
    OverloadedError,
    QuotaError,
    ShardLostError,
    UnauthenticatedError,
)
from ostro.cluster.client import AsyncClient, Client
from ostro.cluster.client_channel import Tls, parse_address
from ostro.cluster.client_errors import ConnectionLostError
from ostro.cluster.client_requests import (
    assistant,
    system,
    text_of,
    thinking_of,
    tool,
    tool_result,
    user,
)
from ostro.cluster.client_streams import Event, Resumed
from ostro.cluster.generation import ChatGeneration, TextDelta
from ostro.cluster.retries import Retries
from ostro.configs.errors import ConfigError
from ostro.protos import generation_pb2 as pb
from ostro.protos import generation_pb2_grpc

QUICK = Retries(most=3, first_delay_s=0.001)
ONCE = Retries(most=0)
THINKING, ANSWER = pb.CHANNEL_THINKING, pb.CHANNEL_ANSWER
SHARD_LOST = ShardLostError("rank 1 is gone", retry_after_s=0.01)


class Scripts(ScriptedFrontend):
    """Plays one script after the other, the last one for ever."""

    def __init__(self, *scripts) -> None:
        super().__init__()
        self._scripts = list(scripts)

    def _play(self, model: str):
        self.script = self._scripts.pop(0) if len(self._scripts) > 1 else self._scripts[0]
        return super()._play(model)


@pytest.fixture
def frontend() -> ScriptedFrontend:
    return ScriptedFrontend()


@pytest.fixture
def client(frontend) -> Iterator[Client]:
    with grpc_face(frontend) as address, Client(address, retries=QUICK) as client:
        yield client


def told(events: list[Event], channel: int = ANSWER) -> str:
    deltas = [event for event in events if isinstance(event, pb.Delta)]
    return "".join(delta.text for delta in deltas if delta.channel == channel)


def kinds(events: list[Event]) -> list[str]:
    return [type(event).__name__ for event in events]


# ---- what comes back


def test_chat_answers_whole(client):
    answer = client.chat("Say hello.")
    message = answer.choices[0].message
    assert (thinking_of(message), text_of(message)) == ("Let me see.", "Hello")
    assert answer.usage.completion_tokens == 11


def test_stream_chat_tells_every_event(frontend, client):
    frontend.script = (*THOUGHTFUL[:-1], CALL, FINISHED)
    events = list(client.stream_chat("Say hello."))
    assert kinds(events) == ["Started", *["Delta"] * 4, "ToolCallDone", "Finish", "Ended"]
    assert (told(events, THINKING), told(events)) == ("Let me see.", "Hello")


def test_generate_takes_text_or_token_ids(frontend, client):
    for prompt, sent in (("Once", "Once"), ([1, 2], (1, 2))):
        assert told(list(client.generate(prompt, max_tokens=5))) == "Hello"
        assert frontend.asked[-1].prompts == (sent,)


def test_the_rest_of_the_services_can_be_called(frontend, client):
    assert client.end_thinking("gen-1")
    assert not client.cancel("gen-2")
    assert frontend.cell.controls == [("end_thinking", "gen-1"), ("cancel", "gen-2")]
    assert client.tokenize("ab").token_ids == [1, 97, 98]
    assert client.tokenize([system("a"), user("b")], effort="low").token_ids == [1, 2, 0]
    assert client.detokenize([97, 98]) == "ab"
    assert client.model().id == MODEL
    assert client.cluster().ready
    assert {placement.layer for placement in client.experts([1]).placements} == {1}


def test_the_async_client_does_the_same(frontend):
    async def run(address):
        async with AsyncClient(address, retries=QUICK) as client:
            events = [event async for event in client.stream_chat("Say hello.")]
            raw = [event async for event in client.generate([1, 2])]
            answer = await client.chat("Say hello.")
            return (
                (told(events), told(raw), text_of(answer.choices[0].message)),
                await client.end_thinking("gen-1"),
                await client.cancel("gen-2"),
                list((await client.tokenize("a")).token_ids),
                await client.detokenize([97]),
                (await client.model()).id,
                (await client.cluster()).ready,
                len((await client.experts([0])).placements),
            )

    with grpc_face(frontend) as address:
        results = asyncio.run(run(address))
    assert results == (("Hello",) * 3, True, False, [1, 97], "a", MODEL, True, 2)


# ---- what is sent


def test_what_is_asked_by_name_arrives(frontend, client):
    options = pb.GenerationOptions(priority=3, sampling=pb.SamplingOptions(top_k=4))
    weather = tool("weather", "Get the weather", {"type": "object"})
    call = pb.ToolCall(id="abcDEF123", name="weather", arguments="{}")
    client.chat(
        [
            system("Be brief."),
            user("What is this?", images=[b"a picture"]),
            assistant("Wait.", thinking="Hm.", tool_calls=[call]),
            tool_result(call, "mild"),
        ],
        tools=[weather],
        options=options,
        effort="high",
        max_thinking_tokens=7,
        max_tokens=9,
        temperature=0.5,
        top_p=0.9,
        seed=5,
        stop=["\n"],
        request_id="mine",
        model=MODEL,
    )
    asked = frontend.asked[0]
    assert isinstance(asked, ChatGeneration)
    assert [message.role for message in asked.messages] == ["system", "user", "assistant", "tool"]
    assert asked.messages[1].images[0].data == b"a picture"
    assert (asked.messages[2].thinking, asked.messages[2].tool_calls[0].name) == ("Hm.", "weather")
    assert asked.tools[0].parameters == {"type": "object"}
    sent = asked.options
    assert (sent.priority, sent.top_k, sent.effort, sent.thinking_token_budget) == (3, 4, "high", 7)
    assert (sent.max_tokens, sent.temperature, sent.top_p, sent.seed) == (9, 0.5, 0.9, 5)
    assert (sent.stop, sent.request_id) == (("\n",), "mine")


@pytest.mark.parametrize(
    ("asked", "field"),
    [
        ({"effort": "ultra"}, "effort"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"seed": "x"}, "seed"),
        ({"max_token": 5}, "max_token"),
    ],
)
def test_what_no_field_can_hold_is_refused_by_name(client, asked, field):
    with pytest.raises(InvalidRequestError) as refused:
        client.chat("Hi", **asked)
    assert refused.value.param == field


def test_one_stop_string_may_stand_alone(frontend, client):
    client.chat("Hi", stop="END")
    assert frontend.asked[-1].options.stop == ("END",)


def test_a_stream_without_resume_asks_for_nothing_of_its_own(frontend, client):
    list(client.stream_chat("Hi", resume=False))
    options = frontend.asked[0].options
    assert (options.seed, options.return_token_ids) == (None, False)


# ---- failures


@pytest.mark.parametrize(
    ("error", "cls"),
    [
        (InvalidRequestError("bad", code="unsupported_value", param="top_p"), InvalidRequestError),
        (NotFoundError("no such model", code="model_not_found", param="model"), NotFoundError),
        (OverloadedError("full", retry_after_s=7.5), OverloadedError),
        (QuotaError("used up", param="tokens_per_minute", retry_after_s=7.5), QuotaError),
        (UnauthenticatedError("who?"), UnauthenticatedError),
        (ForbiddenError("not with this key"), ForbiddenError),
        (NotReadyError("loading", retry_after_s=3.0), NotReadyError),
        (ShardLostError("gone", retry_after_s=3.0), ShardLostError),
        (DeadlineError("late"), DeadlineError),
    ],
    ids=lambda value: getattr(value, "code", ""),
)
@pytest.mark.parametrize("streams", [True, False])
def test_the_servers_errors_arrive_as_they_were_raised(error, cls, streams):
    with grpc_face(ScriptedFrontend(error)) as address, Client(address, retries=ONCE) as client:
        ask = (lambda: list(client.stream_chat("Hi"))) if streams else (lambda: client.chat("Hi"))
        with pytest.raises(cls) as raised:
            ask()
    told = raised.value
    assert (told.message, told.code, told.param) == (error.message, error.code, error.param)
    assert told.retry_after_s == error.retry_after_s


def test_an_unlisted_failure_does_not_tell_its_text(frontend, client):
    frontend.script = (RuntimeError("a secret wombat"),)
    with pytest.raises(OstroError) as raised:
        client.chat("Hi")
    assert raised.value.code == "internal"
    assert "wombat" not in raised.value.message


def test_where_nothing_answers_the_way_out_is_told(free_port):
    with (
        Client(f"127.0.0.1:{free_port()}", retries=QUICK) as client,
        pytest.raises(ConnectionLostError, match="ostro serve") as raised,
    ):
        client.model()
    assert raised.value.code == "unreachable"


def test_the_callers_timeout_ends_the_generation(frontend, client):
    frontend.script = (STARTED, TextDelta(text="Hel"), None)
    with pytest.raises(DeadlineError):
        list(client.stream_chat("Hi", timeout_s=0.3))
    assert frontend.closed.wait(10)


def test_a_timeout_of_nothing_asks_nothing(frontend, client):
    with pytest.raises(DeadlineError):
        client.chat("Hi", timeout_s=0)
    assert not frontend.asked


def test_leaving_a_stream_ends_the_generation(frontend, client):
    frontend.script = (STARTED, TextDelta(text="Hel"), None)
    with closing(client.stream_chat("Hi")) as events:
        next(events)
    assert frontend.closed.wait(10)


def test_leaving_an_async_stream_ends_the_generation(frontend):
    async def run(address):
        async with AsyncClient(address) as client, aclosing(client.stream_chat("Hi")) as events:
            await anext(events)

    frontend.script = (STARTED, TextDelta(text="Hel"), None)
    with grpc_face(frontend) as address:
        asyncio.run(run(address))
        assert frontend.closed.wait(10)


# ---- retries


BUSY = (OverloadedError("full", retry_after_s=0.01),)


@pytest.mark.parametrize("streams", [True, False])
def test_what_was_refused_for_the_moment_is_asked_again(streams):
    frontend = Scripts(BUSY, BUSY, THOUGHTFUL)
    with grpc_face(frontend) as address, Client(address, retries=QUICK) as client:
        if streams:
            events = list(client.stream_chat("Hi"))
            assert told(events) == "Hello"
            assert "Resumed" not in kinds(events)
        else:
            assert text_of(client.chat("Hi").choices[0].message) == "Hello"
    assert len(frontend.asked) == 3


def test_retries_are_bounded(frontend, client):
    frontend.script = BUSY
    with pytest.raises(OverloadedError):
        client.chat("Hi")
    assert len(frontend.asked) == 1 + QUICK.most


def test_a_wait_beyond_the_deadline_is_not_begun(frontend, client):
    frontend.script = (OverloadedError("full", retry_after_s=60.0),)
    with pytest.raises(OverloadedError):
        client.chat("Hi", timeout_s=5.0)
    assert len(frontend.asked) == 1


def test_the_callers_own_faults_are_not_repeated(frontend, client):
    frontend.script = (InvalidRequestError("bad"),)
    with pytest.raises(InvalidRequestError):
        client.chat("Hi")
    assert len(frontend.asked) == 1


@pytest.mark.parametrize("num_failures", [1, 2, 5, 500])
def test_delays_double_up_to_the_longest_and_come_on_top_of_what_was_asked(num_failures):
    retries = Retries(first_delay_s=0.5, longest_delay_s=8.0)
    longest = min(0.5 * 2 ** (num_failures - 1), 8.0)
    for _ in range(50):
        assert longest / 2 <= retries.delay_s(num_failures) <= longest
        assert retries.delay_s(num_failures, 3.0) >= 3.0


# ---- streams that break


BROKEN = (
    STARTED,
    TextDelta(text="Let me see.", thinking=True, token_ids=(34, 5, 6, 35)),
    TextDelta(text="Hel", token_ids=(7,)),
    SHARD_LOST,
)
REST = (STARTED, TextDelta(text="lo", token_ids=(8,)), FINISHED)


def test_a_broken_stream_goes_on_where_it_was():
    frontend = Scripts(BROKEN, REST)
    with grpc_face(frontend) as address, Client(address, retries=QUICK) as client:
        events = list(client.stream_chat("Hi", max_tokens=20, effort="high"))
    assert kinds(events) == ["Started", "Delta", "Delta", "Resumed", "Delta", "Finish", "Ended"]
    assert told(events) == "Hello"
    assert isinstance(events[3], Resumed)
    assert events[3].after.message == "rank 1 is gone"
    first, second = frontend.asked
    last = second.messages[-1]
    assert (last.role, last.prefix, last.thinking, last.text) == (
        ("assistant", True, "Let me see.", "Hel")
    )
    assert (first.options.max_tokens, second.options.max_tokens) == (20, 15)
    assert second.options.thinking_token_budget == 2048 - 2
    assert first.options.seed == second.options.seed
    assert first.options.request_id == second.options.request_id
    assert not any(event.token_ids for event in events if isinstance(event, pb.Delta))


def test_the_figures_of_a_resumed_stream_are_those_of_the_whole():
    with grpc_face(Scripts(BROKEN, REST)) as address, Client(address, retries=QUICK) as client:
        events = list(client.stream_chat("Hi"))
    ended = events[-1]
    assert isinstance(ended, pb.Ended)
    assert ended.usage.completion_tokens == 6
    assert ended.usage.thinking_tokens == FINISHED.usage.thinking_tokens + 2  # without its marks
    assert ended.usage.prompt_tokens == STARTED.num_prompt_tokens


def tokens(text: str, *token_ids: int, choice: int = 0, thinking: bool = False) -> TextDelta:
    return TextDelta(text=text, token_ids=token_ids, choice=choice, thinking=thinking)


def finished(choice: int = 0, *, is_last: bool = True, **fields):
    return replace(FINISHED, choice=choice, is_last=is_last, **fields)


# The second has ended when it breaks, with a call; the third has not begun.
BROKEN_CHOICES = (
    replace(STARTED, num_choices=3),
    tokens("Hm", 34, 5, thinking=True),
    tokens("Ca", 7, 8, 9, choice=1),
    replace(CALL, choice=1),
    finished(1, is_last=False, reason="tool_calls"),
    SHARD_LOST,
)
REST_OF_FIRST = (STARTED, tokens("m", 6, 35, thinking=True), tokens("Hello", 8, 2), FINISHED)
REST_OF_THIRD = (STARTED, tokens("World", 9, 2), FINISHED)
THREE_CHOICES = pb.GenerationOptions(choices=3)


def told_by_choice(events: list[Event]) -> dict[int, str]:
    texts: dict[int, str] = {}
    for event in events:
        if isinstance(event, pb.Delta):
            texts[event.choice] = texts.get(event.choice, "") + event.text
    return texts


def test_several_choices_go_on_each_by_itself():
    frontend = Scripts(BROKEN_CHOICES, REST_OF_FIRST, REST_OF_THIRD)
    with grpc_face(frontend) as address, Client(address, retries=QUICK) as client:
        events = list(client.stream_chat("Hi", seed=5, max_tokens=20, options=THREE_CHOICES))
    assert told_by_choice(events) == {0: "HmmHello", 1: "Ca", 2: "World"}
    assert kinds(events).count("Resumed") == kinds(events).count("Ended") == 1
    assert [event.choice for event in events if isinstance(event, pb.Finish)] == [1, 0, 2]
    whole, first, third = (asked.options for asked in frontend.asked)
    assert (whole.num_choices, first.num_choices, third.num_choices) == (3, 1, 1)
    assert [first.seed, third.seed] == [5, choice_seed(5, 2)]
    assert [first.max_tokens, third.max_tokens] == [18, 20]
    assert len({asked.options.request_id for asked in frontend.asked}) == 1
    assert frontend.asked[1].messages[-1].thinking == "Hm"
    assert frontend.asked[2].messages == frontend.asked[0].messages


def test_the_figures_of_resumed_choices_are_those_of_the_whole():
    frontend = Scripts(BROKEN_CHOICES, REST_OF_FIRST, REST_OF_THIRD)
    with grpc_face(frontend) as address, Client(address, retries=QUICK) as client:
        events = list(client.stream_chat("Hi", options=THREE_CHOICES))
    usage = events[-1].usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (STARTED.num_prompt_tokens, 11)
    told_thinking = FINISHED.reasoning.thinking_tokens
    # Of the first, one thinking token came before the break.
    assert usage.thinking_tokens == 3 * told_thinking + 1
    thinking = {e.choice: e.report.thinking_tokens for e in events if isinstance(e, pb.Finish)}
    assert thinking == {1: told_thinking, 0: told_thinking + 1, 2: told_thinking}


def test_several_choices_go_on_after_a_break_in_what_goes_on():
    again = (STARTED, tokens("m", 6, thinking=True), SHARD_LOST)
    frontend = Scripts(BROKEN_CHOICES, again, REST_OF_FIRST, REST_OF_THIRD)
    with grpc_face(frontend) as address, Client(address, retries=QUICK) as client:
        events = list(client.stream_chat("Hi", options=THREE_CHOICES))
    assert told_by_choice(events) == {0: "HmmmHello", 1: "Ca", 2: "World"}
    assert kinds(events).count("Resumed") == 2
    assert events[-1].usage.completion_tokens == 12


def test_who_cancels_what_goes_on_cancels_the_choices_to_come_too():
    cancelled = (STARTED, tokens("m", 6, thinking=True), finished(reason="cancelled"))
    frontend = Scripts(BROKEN_CHOICES, cancelled)
    with grpc_face(frontend) as address, Client(address, retries=QUICK) as client:
        events = list(client.stream_chat("Hi", options=THREE_CHOICES))
    ends = {event.choice: event.reason for event in events if isinstance(event, pb.Finish)}
    assert ends[0] == ends[2] == pb.FINISH_REASON_CANCELLED
    assert kinds(events)[-1] == "Ended"
    assert len(frontend.asked) == 2


def test_several_choices_fail_where_one_of_them_cannot_go_on():
    calling = (
        replace(STARTED, num_choices=3),
        tokens("Ca", 7),
        replace(CALL, choice=2),
        SHARD_LOST,
    )
    frontend = Scripts(calling)
    with grpc_face(frontend) as address, Client(address, retries=QUICK) as client:
        events = client.stream_chat("Hi", options=THREE_CHOICES)
        with pytest.raises(ShardLostError, match="rank 1 is gone"):
            list(events)
    assert len(frontend.asked) == 1


def test_thinking_that_the_prompt_opened_has_one_mark_less():
    open_thinking = pb.Message(
        role=pb.ROLE_ASSISTANT,
        parts=[pb.Part(thinking=pb.Thinking(text="So", closed=False))],
        prefix=True,
    )
    broken = (STARTED, tokens("Hm", 5, 6, thinking=True), SHARD_LOST)
    with grpc_face(Scripts(broken, REST)) as address, Client(address, retries=QUICK) as client:
        events = list(client.stream_chat([user("Hi"), open_thinking]))
    assert events[-1].usage.thinking_tokens == FINISHED.reasoning.thinking_tokens + 2


def test_the_async_client_goes_on_as_well():
    async def run(address):
        async with AsyncClient(address, retries=QUICK) as client:
            return [event async for event in client.stream_chat("Hi")]

    with grpc_face(Scripts(BROKEN, REST)) as address:
        events = asyncio.run(run(address))
    assert told(events) == "Hello"
    assert "Resumed" in kinds(events)


def test_a_stream_whose_connection_is_cut_goes_on_over_a_new_one():
    hanging = (STARTED, TextDelta(text="Hel", token_ids=(7,)), None)
    frontend = Scripts(hanging, REST)
    with (
        grpc_face(frontend) as address,
        closing(Wire(address)) as wire,
        Client(wire.address, retries=QUICK) as client,
    ):
        events = []
        for event in client.stream_chat("Hi"):
            events.append(event)
            if isinstance(event, pb.Delta) and event.text == "Hel":
                wire.cut()
    assert kinds(events) == ["Started", "Delta", "Resumed", "Delta", "Finish", "Ended"]
    assert told(events) == "Hello"
    assert frontend.closed.is_set()


def test_raw_token_ids_go_on_with_the_token_ids_that_came():
    broken = (STARTED, TextDelta(text="Hel", token_ids=(7, 8)), SHARD_LOST)
    frontend = Scripts(broken, REST)
    with grpc_face(frontend) as address, Client(address, retries=QUICK) as client:
        assert told(list(client.generate([1, 2]))) == "Hello"
    assert frontend.asked[1].prompts == ((1, 2, 7, 8),)


def test_failures_are_counted_anew_when_something_came():
    """One token more each time: as many breaks as that are no reason to give up."""
    steps = [(STARTED, TextDelta(text=letter, token_ids=(7,)), SHARD_LOST) for letter in "Hell"]
    frontend = Scripts(*steps, (STARTED, TextDelta(text="o", token_ids=(8,)), FINISHED))
    once = Retries(most=1, first_delay_s=0.001)
    with grpc_face(frontend) as address, Client(address, retries=once) as client:
        assert told(list(client.stream_chat("Hi"))) == "Hello"


def test_a_stream_that_never_gets_further_is_given_up():
    frontend = Scripts(BROKEN, (STARTED, SHARD_LOST))
    with grpc_face(frontend) as address, Client(address, retries=QUICK) as client:
        events = client.stream_chat("Hi")
        with pytest.raises(ShardLostError):
            list(events)
    assert len(frontend.asked) == 1 + QUICK.most


def test_our_own_last_attempt_is_waited_for():
    lingering = (InvalidRequestError("runs already", code="duplicate_request_id"),)
    frontend = Scripts(BROKEN, lingering, REST)
    with grpc_face(frontend) as address, Client(address, retries=QUICK) as client:
        assert told(list(client.stream_chat("Hi"))) == "Hello"


def test_somebody_elses_request_id_is_not_waited_for(frontend, client):
    frontend.script = (InvalidRequestError("runs already", code="duplicate_request_id"),)
    with pytest.raises(InvalidRequestError):
        list(client.stream_chat("Hi", request_id="theirs"))
    assert len(frontend.asked) == 1


AFTER_A_CALL = (STARTED, CALL, SHARD_LOST)
THINKING_LATE = (
    STARTED,
    TextDelta(text="Hel", token_ids=(7,)),
    TextDelta(text="Hm", thinking=True, token_ids=(9,)),
    SHARD_LOST,
)
ALL_THERE = (STARTED, TextDelta(text="Hel", token_ids=(7,)), SHARD_LOST)


@pytest.mark.parametrize(
    ("script", "asked"),
    [
        (BROKEN, {"resume": False}),
        (AFTER_A_CALL, {}),
        (THINKING_LATE, {}),
        (ALL_THERE, {"max_tokens": 1}),
    ],
    ids=["not wanted", "after a call", "thinking after text", "nothing left to say"],
)
def test_what_no_prompt_can_hold_fails_instead(frontend, client, script, asked):
    frontend.script = script
    with pytest.raises(ShardLostError):
        list(client.stream_chat("Hi", **asked))
    assert len(frontend.asked) == 1


def test_hidden_thinking_stays_hidden_and_is_replayed():
    frontend = Scripts(BROKEN, REST)
    options = pb.GenerationOptions(reasoning=pb.ReasoningOptions(omit_thinking=True))
    with grpc_face(frontend) as address, Client(address, retries=QUICK) as client:
        events = list(client.stream_chat("Hi", options=options))
    assert (told(events), told(events, THINKING)) == ("Hello", "")
    assert frontend.asked[1].messages[-1].thinking == "Let me see."


def test_token_ids_are_shown_to_those_who_asked():
    options = pb.GenerationOptions(return_token_ids=True)
    with grpc_face(Scripts(BROKEN, REST)) as address, Client(address, retries=QUICK) as client:
        events = list(client.stream_chat("Hi", options=options))
    ids = [token for event in events if isinstance(event, pb.Delta) for token in event.token_ids]
    assert ids == [34, 5, 6, 35, 7, 8]


# ---- the channel


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("127.0.0.1:9000", "127.0.0.1:9000"),
        ("grpc://box:80/", "box:80"),
        ("box", "box:9000"),
        ("[::1]", "[::1]:9000"),
        ("[::1]:7", "[::1]:7"),
        ("grpcs://box:7", "box:7"),
    ],
)
def test_parse_address_reads_what_people_type(url, address):
    assert parse_address(url) == address


@pytest.mark.parametrize(
    "url", ["", ":9000", "http://box:8000", "box:port", "box:70000", "::1", "fe80::1:9000"]
)
def test_parse_address_refuses_what_is_no_address(url):
    with pytest.raises(ConfigError, match="HOST:PORT"):
        parse_address(url)


class NotesMetadata(generation_pb2_grpc.GenerationServiceServicer):
    """Answers with the key that came with the call."""

    async def Detokenize(self, request, context):  # noqa: N802
        metadata = dict(context.invocation_metadata())
        return pb.DetokenizeResponse(text=metadata.get("authorization", "no key"))


def add_notes(server: grpc.aio.Server) -> None:
    generation_pb2_grpc.add_GenerationServiceServicer_to_server(NotesMetadata(), server)


def test_the_key_goes_with_every_call():
    with serve_in_thread(add_notes) as address:
        for key, sent in (("s3cret", "Bearer s3cret"), (None, "no key")):
            with Client(address, api_key=key) as client:
                assert client.detokenize([1]) == sent


def test_a_key_that_no_header_can_carry_is_refused():
    with pytest.raises(ConfigError, match="api_key"):
        Client("localhost", api_key="a\nb")


def test_tls_takes_the_authorities_and_the_certificate_it_is_given(tmp_path):
    authority = trustme.CA()
    server, caller = authority.issue_cert("localhost"), authority.issue_cert("me@localhost")
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    caller.private_key_pem.write_to_path(tmp_path / "key.pem")
    caller.cert_chain_pems[0].write_to_path(tmp_path / "cert.pem")
    credentials = grpc.ssl_server_credentials(
        [(server.private_key_pem.bytes(), server.cert_chain_pems[0].bytes())],
        root_certificates=authority.cert_pem.bytes(),
        require_client_auth=True,
    )
    own = {"certificate_file": tmp_path / "cert.pem", "key_file": tmp_path / "key.pem"}
    with serve_in_thread(add_notes, credentials=credentials) as address:
        port = address.rpartition(":")[2]
        tls = Tls(ca_file=tmp_path / "ca.pem", **own)
        with Client(f"localhost:{port}", tls=tls, api_key="k") as client:
            assert client.detokenize([1]) == "Bearer k"
        by_name = Tls(ca_file=tmp_path / "ca.pem", server_name="localhost", **own)
        with Client(address, tls=by_name) as client:
            assert client.detokenize([1]) == "no key"
        for stranger, why in (
            (Tls(ca_file=tmp_path / "ca.pem"), "did not show"),
            (Tls(**own), "nobody we trust"),
            (Tls(ca_file=tmp_path / "ca.pem", server_name="other", **own), "other names"),
        ):
            with (
                Client(f"grpcs://localhost:{port}", tls=stranger, retries=ONCE) as client,
                pytest.raises(OstroError, match=why),
            ):
                client.detokenize([1])


def test_tls_to_a_plain_port_says_so():
    with (
        serve_in_thread(add_notes) as address,
        Client(f"grpcs://{address}", retries=ONCE) as client,
        pytest.raises(OstroError, match="plain text"),
    ):
        client.detokenize([1])


def test_tls_says_what_is_missing(tmp_path):
    with pytest.raises(ConfigError, match="go together"):
        Tls(key_file="key.pem")
    with pytest.raises(ConfigError, match=r"ca_file .*no\.pem: No such file"):
        Client("localhost", tls=Tls(ca_file=tmp_path / "no.pem"))


_ONLY = ("google", "grpc", "grpc_health", "grpc_reflection", "grpc_tools", "typing_extensions")
_ALONE = f"""
import sys


class Refuse:
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top not in {(*_ONLY, "ostro")} and top not in sys.stdlib_module_names:
            if not top.startswith(("_cython", "cython_runtime")):
                raise ImportError(f"the client must do without {{name}}")


sys.meta_path.insert(0, Refuse())
from ostro.cluster.client import Client
from ostro.cluster.client_requests import text_of

with Client(sys.argv[1]) as client:
    sys.stdout.write(text_of(client.chat("Hi").choices[0].message))
"""


def test_the_client_needs_grpc_and_protobuf_alone(frontend):
    with grpc_face(frontend) as address:
        arguments = [sys.executable, "-c", _ALONE, address]
        done = subprocess.run(arguments, capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout, done.stderr) == ("Hello", "")
