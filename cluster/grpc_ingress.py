"""The gRPC face: GenerationService, ClusterService and grpc.health.v1, as Ray Serve calls them.

Serve dispatches on the bare method name and hands over `grpc_context`. A failure is set there and,
where the call has a last message to tell it with, not raised: raising loses the details behind
Serve's HAProxy, and a stream that returns before its first message ends with status OK behind
Serve's own proxy. So a failed unary call returns an empty message, a failed generation yields a
`Failure`, and only a watch raises.
"""

# ruff: noqa: N802  the methods have the names of their RPCs

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable
from contextlib import aclosing
from typing import TypeVar

from google.protobuf.message import Message
from grpc_health.v1.health_pb2 import (  # type: ignore[import-untyped]
    HealthCheckRequest,
    HealthCheckResponse,
)

from ostro.actors.errors import (
    InvalidRequestError,
    NotFoundError,
    NotReadyError,
    OstroError,
    OverloadedError,
)
from ostro.cluster.door import Door
from ostro.cluster.error_table import public_error
from ostro.cluster.generation import GenerationEvent
from ostro.cluster.grpc_answer import WholeChat, chat_messages, failure_message, text_messages
from ostro.cluster.grpc_cluster import (
    TokenRate,
    cluster_message,
    experts_response,
    model_response,
)
from ostro.cluster.grpc_gate import gated
from ostro.cluster.grpc_request import (
    chat_generation,
    conversation_messages,
    effort_name,
    text_generation,
    tools_on_offer,
)
from ostro.cluster.grpc_services import UnreadableRequest
from ostro.cluster.grpc_status import GrpcContext, set_status, text_metadata
from ostro.cluster.guarded_frontend import GuardedFrontend
from ostro.cluster.metrics import Metrics, closing_events
from ostro.cluster.seams import FrontendLike
from ostro.cluster.tracing import CHAT, TEXT_COMPLETION, Origin
from ostro.protos import cluster_pb2 as cluster
from ostro.protos import generation_pb2 as generation

logger = logging.getLogger(__name__)

GENERATION_SERVICE = "ostro.v1.GenerationService"
CLUSTER_SERVICE = "ostro.v1.ClusterService"
_MIN_WATCH_S = 0.2
_POLL_S = 0.5

Request = TypeVar("Request", bound=Message)
Response = TypeVar("Response", bound=Message)
Control = generation.ControlGenerationRequest


