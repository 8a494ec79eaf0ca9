"""The gRPC face behind a real grpc.aio server, in the way Ray Serve calls its methods."""

from __future__ import annotations

import asyncio
import contextlib

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc_face import SERVICES, ByKeyword
from grpc_health.v1 import health_pb2, health_pb2_grpc
from scripted_frontend import (
    ALIAS,
    CALL,
    FINISHED,
    MODEL,
    STARTED,
    THOUGHTFUL,
    THREE,
    WITH_LOGPROBS,
    ScriptedFrontend,
)

from ostro.actors.errors import (
    DeadlineError,
    InvalidRequestError,
    NotReadyError,
    OverloadedError,
    ShardLostError,
)
from ostro.cluster.generation import TextDelta
from ostro.cluster.grpc_ingress import GENERATION_SERVICE, GrpcMethods
from ostro.cluster.metrics import Metrics
from ostro.protos import cluster_pb2, cluster_pb2_grpc, generation_pb2, generation_pb2_grpc

pb = generation_pb2
HELLO = pb.Conversation(
    messages=[pb.Message(role=pb.ROLE_USER, parts=[pb.Part(text="Say hello.")])]
)


class Stubs:
    """Every RPC of the three services, as a client calls it."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.channel = channel
        self.generation = generation_pb2_grpc.GenerationServiceStub(channel)
        self.cluster = cluster_pb2_grpc.ClusterServiceStub(channel)
        self.health = health_pb2_grpc.HealthStub(channel)


@contextlib.asynccontextmanager
async def face(frontend: ScriptedFrontend):
    server = grpc.aio.server()
    methods = ByKeyword(GrpcMethods(lambda: frontend, Metrics(MODEL)))
    for add in SERVICES:
        add(methods, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield Stubs(channel)
    finally:
        await server.stop(grace=0)


def error_info(error: grpc.aio.AioRpcError) -> error_details_pb2.ErrorInfo:
    return details_of(error, error_details_pb2.ErrorInfo)


def details_of(error: grpc.aio.AioRpcError, kind):
    packed = dict(error.trailing_metadata())["grpc-status-details-bin"]
    for detail in status_pb2.Status.FromString(packed).details:
        if detail.Is(kind.DESCRIPTOR):
            unpacked = kind()
            detail.Unpack(unpacked)
            return unpacked
    return None


# ---- generation


def test_chat_answers_whole():
    async def run():
        frontend = ScriptedFrontend(*THOUGHTFUL[:-1], CALL, FINISHED)
        async with face(frontend) as stubs:
            return await stubs.generation.Chat(pb.ChatRequest(model=MODEL, conversation=HELLO))

    answer = asyncio.run(run())
    choice = answer.choices[0]
    assert [part.WhichOneof("part") for part in choice.message.parts] == ["thinking", "text"]
    assert choice.message.parts[0].thinking.text == "Let me see."
    assert choice.message.parts[1].text == "Hello"
    assert choice.message.tool_calls[0].id == "abcDEF123"
    assert choice.finish.reason == pb.FINISH_REASON_STOP
    assert choice.reasoning.ended_by == pb.ReasoningReport.ENDED_BY_MODEL
    assert (answer.request_id, answer.usage.thinking_tokens) == ("gen-1", 5)
    told = answer.timing
    assert told.prefill.nanos == pytest.approx(30_000_000, abs=2)
    assert told.gateway.nanos == pytest.approx(20_000_000, abs=2)
    assert told.decode.nanos == pytest.approx(440_000_000, abs=2)
    assert told.stages.experts.nanos == pytest.approx(200_000_000, abs=2)
    stages = sum(duration.nanos for _, duration in told.stages.ListFields())
    assert stages == pytest.approx(told.prefill.nanos + told.decode.nanos, abs=20)


def test_stream_chat_tells_every_event_in_order():
    async def run():
        frontend = ScriptedFrontend(*THOUGHTFUL[:-1], CALL, FINISHED)
        async with face(frontend) as stubs:
            request = pb.StreamChatRequest(conversation=HELLO)
            return [message async for message in stubs.generation.StreamChat(request)]

    messages = asyncio.run(run())
    kinds = [message.WhichOneof("event") for message in messages]
    assert kinds == ["started", *["delta"] * 4, "tool_call", "finish", "ended"]
    assert messages[0].started.reasoning.effort == pb.REASONING_EFFORT_LOW
    assert messages[0].started.reasoning.max_thinking_tokens == 2048
    channels = [m.delta.channel for m in messages if m.WhichOneof("event") == "delta"]
    assert channels == [pb.CHANNEL_THINKING] * 2 + [pb.CHANNEL_ANSWER] * 2
    assert messages[-1].ended.usage.cached_prompt_tokens == 4


def test_choices_are_answered_whole_in_their_order():
    async def run():
        frontend = ScriptedFrontend(*THREE)
        async with face(frontend) as stubs:
            request = pb.ChatRequest(conversation=HELLO, options=pb.GenerationOptions(choices=3))
            return frontend, await stubs.generation.Chat(request)

    frontend, answer = asyncio.run(run())
    assert frontend.asked[0].options.num_choices == 3
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert [[part.WhichOneof("part") for part in c.message.parts] for c in answer.choices] == [
        ["thinking", "text"],
        ["thinking"],
        ["text"],
    ]
    assert [choice.finish.choice for choice in answer.choices] == [0, 1, 2]
    assert [choice.finish.reason for choice in answer.choices] == [
        pb.FINISH_REASON_STOP,
        pb.FINISH_REASON_TOOL_CALLS,
        pb.FINISH_REASON_LENGTH,
    ]
    assert [len(choice.message.tool_calls) for choice in answer.choices] == [0, 1, 0]
    assert [len(choice.logprobs) for choice in answer.choices] == [2, 0, 2]


@pytest.mark.parametrize("rpc", ["StreamChat", "StreamGenerate"])
def test_streamed_choices_are_told_apart_and_end_once(rpc):
    async def run():
        async with face(ScriptedFrontend(*THREE)) as stubs:
            if rpc == "StreamChat":
                request = pb.StreamChatRequest(conversation=HELLO)
            else:
                request = pb.StreamGenerateRequest(text="Say")
            return [message async for message in getattr(stubs.generation, rpc)(request)]

    messages = asyncio.run(run())
    kinds = [message.WhichOneof("event") for message in messages]
    assert kinds.count("finish") == 3
    assert [kinds.count("ended"), kinds[-1]] == [1, "ended"]
    told = {0: "", 1: "", 2: ""}
    for message in messages:
        if message.WhichOneof("event") == "delta":
            told[message.delta.choice] += message.delta.text
    assert told == {0: "Let me see.Hello", 1: "Well", 2: "Hello"}
    assert [m.finish.choice for m in messages if m.WhichOneof("event") == "finish"] == [2, 0, 1]
    if rpc == "StreamChat":
        assert [m.tool_call.choice for m in messages if m.WhichOneof("event") == "tool_call"] == [1]


def test_stream_generate_takes_tokens_and_gives_logprobs():
    async def run():
        frontend = ScriptedFrontend(*WITH_LOGPROBS)
        async with face(frontend) as stubs:
            request = pb.StreamGenerateRequest(tokens=pb.Tokens(ids=[1, 2]))
            call = stubs.generation.StreamGenerate(request)
            return frontend, [message async for message in call]

    frontend, messages = asyncio.run(run())
    assert frontend.asked[0].prompts == ((1, 2),)
    deltas = [m.delta for m in messages if m.WhichOneof("event") == "delta"]
    assert [delta.token_ids[0] for delta in deltas] == [5, 6]
    assert [a.text for a in deltas[0].logprobs[0].top] == [b"Hel", b"J"]


def test_options_arrive_as_they_were_sent():
    async def run():
        frontend = ScriptedFrontend()
        options = pb.GenerationOptions(
            reasoning=pb.ReasoningOptions(
                effort=pb.REASONING_EFFORT_MEDIUM, max_thinking_tokens=0, omit_thinking=True
            ),
            sampling=pb.SamplingOptions(temperature=0.7, top_k=0, seed=9, logit_bias={3: -1.5}),
            stopping=pb.StoppingOptions(max_tokens=12, stop=["\n"], ignore_eos=True),
            logprobs=pb.LogprobOptions(top=2),
            cache_key="team",
        )
        options.queue_timeout.FromMilliseconds(1500)
        async with face(frontend) as stubs:
            request = pb.ChatRequest(conversation=HELLO, options=options, request_id="mine")
            await stubs.generation.Chat(request)
        return frontend.asked[0].options

    options = asyncio.run(run())
    assert (options.request_id, options.effort) == ("mine", "medium")
    assert (options.thinking_token_budget, options.omit_thinking) == (0, True)
    assert (options.temperature, options.top_p, options.top_k) == (0.7, None, 0)
    assert (options.seed, options.logit_bias) == (9, {3: -1.5})
    assert (options.max_tokens, options.stop, options.ignore_eos) == (12, ("\n",), True)
    assert (options.num_logprobs, options.cache_key) == (2, "team")
    assert options.queue_timeout_s == 1.5


def test_a_conversation_arrives_with_thinking_calls_and_tools():
    conversation = pb.Conversation(
        messages=[
            pb.Message(role=pb.ROLE_SYSTEM, parts=[pb.Part(text="Be "), pb.Part(text="brief.")]),
            pb.Message(
                role=pb.ROLE_ASSISTANT,
                parts=[pb.Part(thinking=pb.Thinking(text="hm")), pb.Part(text="so")],
                tool_calls=[pb.ToolCall(id="a-long-id-of-others", name="f", arguments="{}")],
            ),
            pb.Message(
                role=pb.ROLE_TOOL, parts=[pb.Part(text="4")], tool_call_id="a-long-id-of-others"
            ),
        ],
        tools=[pb.Tool(name="f", parameters='{"type": "object"}')],
        tool_choice=pb.ToolChoice(mode=pb.ToolChoice.MODE_NONE),
    )

    async def run():
        frontend = ScriptedFrontend()
        async with face(frontend) as stubs:
            await stubs.generation.Chat(pb.ChatRequest(conversation=conversation))
        return frontend.asked[0]

    asked = asyncio.run(run())
    system, assistant, tool = asked.messages
    assert system.text == "Be brief."
    assert (assistant.thinking, assistant.text) == ("hm", "so")
    assert len(assistant.tool_calls[0].call_id) == 9
    assert tool.tool_call_id == assistant.tool_calls[0].call_id
    assert asked.tools[0].parameters == {"type": "object"}
    assert asked.tool_choice.mode == "none"


def test_a_cancelled_stream_closes_the_generation():
    async def run():
        frontend = ScriptedFrontend(STARTED, TextDelta(text="Hel"), None)
        async with face(frontend) as stubs:
            call = stubs.generation.StreamChat(pb.StreamChatRequest(conversation=HELLO))
            await call.read()
            call.cancel()
            assert await asyncio.to_thread(frontend.closed.wait, 5)
        return frontend

    frontend = asyncio.run(run())
    assert (frontend.num_closed, frontend.num_completed) == (1, 0)


def test_control_acts_on_any_generation():
    async def run():
        frontend = ScriptedFrontend()
        control = pb.ControlGenerationRequest
        async with face(frontend) as stubs:
            answers = [
                await stubs.generation.ControlGeneration(
                    control(request_id=request_id, action=action)
                )
                for request_id, action in (
                    ("gen-1", control.ACTION_END_THINKING),
                    ("gone", control.ACTION_CANCEL),
                )
            ]
        return frontend.cell.controls, [answer.applied for answer in answers]

    controls, applied = asyncio.run(run())
    assert controls == [("end_thinking", "gen-1"), ("cancel", "gone")]
    assert applied == [True, False]


def test_tokenize_and_detokenize():
    async def run():
        async with face(ScriptedFrontend()) as stubs:
            text = await stubs.generation.Tokenize(pb.TokenizeRequest(text="ab"))
            chat = await stubs.generation.Tokenize(pb.TokenizeRequest(conversation=HELLO))
            back = await stubs.generation.Detokenize(pb.DetokenizeRequest(token_ids=[97, 98]))
        return text, chat, back

    text, chat, back = asyncio.run(run())
    assert (list(text.token_ids), text.max_context) == ([1, 97, 98], 4096)
    assert list(chat.token_ids) == [1, 1, 0]
    assert back.text == "ab"


# ---- errors

ERRORS = [
    (OverloadedError("full", retry_after_s=1.5), grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL"),
    (NotReadyError("loading"), grpc.StatusCode.UNAVAILABLE, "NOT_READY"),
    (ShardLostError("rank 1"), grpc.StatusCode.UNAVAILABLE, "SHARD_LOST"),
    (DeadlineError("late"), grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED"),
    (InvalidRequestError("no"), grpc.StatusCode.INVALID_ARGUMENT, "INVALID_VALUE"),
    (ZeroDivisionError("secret"), grpc.StatusCode.INTERNAL, "INTERNAL"),
]


@pytest.mark.parametrize(("error", "code", "reason"), ERRORS)
def test_a_failure_has_code_reason_and_retry_time(error, code, reason):
    async def run():
        async with face(ScriptedFrontend(error)) as stubs:
            with pytest.raises(grpc.aio.AioRpcError) as told:
                await stubs.generation.Chat(pb.ChatRequest(conversation=HELLO))
            stream = stubs.generation.StreamChat(pb.StreamChatRequest(conversation=HELLO))
            last = await stream.read()
            assert await stream.code() == code
        return told.value, last.failure

    told, failure = asyncio.run(run())
    assert (told.code(), error_info(told).reason) == (code, reason)
    assert (failure.code, failure.reason) == (code.value[0], reason)
    assert "secret" not in told.details() + failure.message
    retry = details_of(told, error_details_pb2.RetryInfo)
    assert failure.retryable == (retry is not None)
    if isinstance(error, OverloadedError):
        assert retry.retry_delay.ToMilliseconds() == 1500


def test_a_failure_mid_stream_comes_as_last_message_and_status():
    async def run():
        frontend = ScriptedFrontend(*THOUGHTFUL[:2], ShardLostError("rank 1"))
        async with face(frontend) as stubs:
            call = stubs.generation.StreamChat(pb.StreamChatRequest(conversation=HELLO))
            kinds = [(await call.read()).WhichOneof("event") for _ in range(3)]
            with pytest.raises(grpc.aio.AioRpcError) as told:
                await call.read()
        return kinds, told.value

    kinds, told = asyncio.run(run())
    assert kinds == ["started", "delta", "failure"]
    assert told.code() == grpc.StatusCode.UNAVAILABLE
    assert error_info(told).reason == "SHARD_LOST"


def user(*parts: pb.Part, **fields) -> pb.Conversation:
    return pb.Conversation(messages=[pb.Message(role=pb.ROLE_USER, parts=parts, **fields)])


def with_options(**fields) -> dict:
    return {"conversation": HELLO, "options": pb.GenerationOptions(**fields)}


BAD_CHATS = {
    "no messages": ({}, "conversation.messages"),
    "no role": (
        {"conversation": pb.Conversation(messages=[pb.Message()])},
        "conversation.messages[0].role",
    ),
    "image": (
        {"conversation": user(pb.Part(text="a"), pb.Part(image=pb.Image(uri="data:")))},
        "conversation.messages[0].parts[1]",
    ),
    "empty part": ({"conversation": user(pb.Part())}, "conversation.messages[0].parts[0]"),
    "prefix of a user": (
        {"conversation": user(prefix=True)},
        "conversation.messages[0].prefix",
    ),
    "unknown tool choice": (
        {
            "conversation": pb.Conversation(
                messages=HELLO.messages, tool_choice=pb.ToolChoice(mode=99)
            )
        },
        "conversation.tool_choice.mode",
    ),
    "broken schema": (
        {
            "conversation": pb.Conversation(
                messages=HELLO.messages, tools=[pb.Tool(name="f", parameters="[")]
            )
        },
        "conversation.tools[0].parameters",
    ),
    "prompt logprobs": (
        with_options(logprobs=pb.LogprobOptions(prompt=True)),
        "options.logprobs.prompt",
    ),
    "unknown effort": (
        with_options(reasoning=pb.ReasoningOptions(effort=99)),
        "options.reasoning.effort",
    ),
}


@pytest.mark.parametrize(("fields", "field"), BAD_CHATS.values(), ids=BAD_CHATS)
def test_bad_input_is_refused_by_name(fields, field):
    async def run():
        frontend = ScriptedFrontend()
        async with face(frontend) as stubs:
            with pytest.raises(grpc.aio.AioRpcError) as told:
                await stubs.generation.Chat(pb.ChatRequest(**fields))
        assert not frontend.asked
        return told.value

    told = asyncio.run(run())
    assert told.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert error_info(told).metadata["field"] == field


@pytest.mark.parametrize(
    "data",
    [
        pb.ChatRequest(model="abcdef").SerializeToString().replace(b"cd", b"\xff\xfe"),
        b"\xff\xff\xff",
    ],
    ids=["broken utf-8", "no protobuf"],
)
def test_an_unreadable_request_is_the_callers_fault(data):
    async def run():
        async with face(ScriptedFrontend()) as stubs:
            call = stubs.channel.unary_unary(f"/{GENERATION_SERVICE}/Chat")
            with pytest.raises(grpc.aio.AioRpcError) as told:
                await call(data)
        return told.value

    told = asyncio.run(run())
    assert told.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert error_info(told).reason == "UNREADABLE_REQUEST"


def test_unknown_model_and_unfinished_controls_are_refused():
    async def run():
        async with face(ScriptedFrontend()) as stubs:
            calls = (
                stubs.generation.Chat(pb.ChatRequest(model="other", conversation=HELLO)),
                stubs.generation.ControlGeneration(pb.ControlGenerationRequest()),
                stubs.generation.ControlGeneration(pb.ControlGenerationRequest(request_id="a")),
                stubs.generation.Tokenize(pb.TokenizeRequest()),
                stubs.cluster.GetExperts(cluster_pb2.GetExpertsRequest(layers=[7])),
            )
            told = []
            for call in calls:
                with pytest.raises(grpc.aio.AioRpcError) as refused:
                    await call
                told.append(error_info(refused.value).metadata["field"])
        return told

    assert asyncio.run(run()) == ["model", "request_id", "action", "input", "layers"]


# ---- cluster and health


def test_model_cluster_and_experts_are_shown():
    async def run():
        frontend = ScriptedFrontend()
        async with face(frontend) as stubs:
            model = await stubs.cluster.GetModel(cluster_pb2.GetModelRequest())
            picture = await stubs.cluster.GetCluster(cluster_pb2.GetClusterRequest())
            experts = await stubs.cluster.GetExperts(cluster_pb2.GetExpertsRequest(layers=[1]))
        return model, picture.cluster, experts

    model, cluster, experts = asyncio.run(run())
    assert (model.id, list(model.aliases)) == (MODEL, [ALIAS])
    assert (model.max_context, model.experts) == (4096, 2)
    assert model.default_effort == pb.REASONING_EFFORT_NONE
    assert len(model.efforts) == 7
    assert [actor.role for actor in cluster.actors] == [
        cluster_pb2.ACTOR_ROLE_ATTENTION,
        cluster_pb2.ACTOR_ROLE_EXPERT,
    ]
    assert (cluster.ready, cluster.epoch) == (True, 3)
    assert (cluster.load.running, cluster.load.kv_usage) == (2, 0.25)
    assert cluster.load.expert_imbalance == pytest.approx(10 / 6)
    assert cluster.load.draft_acceptance == pytest.approx(10 / 30)
    assert cluster.load.tokens_per_step == pytest.approx(50 / 40)
    assert [(p.layer, p.expert, p.tokens) for p in experts.placements] == [(1, 0, 4), (1, 1, 0)]
    assert list(experts.placements[0].actor_ids) == ["experts-1"]


def test_watching_tells_the_token_rate_and_keeps_on_while_the_cell_is_away():
    async def run():
        frontend = ScriptedFrontend()
        request = cluster_pb2.WatchClusterRequest()
        request.interval.FromMilliseconds(1)
        async with face(frontend) as stubs:
            call = stubs.cluster.WatchCluster(request)
            first = (await call.read()).cluster
            frontend.cell.num_output_tokens += 10
            second = (await call.read()).cluster
            frontend.cell.is_ready = False
            third = (await call.read()).cluster
            call.cancel()
        return first, second, third

    first, second, third = asyncio.run(run())
    assert first.load.tokens_per_second == 0
    assert 0 < second.load.tokens_per_second <= 10 / 0.2
    assert (second.ready, third.ready) == (True, False)


def test_watching_without_an_interval_tells_only_changes():
    async def run():
        frontend = ScriptedFrontend()
        async with face(frontend) as stubs:
            call = stubs.cluster.WatchCluster(cluster_pb2.WatchClusterRequest())
            first = (await call.read()).cluster
            frontend.cell.is_ready = False
            second = (await call.read()).cluster
            call.cancel()
        return first.ready, second.ready

    assert asyncio.run(run()) == (True, False)


def test_a_negative_interval_is_refused():
    async def run():
        request = cluster_pb2.WatchClusterRequest()
        request.interval.FromSeconds(-1)
        async with face(ScriptedFrontend()) as stubs:
            with pytest.raises(grpc.aio.AioRpcError) as told:
                await stubs.cluster.WatchCluster(request).read()
        return told.value

    told = asyncio.run(run())
    assert told.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert error_info(told).metadata["field"] == "interval"


def test_health_follows_the_cell():
    async def run():
        frontend = ScriptedFrontend()
        serving = health_pb2.HealthCheckResponse
        async with face(frontend) as stubs:
            request = health_pb2.HealthCheckRequest(service=GENERATION_SERVICE)
            watch = stubs.health.Watch(request)
            told = [(await watch.read()).status, (await stubs.health.Check(request)).status]
            frontend.cell.is_ready = False
            told += [(await watch.read()).status, (await stubs.health.Check(request)).status]
            watch.cancel()
            with pytest.raises(grpc.aio.AioRpcError) as unknown:
                await stubs.health.Check(health_pb2.HealthCheckRequest(service="other"))
            assert unknown.value.code() == grpc.StatusCode.NOT_FOUND
            lost = stubs.health.Watch(health_pb2.HealthCheckRequest(service="other"))
            told.append((await lost.read()).status)
            lost.cancel()
        assert told == [serving.SERVING] * 2 + [serving.NOT_SERVING] * 2 + [serving.SERVICE_UNKNOWN]

    asyncio.run(run())
