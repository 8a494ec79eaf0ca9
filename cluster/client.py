"""Clients of the gRPC face: `Client`, and `AsyncClient` for asyncio.

    with Client("localhost:9000", api_key="...") as client:
        for event in client.stream_chat("What is 47 * 26?", effort="high"):
            if isinstance(event, pb.Delta) and event.channel == pb.CHANNEL_ANSWER:
                print(event.text, end="")

Messages are those of `ostro.protos.generation_pb2` (`pb`); `client_requests` helps to write and to
read them. Failures are `ostro.actors.errors.OstroError`s, as the server raised them.

A call that the server could not take (busy, starting, being mended) or whose connection broke is
made again, `Retries` says how often, as long as nothing of its answer was given to the caller. A
stream can go on even after that. It is asked anew with what has come as a prefix, continues after
the last character that came, and says `Resumed` there. Its seed is fixed, so the text is mostly
what the unbroken stream would have brought; it need not be. Several choices that had not ended are
continued one after the other. After a tool call, or within an answer of a given format, a choice
cannot be continued, and the stream fails with what broke it.

Needs grpcio, protobuf and googleapis-common-protos, and nothing else that Ostro depends on.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Generator, Sequence
from types import TracebackType
from typing import Any, Self, Unpack

import grpc
import grpc.aio

from ostro.actors.errors import OstroError
from ostro.cluster.client_channel import ClientChannel
from ostro.cluster.client_requests import (
    Asked,
    Messages,
    Prompt,
    chat_request,
    stream_chat_request,
    stream_generate_request,
    tokenize_request,
)
from ostro.cluster.client_resume import continued_chat, continued_text
from ostro.cluster.client_streams import Event, TokenStream
from ostro.protos import cluster_pb2
from ostro.protos import generation_pb2 as pb

_Control = pb.ControlGenerationRequest


class Client(ClientChannel):
    """A synchronous client; threads may share one. Close it, or use it in a `with`."""

    _grpc = grpc

    def chat(
        self,
        messages: Messages,
        *,
        tools: Sequence[pb.Tool] = (),
        timeout_s: float | None = None,
        **asked: Unpack[Asked],
    ) -> pb.ChatResponse:
        """One assistant turn, answered whole.

        Args:
            messages: The conversation so far; a string is one message of the user.
            tools: The tools on offer.
            timeout_s: Instead of the client's own.
            asked: See `Asked`.

        Raises:
            InvalidRequestError, NotFoundError, TooLargeError: The request has to change; `param`
                names the field.
            OverloadedError, NotReadyError, ShardLostError: It may succeed later.
            DeadlineError: The time was over.
            OstroError: Anything else.
        """
        request = chat_request(messages, tools, asked)
        answer: pb.ChatResponse = self._call(self._generation.Chat, request, timeout_s)
        return answer

    def stream_chat(
        self,
        messages: Messages,
        *,
        tools: Sequence[pb.Tool] = (),
        timeout_s: float | None = None,
        resume: bool = True,
        **asked: Unpack[Asked],
    ) -> Generator[Event, None, None]:
        """One assistant turn as it is produced; closing the generator cancels it.

        Args:
            messages: The conversation so far; a string is one message of the user.
            tools: The tools on offer.
            timeout_s: Instead of the client's own.
            resume: Go on when the stream breaks, as described at the top of this file.
            asked: See `Asked`.

        Yields:
            `Started`, with the first token; `Delta`s and `ToolCallDone`s; `Finish` of each choice;
            `Ended`. `Resumed` wherever the stream had broken.

        Raises (while iterating):
            OstroError: As `chat` does.
        """
        request = stream_chat_request(messages, tools, asked)
        stream = TokenStream(request, continued_chat, resumes=resume)
        return self._stream(self._generation.StreamChat, stream, timeout_s)

    def generate(
        self,
        prompt: Prompt,
        *,
        timeout_s: float | None = None,
        resume: bool = True,
        **asked: Unpack[Asked],
    ) -> Generator[Event, None, None]:
        """Raw continuation of text or token ids; yields and raises as `stream_chat` does."""
        stream = TokenStream(stream_generate_request(prompt, asked), continued_text, resumes=resume)
        return self._stream(self._generation.StreamGenerate, stream, timeout_s)

    def end_thinking(self, request_id: str) -> bool:
        """Have a running generation answer now; False if none of that id thinks."""
        return self._control(request_id, _Control.ACTION_END_THINKING)

    def cancel(self, request_id: str) -> bool:
        """Stop a running generation; False if none of that id runs."""
        return self._control(request_id, _Control.ACTION_CANCEL)

    def tokenize(
        self, text: str | Messages, *, tools: Sequence[pb.Tool] = (), effort: str | None = None
    ) -> pb.TokenizeResponse:
        """Token ids of a text, or of the prompt that a conversation would get."""
        request = tokenize_request(text, tools, effort)
        answer: pb.TokenizeResponse = self._look_up(self._generation.Tokenize, request)
        return answer

    def detokenize(self, token_ids: Sequence[int]) -> str:
        """Text of token ids, control tokens shown."""
        request = pb.DetokenizeRequest(token_ids=token_ids)
        return str(self._look_up(self._generation.Detokenize, request).text)

    def model(self) -> cluster_pb2.GetModelResponse:
        """The served model."""
        request = cluster_pb2.GetModelRequest()
        answer: cluster_pb2.GetModelResponse = self._look_up(self._cluster.GetModel, request)
        return answer

    def cluster(self) -> cluster_pb2.Cluster:
        """The cluster at this moment: actors, load, readiness."""
        request = cluster_pb2.GetClusterRequest()
        answer: cluster_pb2.GetClusterResponse = self._look_up(self._cluster.GetCluster, request)
        return answer.cluster

    def experts(self, layers: Sequence[int] = ()) -> cluster_pb2.GetExpertsResponse:
        """Where experts live and how hot they are; of all layers if none is named."""
        request = cluster_pb2.GetExpertsRequest(layers=layers)
        answer: cluster_pb2.GetExpertsResponse = self._look_up(self._cluster.GetExperts, request)
        return answer

    def close(self) -> None:
        """Close the channel; calls that run are cancelled."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _control(self, request_id: str, action: _Control.Action) -> bool:
        request = _Control(request_id=request_id, action=action)
        return bool(self._look_up(self._generation.ControlGeneration, request).applied)

    def _look_up(self, rpc: Any, request: object) -> Any:
        return self._call(rpc, request, self._lookup_timeout_s)

    def _call(self, rpc: Any, request: object, timeout_s: float | None) -> Any:
        attempts = self._attempts(timeout_s)
        while True:
            try:
                return rpc(request, timeout=attempts.time_left_s(), metadata=self._metadata)
            except grpc.RpcError as error:
                delay_s = attempts.delay_s(self._named(error))
            time.sleep(delay_s)

    def _stream(
        self, rpc: Any, stream: TokenStream, timeout_s: float | None
    ) -> Generator[Event, None, None]:
        attempts = self._attempts(timeout_s)
        while True:
            left_s = attempts.time_left_s()
            call = rpc(stream.request, timeout=left_s, metadata=self._metadata)
            try:
                for message in call:
                    yield from stream.take(message)
                if not stream.goes_on():
                    return
                delay_s = 0.0
            except (grpc.RpcError, OstroError) as error:
                delay_s = stream.break_off(self._named(error), attempts)
            finally:
                call.cancel()
            time.sleep(delay_s)


