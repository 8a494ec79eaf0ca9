"""Who gets in over gRPC: every RPC, every scope, and what the audit log says of it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging

import grpc
import pytest
from door_keys import (
    ADMIN,
    CONTROL,
    COUNTED,
    EXPIRED,
    GENERATE,
    LIMITED,
    OBSERVE,
    bearer,
    key_id,
    make_door,
)
from google.protobuf.message_factory import GetMessageClass
from google.rpc import error_details_pb2, status_pb2
from grpc_face import SERVICES, ByKeyword
from scripted_frontend import MODEL, STARTED, ScriptedFrontend

from ostro.actors.errors import QuotaError
from ostro.cluster.door import Door
from ostro.cluster.grpc_ingress import GrpcMethods
from ostro.cluster.grpc_services import all_methods
from ostro.cluster.metrics import Metrics
from ostro.protos import generation_pb2 as pb

HELLO = pb.Conversation(messages=[pb.Message(role=pb.ROLE_USER, parts=[pb.Part(text="mellon")])])
METHODS = {method.name: method for method in all_methods() if hasattr(GrpcMethods, method.name)}
REFUSED = (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED)
OPEN = {"Check", "Watch"}
OBSERVED = {"GetCluster", "WatchCluster", "GetExperts"}


@contextlib.asynccontextmanager
async def face(
    frontend: ScriptedFrontend | None = None, door: Door | None = None, max_watches: int = 4
):
    server, frontend = grpc.aio.server(), frontend or ScriptedFrontend()
    methods = ByKeyword(
        GrpcMethods(lambda: frontend, Metrics(MODEL), door or make_door(), max_watches=max_watches)
    )
    for add in SERVICES:
        add(methods, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield channel
    finally:
        await server.stop(grace=0)


async def call(channel, name: str, request=None, metadata=None):
    """An RPC's first message."""
    method = METHODS[name]
    make = channel.unary_stream if method.server_streaming else channel.unary_unary
    kind = GetMessageClass(method.input_type)
    rpc = make(
        f"/{method.containing_service.full_name}/{name}",
        request_serializer=kind.SerializeToString,
        response_deserializer=GetMessageClass(method.output_type).FromString,
    )
    running = rpc(kind() if request is None else request, metadata=metadata, timeout=10)
    if not method.server_streaming:
        return await running
    async for message in running:
        if "failure" not in [field.name for field, _ in message.ListFields()]:
            running.cancel()
            return message  # after a failure the status follows
    return None


def statuses(key: str | None) -> dict[str, grpc.StatusCode]:
    """What every RPC says to an empty request."""

    async def run():
        found = {}
        async with face() as channel:
            for name in METHODS:
                try:
                    await call(channel, name, metadata=tuple(bearer(key).items()) if key else None)
                    found[name] = grpc.StatusCode.OK
                except grpc.aio.AioRpcError as error:
                    found[name] = error.code()
        return found

    return asyncio.run(run())


def those(found: dict[str, grpc.StatusCode], *codes: grpc.StatusCode) -> set[str]:
    return {name for name, code in found.items() if code in codes}


# ---- every RPC


def test_every_rpc_of_the_protos_is_served_and_gated():
    assert {method.name for method in all_methods()} - set(METHODS) <= {"List"}  # of health
    found = statuses(None)
    assert set(found) == set(METHODS)
    assert those(found, grpc.StatusCode.UNAUTHENTICATED) == set(METHODS) - OPEN


def test_strangers_who_watch_leave_room_for_others():
    async def run():
        async with face(max_watches=2) as channel:
            watch = channel.unary_stream("/grpc.health.v1.Health/Watch")
            watches = [watch(b"", timeout=20) for _ in range(2)]
            for watching in watches:
                await watching.read()
            with pytest.raises(grpc.aio.AioRpcError, match="ask with Check") as refused:
                await call(channel, "Watch")
            assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            await call(channel, "Check")
            watches[0].cancel()
            async with asyncio.timeout(10):
                while True:
                    with contextlib.suppress(grpc.aio.AioRpcError):
                        return await call(channel, "Watch")

    asyncio.run(run())


def test_a_key_for_generating_is_good_for_every_rpc_that_is_not_known_to_need_another():
    found = statuses(GENERATE)
    assert those(found, *REFUSED) == OBSERVED | {"ControlGeneration"}


def test_a_key_for_observing_sees_nothing_else():
    found = statuses(OBSERVE)
    assert those(found, *REFUSED) == set(METHODS) - OPEN - OBSERVED - {"GetModel"}


