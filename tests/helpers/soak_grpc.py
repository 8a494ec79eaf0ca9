"""Requests of a soak over gRPC, sensible ones and bad ones."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Collection

import grpc
from google.protobuf.duration_pb2 import Duration
from soak_outcomes import UndocumentedError, check_call_error
from soak_site import CANARY, REQUEST_TIMEOUT_S, SCHEMA, TOOL, Site

from ostro.protos import cluster_pb2
from ostro.protos import generation_pb2 as pb

_TOO_LARGE = 2 * 2**20


def _conversation(site: Site) -> pb.Conversation:
    message = pb.Message(role=pb.ROLE_USER, parts=[pb.Part(text=site.question())])
    conversation = pb.Conversation(messages=[message])
    if site.chance(0.2):
        parameters = json.dumps(TOOL["parameters"])
        conversation.tools.add(name=TOOL["name"], parameters=parameters)
    return conversation


def _options(site: Site, max_tokens: int | None = None) -> pb.GenerationOptions:
    stopping = pb.StoppingOptions(max_tokens=max_tokens or site.dice.choice((4, 40, 120)))
    if site.chance(0.3):
        stopping.stop.append(CANARY)
    options = pb.GenerationOptions(
        stopping=stopping,
        reasoning=pb.ReasoningOptions(effort=site.dice.randrange(8)),
        choices=site.dice.choice((0, 0, 2, 3)),
    )
    if site.chance(0.3):
        options.logprobs.top = 2
    if site.chance(0.2):
        options.output_format.json_schema = json.dumps(SCHEMA)
    return options


async def _read(call: grpc.aio.UnaryStreamCall, wanted: Collection[grpc.StatusCode] = ()) -> str:
    last = None
    try:
        async for event in call:
            last = event.WhichOneof("event")
    except grpc.RpcError as error:
        return check_call_error(error, wanted)
    if last != "ended":
        raise UndocumentedError(f"a stream of status OK ended with {last}")
    return "ok"


async def chat_unary(site: Site) -> str:
    request = pb.ChatRequest(conversation=_conversation(site), options=_options(site))
    call = site.generation.Chat(request, timeout=REQUEST_TIMEOUT_S, metadata=site.metadata())
    try:
        answer = await call
    except grpc.RpcError as error:
        return check_call_error(error, ())
    if len(answer.choices) != max(request.options.choices, 1):
        raise UndocumentedError(f"{len(answer.choices)} choices")
    return "ok"


async def chat_stream(site: Site) -> str:
    request = pb.StreamChatRequest(conversation=_conversation(site), options=_options(site))
    call = site.generation.StreamChat(request, timeout=REQUEST_TIMEOUT_S, metadata=site.metadata())
    return await _read(call)


async def generate(site: Site) -> str:
    options = _options(site)
    options.stopping.ignore_eos = site.chance(0.5)
    options.ClearField("output_format")
    options.ClearField("reasoning")
    tokens = pb.Tokens(ids=[site.dice.randrange(300, 600) for _ in range(40)])
    request = pb.StreamGenerateRequest(tokens=tokens, options=options)
    call = site.generation.StreamGenerate(
        request, timeout=REQUEST_TIMEOUT_S, metadata=site.metadata()
    )
    return await _read(call)


async def leave(site: Site) -> str:
    """Cancels after a few messages, as a client does whose user has gone."""
    request = pb.StreamChatRequest(
        conversation=_conversation(site), options=_options(site, max_tokens=1500)
    )
    request.options.stopping.ignore_eos = True
    call = site.generation.StreamChat(request, timeout=REQUEST_TIMEOUT_S, metadata=site.metadata())
    try:
        for _ in range(site.dice.randrange(6)):
            await call.read()
    except grpc.RpcError as error:
        return check_call_error(error, ())
    finally:
        call.cancel()
    return "left"


async def pass_deadline(site: Site) -> str:
    request = pb.StreamChatRequest(
        conversation=_conversation(site), options=_options(site, max_tokens=1500)
    )
    request.options.stopping.ignore_eos = True
    timeout_s = site.dice.uniform(0.05, 2.0)
    call = site.generation.StreamChat(request, timeout=timeout_s, metadata=site.metadata())
    # HAProxy may cut the stream first, which grpc tells as it likes.
    wanted = (
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.UNKNOWN,
    )
    return await _read(call, wanted)


async def wait_too_long(site: Site) -> str:
    """With a queue timeout that may pass before the first token."""
    request = pb.StreamChatRequest(conversation=_conversation(site), options=_options(site))
    request.options.queue_timeout.CopyFrom(Duration(nanos=site.dice.randrange(1, 10**8)))
    call = site.generation.StreamChat(request, timeout=REQUEST_TIMEOUT_S, metadata=site.metadata())
    return await _read(call, (grpc.StatusCode.DEADLINE_EXCEEDED,))


async def ask_nonsense(site: Site) -> str:
    conversation = _conversation(site)
    bad = (
        pb.ChatRequest(conversation=conversation, model="gpt-5"),
        pb.ChatRequest(conversation=pb.Conversation()),
        pb.ChatRequest(
            conversation=conversation,
            options=pb.GenerationOptions(sampling=pb.SamplingOptions(temperature=-3)),
        ),
        pb.ChatRequest(
            conversation=conversation,
            options=pb.GenerationOptions(output_format=pb.OutputFormat(lark=f"{CANARY}: (")),
        ),
        pb.ChatRequest(
            conversation=pb.Conversation(
                messages=[
                    pb.Message(
                        role=pb.ROLE_USER,
                        parts=[pb.Part(image=pb.Image(data=CANARY.encode()))],
                    )
                ]
            )
        ),
        pb.ChatRequest(
            conversation=pb.Conversation(
                messages=[
                    pb.Message(
                        role=pb.ROLE_USER, parts=[pb.Part(text=f"{CANARY} " * (_TOO_LARGE // 12))]
                    )
                ]
            )
        ),
    )
    call = site.generation.Chat(
        site.dice.choice(bad), timeout=REQUEST_TIMEOUT_S, metadata=site.metadata()
    )
    wanted = (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND)
    try:
        await call
    except grpc.RpcError as error:
        if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED and "larger" in error.details():
            return "refused"
        return check_call_error(error, wanted)
    raise UndocumentedError("nonsense was answered")


async def watch(site: Site) -> str:
    """The cluster for a moment, then away."""
    call = site.cluster.WatchCluster(
        cluster_pb2.WatchClusterRequest(interval=Duration(nanos=3 * 10**8)),
        timeout=REQUEST_TIMEOUT_S,
        metadata=site.metadata(),
    )
    try:
        for _ in range(3):
            await call.read()
    except grpc.RpcError as error:
        return check_call_error(error, ())
    finally:
        call.cancel()
    return "left"


async def steer_nobody(site: Site) -> str:
    control = pb.ControlGenerationRequest
    request = control(request_id=site.name(), action=control.ACTION_CANCEL)
    call = site.generation.ControlGeneration(request, timeout=60, metadata=site.metadata())
    try:
        answer = await call
    except grpc.RpcError as error:
        return check_call_error(error, ())
    if answer.applied:
        raise UndocumentedError("a generation that nobody began was cancelled")
    return "ok"


async def steer(site: Site) -> str:
    """Cancels by id, from a second call."""
    name, key = site.name(), site.key()
    request = pb.StreamChatRequest(
        conversation=_conversation(site),
        options=_options(site, max_tokens=1500),
        request_id=name,
    )
    request.options.stopping.ignore_eos = True
    metadata = site.metadata(key)
    call = site.generation.StreamChat(request, timeout=REQUEST_TIMEOUT_S, metadata=metadata)
    reading = asyncio.ensure_future(_read(call))
    control = pb.ControlGenerationRequest
    try:
        await asyncio.sleep(site.dice.uniform(0, 1.5))
        await site.generation.ControlGeneration(
            control(request_id=name, action=control.ACTION_CANCEL), timeout=60, metadata=metadata
        )
    except grpc.RpcError as error:
        call.cancel()
        check_call_error(error, ())
    finally:
        # Not seen yet when it was cancelled, it goes on: then it is read to its end.
        await asyncio.gather(reading, return_exceptions=True)
    return reading.result()


KINDS = {
    chat_unary: 6,
    chat_stream: 8,
    generate: 6,
    leave: 6,
    pass_deadline: 4,
    wait_too_long: 3,
    ask_nonsense: 4,
    watch: 1,
    steer_nobody: 1,
    steer: 3,
}