@gated
class GrpcMethods:
    """Every RPC as a method of its name, over one frontend. Knows nothing of Ray."""

    def __init__(
        self,
        get_frontend: Callable[[], FrontendLike],
        metrics: Metrics,
        door: Door | None = None,
        max_watches: int = 256,
    ) -> None:
        """Take the parts.

        Args:
            get_frontend: Gives the frontend; raises NotReadyError while there is none.
            metrics: Where requests are counted.
            door: Who may come in; None is everybody.
            max_watches: Callers that watch the health at a time. They show no key, and each takes
                one of the calls that a replica of Ray Serve's can have.
        """
        self._grpc_door = door = door or Door.wide_open()
        self._grpc_frontend: Callable[[], FrontendLike] = lambda: GuardedFrontend(
            get_frontend(), door
        )
        self._grpc_metrics = metrics
        self._grpc_rate = TokenRate()
        self._grpc_max_watches = max_watches
        self._grpc_num_watches = 0

    # ---- GenerationService

    async def Chat(
        self, request: generation.ChatRequest, grpc_context: GrpcContext
    ) -> generation.ChatResponse:
        """One assistant turn, answered whole."""

        async def answer(readable: generation.ChatRequest) -> generation.ChatResponse:
            whole = WholeChat()
            async with closing_events(self._chat(readable, grpc_context)) as events:
                async for event in events:
                    whole.add(event)
            return whole.response()

        return await _unary(answer, request, generation.ChatResponse, grpc_context)

    async def StreamChat(
        self, request: generation.StreamChatRequest, grpc_context: GrpcContext
    ) -> AsyncGenerator[generation.StreamChatResponse, None]:
        """One assistant turn, answered as it is produced."""
        messages = _stream(
            self._chat,
            request,
            chat_messages,
            lambda failure: generation.StreamChatResponse(failure=failure),
            grpc_context,
        )
        async with aclosing(messages):
            async for message in messages:
                yield message

    async def StreamGenerate(
        self, request: generation.StreamGenerateRequest, grpc_context: GrpcContext
    ) -> AsyncGenerator[generation.StreamGenerateResponse, None]:
        """Raw continuation of token ids or text."""
        messages = _stream(
            self._generate,
            request,
            text_messages,
            lambda failure: generation.StreamGenerateResponse(failure=failure),
            grpc_context,
        )
        async with aclosing(messages):
            async for message in messages:
                yield message

    async def ControlGeneration(
        self, request: Control, grpc_context: GrpcContext
    ) -> generation.ControlGenerationResponse:
        """End the thinking of a running generation, or cancel it, whichever face began it."""

        async def answer(readable: Control) -> generation.ControlGenerationResponse:
            if not readable.request_id:
                raise InvalidRequestError("request_id is empty", param="request_id")
            cell = self._grpc_frontend().cell
            if readable.action == Control.ACTION_END_THINKING:
                applied = await cell.end_thinking(readable.request_id)
            elif readable.action == Control.ACTION_CANCEL:
                applied = await cell.cancel(readable.request_id)
            else:
                raise InvalidRequestError(
                    "action must be ACTION_END_THINKING or ACTION_CANCEL", param="action"
                )
            return generation.ControlGenerationResponse(applied=applied)

        return await _unary(answer, request, generation.ControlGenerationResponse, grpc_context)

    async def Tokenize(
        self, request: generation.TokenizeRequest, grpc_context: GrpcContext
    ) -> generation.TokenizeResponse:
        """Text or conversation to token ids."""

        async def answer(readable: generation.TokenizeRequest) -> generation.TokenizeResponse:
            frontend, which = self._grpc_frontend(), readable.WhichOneof("input")
            if which is None:
                raise InvalidRequestError("input: send text or conversation", param="input")
            if which == "text":
                ids = await frontend.tokenize_text(readable.text)
            else:
                ids = await frontend.tokenize_chat(
                    conversation_messages(readable.conversation),
                    tools_on_offer(readable.conversation.tools),
                    effort_name(readable.effort),
                )
            return generation.TokenizeResponse(token_ids=ids, max_context=frontend.card.max_context)

        return await _unary(answer, request, generation.TokenizeResponse, grpc_context)

    async def Detokenize(
        self, request: generation.DetokenizeRequest, grpc_context: GrpcContext
    ) -> generation.DetokenizeResponse:
        """Token ids to text."""

        async def answer(readable: generation.DetokenizeRequest) -> generation.DetokenizeResponse:
            text = await self._grpc_frontend().detokenize(list(readable.token_ids))
            return generation.DetokenizeResponse(text=text)

        return await _unary(answer, request, generation.DetokenizeResponse, grpc_context)

    # ---- ClusterService

    async def GetModel(
        self, request: cluster.GetModelRequest, grpc_context: GrpcContext
    ) -> cluster.GetModelResponse:
        """The served model."""

        async def answer(_: cluster.GetModelRequest) -> cluster.GetModelResponse:
            return model_response(self._grpc_frontend().card)

        return await _unary(answer, request, cluster.GetModelResponse, grpc_context)

    async def GetCluster(
        self, request: cluster.GetClusterRequest, grpc_context: GrpcContext
    ) -> cluster.GetClusterResponse:
        """One picture of the cluster."""

        async def answer(_: cluster.GetClusterRequest) -> cluster.GetClusterResponse:
            state = await self._grpc_frontend().cell.state()
            return cluster.GetClusterResponse(cluster=cluster_message(state, self._grpc_rate))

        return await _unary(answer, request, cluster.GetClusterResponse, grpc_context)

    async def WatchCluster(
        self, request: cluster.WatchClusterRequest, grpc_context: GrpcContext
    ) -> AsyncGenerator[cluster.WatchClusterResponse, None]:
        """A picture now, then at the asked interval, or at every change if none was asked."""
        try:
            interval_s = _interval_s(_readable(request))
            rate, last = TokenRate(), None
            while True:
                picture = await self._picture(rate)
                facts = cluster.Cluster(
                    ready=picture.ready, epoch=picture.epoch, actors=picture.actors
                )
                if interval_s is not None or facts != last:
                    last = facts
                    yield cluster.WatchClusterResponse(cluster=picture)
                await asyncio.sleep(_POLL_S if interval_s is None else interval_s)
        except OstroError as error:
            set_status(grpc_context, public_error(error))
            raise

    async def GetExperts(
        self, request: cluster.GetExpertsRequest, grpc_context: GrpcContext
    ) -> cluster.GetExpertsResponse:
        """Which experts live where and how hot they are."""

        async def answer(readable: cluster.GetExpertsRequest) -> cluster.GetExpertsResponse:
            frontend = self._grpc_frontend()
            beyond = [layer for layer in readable.layers if layer >= frontend.card.num_layers]
            if beyond:
                raise InvalidRequestError(f"layers: there is no layer {beyond[0]}", param="layers")
            return experts_response(await frontend.cell.state(), set(readable.layers))

        return await _unary(answer, request, cluster.GetExpertsResponse, grpc_context)

    # ---- grpc.health.v1.Health

    async def Check(
        self, request: HealthCheckRequest, grpc_context: GrpcContext
    ) -> HealthCheckResponse:
        """Health of a service: generation follows the cell, the view of the cluster always is."""

        async def answer(readable: HealthCheckRequest) -> HealthCheckResponse:
            status = self._health(readable.service)
            if status == HealthCheckResponse.SERVICE_UNKNOWN:
                raise NotFoundError(f"no service {readable.service[:100]!r}", param="service")
            return HealthCheckResponse(status=status)

        return await _unary(answer, request, HealthCheckResponse, grpc_context)

    async def Watch(
        self, request: HealthCheckRequest, grpc_context: GrpcContext
    ) -> AsyncGenerator[HealthCheckResponse, None]:
        """Health now and at every change."""
        try:
            service = _readable(request).service
            if self._grpc_num_watches >= self._grpc_max_watches:
                raise OverloadedError("too many watch the health already; ask with Check")
        except OstroError as error:
            set_status(grpc_context, error)
            raise
        last = None
        self._grpc_num_watches += 1
        try:
            while True:
                status = self._health(service)
                if status != last:
                    last = status
                    yield HealthCheckResponse(status=status)
                await asyncio.sleep(_POLL_S)
        finally:
            self._grpc_num_watches -= 1

    # ---- what the methods share

    def _chat(
        self, request: generation.ChatRequest | generation.StreamChatRequest, context: GrpcContext
    ) -> AsyncIterator[GenerationEvent]:
        events = self._grpc_frontend().chat(chat_generation(request))
        return self._grpc_metrics.watch(events, _origin(context, CHAT))

    def _generate(
        self, request: generation.StreamGenerateRequest, context: GrpcContext
    ) -> AsyncIterator[GenerationEvent]:
        events = self._grpc_frontend().generate(text_generation(request))
        return self._grpc_metrics.watch(events, _origin(context, TEXT_COMPLETION))

    async def _picture(self, rate: TokenRate) -> cluster.Cluster:
        """The cell, or a bare "not ready" while it cannot be asked."""
        try:
            return cluster_message(await self._grpc_frontend().cell.state(), rate)
        except NotReadyError:
            return cluster.Cluster(ready=False)

    def _health(self, service: str) -> HealthCheckResponse.ServingStatus:
        if service == CLUSTER_SERVICE:
            return HealthCheckResponse.SERVING
        if service not in ("", GENERATION_SERVICE):
            return HealthCheckResponse.SERVICE_UNKNOWN
        try:
            is_ready = self._grpc_frontend().cell.ready
        except NotReadyError:
            is_ready = False
        return HealthCheckResponse.SERVING if is_ready else HealthCheckResponse.NOT_SERVING