def test_an_admins_key_opens_every_rpc():
    assert not those(statuses(ADMIN), *REFUSED)


# ---- keys


async def refused(channel, name: str, request=None, metadata=None) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call(channel, name, request, metadata)
    return caught.value


def reason(error: grpc.aio.AioRpcError) -> str:
    packed = dict(error.trailing_metadata())["grpc-status-details-bin"]
    info = error_details_pb2.ErrorInfo()
    assert status_pb2.Status.FromString(packed).details[0].Unpack(info)
    return info.reason


@pytest.mark.parametrize("name", ["Chat", "StreamChat", "StreamGenerate"])
@pytest.mark.parametrize(
    ("metadata", "code", "why"),
    [
        ((), grpc.StatusCode.UNAUTHENTICATED, "MISSING_API_KEY"),
        ((("x-api-key", "unknown"),), grpc.StatusCode.UNAUTHENTICATED, "INVALID_API_KEY"),
        ((("x-api-key", EXPIRED),), grpc.StatusCode.UNAUTHENTICATED, "EXPIRED_API_KEY"),
        ((("x-api-key", OBSERVE),), grpc.StatusCode.PERMISSION_DENIED, "MISSING_SCOPE"),
    ],
)
def test_a_refusal_says_why(name, metadata, code, why):
    async def run():
        frontend = ScriptedFrontend()
        async with face(frontend) as channel:
            return await refused(channel, name, metadata=metadata), frontend.asked

    error, asked = asyncio.run(run())
    assert (error.code(), reason(error)) == (code, why)
    assert asked == []


def test_a_stream_that_is_refused_tells_it_in_its_last_message_too():
    async def run():
        async with face() as channel:
            rpc = channel.unary_stream(
                "/ostro.v1.GenerationService/StreamChat",
                request_serializer=pb.StreamChatRequest.SerializeToString,
                response_deserializer=pb.StreamChatResponse.FromString,
            )
            messages = []
            with contextlib.suppress(grpc.aio.AioRpcError):
                async for message in rpc(pb.StreamChatRequest(conversation=HELLO)):
                    messages.append(message)  # noqa: PERF401  the last one comes before an error
            return messages

    (message,) = asyncio.run(run())
    assert message.failure.reason == "MISSING_API_KEY"
    assert message.failure.code == grpc.StatusCode.UNAUTHENTICATED.value[0]


# ---- whose request it is


@pytest.mark.parametrize("metadata", [(("x-api-key", GENERATE),), tuple(bearer(GENERATE).items())])
@pytest.mark.parametrize(
    ("name", "kind"), [("Chat", pb.ChatRequest), ("StreamChat", pb.StreamChatRequest)]
)
def test_the_tenant_is_the_keys(metadata, name, kind):
    async def run():
        frontend = ScriptedFrontend()
        async with face(frontend) as channel:
            await call(channel, name, kind(conversation=HELLO), metadata)
        return frontend.asked

    (request,) = asyncio.run(run())
    assert request.options.tenant == "acme"


def test_without_keys_nobody_is_the_tenant():
    async def run():
        frontend = ScriptedFrontend()
        async with face(frontend, Door.wide_open()) as channel:
            await call(channel, "StreamChat", pb.StreamChatRequest(conversation=HELLO))
        return frontend.asked

    (request,) = asyncio.run(run())
    assert request.options.tenant == ""


@pytest.mark.parametrize(("key", "tenant"), [(CONTROL, "acme"), (ADMIN, None)])
def test_control_is_of_the_tenants_own_generations_unless_an_admin_asks(key, tenant):
    async def run():
        frontend = ScriptedFrontend()
        request = pb.ControlGenerationRequest(
            request_id="gen-1", action=pb.ControlGenerationRequest.ACTION_CANCEL
        )
        async with face(frontend) as channel:
            await call(channel, "ControlGeneration", request, (("x-api-key", key),))
        return frontend.cell.steered_tenants

    assert asyncio.run(run()) == [tenant]


def test_more_max_tokens_than_the_tenant_may_have_are_refused():
    async def run():
        options = pb.GenerationOptions(stopping=pb.StoppingOptions(max_tokens=101))
        request = pb.StreamChatRequest(conversation=HELLO, options=options)
        async with face() as channel:
            return await refused(channel, "StreamChat", request, (("x-api-key", LIMITED),))

    error = asyncio.run(run())
    assert (error.code(), reason(error)) == (grpc.StatusCode.INVALID_ARGUMENT, "ABOVE_QUOTA")