class AsyncClient(ClientChannel):
    """The same for asyncio; make it where its loop runs. Close it, or use it in an `async with`.

    Its methods are those of `Client`, which describes them.
    """

    _grpc = grpc.aio

    async def chat(
        self,
        messages: Messages,
        *,
        tools: Sequence[pb.Tool] = (),
        timeout_s: float | None = None,
        **asked: Unpack[Asked],
    ) -> pb.ChatResponse:
        """One assistant turn, answered whole."""
        request = chat_request(messages, tools, asked)
        answer: pb.ChatResponse = await self._call(self._generation.Chat, request, timeout_s)
        return answer

    def stream_chat(
        self,
        messages: Messages,
        *,
        tools: Sequence[pb.Tool] = (),
        timeout_s: float | None = None,
        resume: bool = True,
        **asked: Unpack[Asked],
    ) -> AsyncGenerator[Event, None]:
        """One assistant turn as it is produced; `aclose` cancels it, leaving a loop does not."""
        request = stream_chat_request(messages, tools, asked)
        stream = TokenStream(request, continued_chat, resumes=resume)
        return self._stream(self._generation.StreamChat, stream, timeout_s)

    def generate(
        self,
        prompt: Prompt,
        *,
        timeout_s: float | None = None,
        resume: bool = True,
        **asked: Unpack[Asked],
    ) -> AsyncGenerator[Event, None]:
        """Raw continuation of text or token ids."""
        stream = TokenStream(stream_generate_request(prompt, asked), continued_text, resumes=resume)
        return self._stream(self._generation.StreamGenerate, stream, timeout_s)

    async def end_thinking(self, request_id: str) -> bool:
        """Have a running generation answer now; False if none of that id thinks."""
        return await self._control(request_id, _Control.ACTION_END_THINKING)

    async def cancel(self, request_id: str) -> bool:
        """Stop a running generation; False if none of that id runs."""
        return await self._control(request_id, _Control.ACTION_CANCEL)

    async def tokenize(
        self, text: str | Messages, *, tools: Sequence[pb.Tool] = (), effort: str | None = None
    ) -> pb.TokenizeResponse:
        """Token ids of a text, or of the prompt that a conversation would get."""
        request = tokenize_request(text, tools, effort)
        answer: pb.TokenizeResponse = await self._look_up(self._generation.Tokenize, request)
        return answer

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        """Text of token ids, control tokens shown."""
        request = pb.DetokenizeRequest(token_ids=token_ids)
        return str((await self._look_up(self._generation.Detokenize, request)).text)

    async def model(self) -> cluster_pb2.GetModelResponse:
        """The served model."""
        request = cluster_pb2.GetModelRequest()
        answer: cluster_pb2.GetModelResponse = await self._look_up(self._cluster.GetModel, request)
        return answer

    async def cluster(self) -> cluster_pb2.Cluster:
        """The cluster at this moment: actors, load, readiness."""
        request = cluster_pb2.GetClusterRequest()
        answer: cluster_pb2.GetClusterResponse = await self._look_up(
            self._cluster.GetCluster, request
        )
        return answer.cluster

    async def experts(self, layers: Sequence[int] = ()) -> cluster_pb2.GetExpertsResponse:
        """Where experts live and how hot they are; of all layers if none is named."""
        request = cluster_pb2.GetExpertsRequest(layers=layers)
        answer: cluster_pb2.GetExpertsResponse = await self._look_up(
            self._cluster.GetExperts, request
        )
        return answer

    async def close(self) -> None:
        """Close the channel; calls that run are cancelled."""
        await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def _control(self, request_id: str, action: _Control.Action) -> bool:
        request = _Control(request_id=request_id, action=action)
        return bool((await self._look_up(self._generation.ControlGeneration, request)).applied)

    async def _look_up(self, rpc: Any, request: object) -> Any:
        return await self._call(rpc, request, self._lookup_timeout_s)

    async def _call(self, rpc: Any, request: object, timeout_s: float | None) -> Any:
        attempts = self._attempts(timeout_s)
        while True:
            try:
                return await rpc(request, timeout=attempts.time_left_s(), metadata=self._metadata)
            except grpc.RpcError as error:
                delay_s = attempts.delay_s(self._named(error))
            await asyncio.sleep(delay_s)

    async def _stream(
        self, rpc: Any, stream: TokenStream, timeout_s: float | None
    ) -> AsyncGenerator[Event, None]:
        attempts = self._attempts(timeout_s)
        while True:
            left_s = attempts.time_left_s()
            call = rpc(stream.request, timeout=left_s, metadata=self._metadata)
            try:
                async for message in call:
                    for event in stream.take(message):
                        yield event
                if not stream.goes_on():
                    return
                delay_s = 0.0
            except (grpc.RpcError, OstroError) as error:
                delay_s = stream.break_off(self._named(error), attempts)
            finally:
                call.cancel()
            await asyncio.sleep(delay_s)
