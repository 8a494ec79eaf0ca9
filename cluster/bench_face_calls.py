"""One request to each face of a cell, and when its output arrived.

The plain path of callers: no token ids are asked back, tokens are counted by usage.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from enum import StrEnum

import aiohttp
import grpc

from ostro.actors.engine.request import FinishReason, GenerationRequest, SamplingParams, StopParams
from ostro.actors.errors import OstroError
from ostro.cluster.bench_statistics import Failure, Outcome
from ostro.cluster.bench_stream import Target, send
from ostro.cluster.cell_client import CellClient
from ostro.protos import generation_pb2, generation_pb2_grpc

_TIMEOUT_S = 300.0
_READY_TIMEOUT_S = 60.0
# HTTP/2 servers let a connection carry about 100 streams at a time; more would queue unseen.
_NUM_CHANNELS = 4

Call = Callable[[list[int], int, str, float], Awaitable[Outcome]]


class Face(StrEnum):
    """What a client calls; the engine by way of the ingress's own client, `CellClient`."""

    ENGINE = "bare engine"
    HTTP = "HTTP"
    GRPC = "gRPC"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """Where everything is.

    Attributes:
        model: As the faces name it.
        router_address: The router's step listener.
        secret: The deployment's.
        http_url: The HTTP face.
        grpc_address: The gRPC face.
    """

    model: str
    router_address: str
    secret: bytes = field(repr=False)
    http_url: str
    grpc_address: str


@asynccontextmanager
async def open_faces(cell: Cell, name: str) -> AsyncIterator[dict[Face, Call]]:
    """Connections to every face: calls that take prompt, new tokens, request id and due time.

    Args:
        cell: Where they are.
        name: Of this client, unique among the clients of the cell.
    """
    async with AsyncExitStack() as ending:
        client = await _connect_engine(cell, name)
        ending.push_async_callback(client.close)
        session = await ending.enter_async_context(
            aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=None)
            )
        )
        # Channels with equal options would share one connection.
        options = [[("grpc.use_local_subchannel_pool", 1)] for _ in range(_NUM_CHANNELS)]
        channels = [
            await ending.enter_async_context(grpc.aio.insecure_channel(cell.grpc_address, own))
            for own in options
        ]
        stubs = itertools.cycle(
            generation_pb2_grpc.GenerationServiceStub(channel) for channel in channels
        )
        target = Target(
            name="HTTP",
            url=cell.http_url,
            model=cell.model,
            chat=False,
            new_tokens=1,
            extra={"ignore_eos": True},
            timeout_s=_TIMEOUT_S,
        )

        async def through_engine(
            prompt: list[int], new_tokens: int, name: str, due_s: float
        ) -> Outcome:
            return await call_engine(client, prompt, new_tokens, name, due_s)

        async def through_http(
            prompt: list[int], new_tokens: int, _name: str, due_s: float
        ) -> Outcome:
            return await send(session, replace(target, new_tokens=new_tokens), prompt, due_s)

        async def through_grpc(
            prompt: list[int], new_tokens: int, _name: str, due_s: float
        ) -> Outcome:
            return await call_grpc(next(stubs), prompt, new_tokens, due_s)

        yield {
            Face.ENGINE: through_engine,
            Face.HTTP: through_http,
            Face.GRPC: through_grpc,
        }


async def call_engine(
    client: CellClient, prompt: list[int], new_tokens: int, name: str, due_s: float
) -> Outcome:
    """A request straight to the cell, as an ingress replica sends it."""
    request = GenerationRequest(
        request_id=name,
        prompt_token_ids=prompt,
        sampling=SamplingParams(),
        stop=StopParams(max_tokens=new_tokens, ignore_eos=True),
    )
    arrivals_s: list[float] = []
    num_tokens, failure = 0, None
    try:
        async for event in client.submit(request):
            if event.finish_reason is FinishReason.ERROR:
                failure = Failure(event.error_code or "error", event.error_message or "")
            if event.token_ids:
                arrivals_s.append(time.perf_counter())
                num_tokens += len(event.token_ids)
    except OstroError as error:
        failure = Failure(error.code, error.message)
    return _outcome(due_s, arrivals_s, num_tokens, failure)


async def call_grpc(
    stub: generation_pb2_grpc.GenerationServiceStub,
    prompt: list[int],
    new_tokens: int,
    due_s: float,
) -> Outcome:
    """A request by `StreamGenerate`."""
    options = generation_pb2.GenerationOptions(
        sampling=generation_pb2.SamplingOptions(temperature=0),
        stopping=generation_pb2.StoppingOptions(max_tokens=new_tokens, ignore_eos=True),
    )
    request = generation_pb2.StreamGenerateRequest(
        tokens=generation_pb2.Tokens(ids=prompt), options=options
    )
    arrivals_s: list[float] = []
    num_tokens, failure = 0, None
    try:
        async for message in stub.StreamGenerate(request, timeout=_TIMEOUT_S):
            event = message.WhichOneof("event")
            if event == "delta":
                arrivals_s.append(time.perf_counter())
            elif event == "ended":
                num_tokens = message.ended.usage.completion_tokens
            elif event == "failure":
                failure = Failure(message.failure.reason, message.failure.message)
    except grpc.aio.AioRpcError as error:
        failure = Failure(f"gRPC {error.code().name}", error.details() or "")
    return _outcome(due_s, arrivals_s, num_tokens, failure)


def _outcome(
    due_s: float, arrivals_s: list[float], num_tokens: int, failure: Failure | None
) -> Outcome:
    if failure is None and not (arrivals_s and num_tokens):
        failure = Failure("empty answer", "the stream held no output")
    return Outcome(
        due_s=due_s,
        ended_s=time.perf_counter(),
        arrivals_s=tuple(arrivals_s),
        num_output_tokens=num_tokens,
        failure=failure,
    )


async def _connect_engine(cell: Cell, name: str) -> CellClient:
    async def find_router() -> str:
        return cell.router_address

    client = CellClient(find_router, cell.secret, ingress_id=name, submit_timeout_s=_TIMEOUT_S)
    client.start()
    async with asyncio.timeout(_READY_TIMEOUT_S):
        while not client.ready:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    return client