def _readable(request: Request | UnreadableRequest) -> Request:
    if isinstance(request, UnreadableRequest):
        raise InvalidRequestError(
            f"the request cannot be read: {request.reason}", code="unreadable_request"
        )
    return request


def _origin(context: GrpcContext, operation: str) -> Origin:
    return Origin.of(dict(text_metadata(context)), operation)


def _told(error: Exception, context: GrpcContext) -> OstroError:
    """Set the status; what the caller does not see of an error goes to the log."""
    told = public_error(error)
    if told is not error:
        logger.error("a gRPC call failed", exc_info=error)
    set_status(context, told)
    return told


async def _unary(
    answer: Callable[[Request], Awaitable[Response]],
    request: Request | UnreadableRequest,
    empty: Callable[[], Response],
    context: GrpcContext,
) -> Response:
    try:
        return await answer(_readable(request))
    except Exception as error:  # noqa: BLE001  the unnamed becomes INTERNAL; _told logs it
        _told(error, context)
        return empty()


async def _stream(
    begin: Callable[[Request, GrpcContext], AsyncIterator[GenerationEvent]],
    request: Request | UnreadableRequest,
    tell: Callable[[GenerationEvent], Iterable[Response]],
    fail: Callable[[generation.Failure], Response],
    context: GrpcContext,
) -> AsyncGenerator[Response, None]:
    try:
        async with closing_events(begin(_readable(request), context)) as events:
            async for event in events:
                for message in tell(event):
                    yield message
    except Exception as error:  # noqa: BLE001  as above
        yield fail(failure_message(_told(error, context)))


def _interval_s(request: cluster.WatchClusterRequest) -> float | None:
    if not request.HasField("interval"):
        return None
    interval_s = request.interval.seconds + request.interval.nanos / 1e9
    if interval_s < 0:
        raise InvalidRequestError("interval must not be negative", param="interval")
    return max(interval_s, _MIN_WATCH_S)