def test_a_quota_that_is_used_up_tells_the_time_to_wait():
    async def run():
        used_up = QuotaError("used up", param="requests_per_minute", retry_after_s=12.5)
        request = pb.ChatRequest(conversation=HELLO)
        async with face(ScriptedFrontend(used_up)) as channel:
            return await refused(channel, "Chat", request, (("x-api-key", GENERATE),))

    error = asyncio.run(run())
    assert (error.code(), reason(error)) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUOTA_EXCEEDED")
    packed = dict(error.trailing_metadata())["grpc-status-details-bin"]
    retry = error_details_pb2.RetryInfo()
    assert status_pb2.Status.FromString(packed).details[1].Unpack(retry)
    assert retry.retry_delay.ToTimedelta().total_seconds() == 12.5


@pytest.mark.parametrize(
    ("name", "request_"),
    [
        ("Tokenize", pb.TokenizeRequest(text="Hi.")),
        ("Tokenize", pb.TokenizeRequest(conversation=HELLO)),
        ("Detokenize", pb.DetokenizeRequest(token_ids=[72])),
    ],
)
def test_what_generates_nothing_counts_as_a_request_of_who_has_a_quota_of_them(name, request_):
    async def run():
        frontend = ScriptedFrontend()
        async with face(frontend) as channel:
            for key in (COUNTED, LIMITED):
                await call(channel, name, request_, (("x-api-key", key),))
            frontend.cell.quota_error = QuotaError("used up", param="requests_per_minute")
            error = await refused(channel, name, request_, (("x-api-key", COUNTED),))
        return error, frontend.cell.counted_tenants

    error, counted = asyncio.run(run())
    assert (error.code(), reason(error)) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUOTA_EXCEEDED")
    assert counted == ["counted", "counted"]


# ---- the audit log


def audit_lines(caplog) -> list[dict]:
    return [json.loads(r.getMessage()) for r in caplog.records if r.name == "ostro.audit"]


def test_a_line_takes_no_id_of_any_length(caplog):
    caplog.set_level(logging.INFO, logger="ostro.audit")

    async def run():
        async with face() as channel:
            metadata = (("x-api-key", GENERATE), ("x-request-id", "x" * 2000))
            await call(channel, "GetModel", metadata=metadata)

    asyncio.run(run())
    assert audit_lines(caplog)[0]["request_id"] == "x" * 200


@pytest.mark.parametrize(
    ("name", "kind"), [("Chat", pb.ChatRequest), ("StreamChat", pb.StreamChatRequest)]
)
def test_a_generation_leaves_one_line_without_any_text(caplog, name, kind):
    caplog.set_level(logging.INFO, logger="ostro.audit")

    async def run():
        async with face() as channel:
            metadata = (("x-api-key", GENERATE), ("x-request-id", "req-7"))
            method = METHODS[name]
            make = channel.unary_stream if method.server_streaming else channel.unary_unary
            rpc = make(
                f"/{method.containing_service.full_name}/{name}",
                request_serializer=kind.SerializeToString,
                response_deserializer=GetMessageClass(method.output_type).FromString,
            )
            running = rpc(kind(conversation=HELLO), metadata=metadata)
            if method.server_streaming:
                async for _ in running:
                    pass
            else:
                await running

    asyncio.run(run())
    (line,) = audit_lines(caplog)
    assert line.pop("client").startswith("ipv4:127.0.0.1:")
    assert {line.pop("time") > "2026", line.pop("duration_s") >= 0} == {True}
    assert line == {
        "request_id": "req-7",
        "generation_id": "gen-1",
        "tenant": "acme",
        "key_id": key_id(GENERATE),
        "route": f"grpc {name}",
        "status": "OK",
        "finish_reason": "stop",
        "prompt_tokens": 7,
        "completion_tokens": 11,
    }


def test_refusals_failures_and_calls_that_are_cut_off_leave_lines(caplog):
    caplog.set_level(logging.INFO, logger="ostro.audit")

    async def run():
        frontend = ScriptedFrontend(STARTED, None)
        async with face(frontend) as channel:
            await refused(channel, "GetModel", metadata=(("x-api-key", "secret-guess"),))
            await refused(channel, "Chat", metadata=(("x-api-key", GENERATE),))
            request = pb.StreamChatRequest(conversation=HELLO)
            await call(channel, "StreamChat", request, (("x-api-key", GENERATE),))  # and leaves
            await asyncio.to_thread(frontend.closed.wait, 10)

    asyncio.run(run())
    lines = audit_lines(caplog)
    assert [line["status"] for line in lines] == [
        "UNAUTHENTICATED",
        "INVALID_ARGUMENT",
        "CANCELLED",
    ]
    assert "secret-guess" not in caplog.text
