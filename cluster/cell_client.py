"""The cell as an ingress replica reaches it: submissions to the router, token streams from shards.

One connection to the router and one to each attention shard, kept for the life of the replica and
dialled again after an epoch changes. All on one asyncio loop.

What a lost rank or router was making goes on when the cell is mended: the replica has every token
that the caller has, and submits what is left (`unfinished`). The sampler draws by seed and
position, so the rest is what it would have been.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable
from contextlib import aclosing
from typing import TypeVar

from ostro.actors import errors
from ostro.actors.engine.choices import choice_ids, submission_of
from ostro.actors.engine.request import GenerationRequest, TokenEvent
from ostro.actors.errors import NotReadyError, OstroError, ShardLostError
from ostro.actors.fabric.channel import AsyncConnection, connect
from ostro.actors.fabric.messages import (
    Accepted,
    AskCounts,
    AskState,
    Cancel,
    CancelGeneration,
    ControlDone,
    CountRequest,
    Counts,
    EndThinking,
    EndThinkingGeneration,
    IngressHello,
    Keys,
    Members,
    Message,
    PooledCounts,
    Rejected,
    ReplicaCounts,
    RequestCounted,
    State,
    StepEvents,
    Submit,
)
from ostro.cluster.cell_inbox import Inbox
from ostro.cluster.losses import Losses
from ostro.cluster.unfinished import Unfinished
from ostro.configs.key_table import KeyTable

logger = logging.getLogger(__name__)

_SERIAL_CHARS = 8
_DIAL_TIMEOUT_S = 5.0
_REDIAL_PAUSE_S = 0.5
_ANSWER_TIMEOUT_S = 10.0
_MAX_UNSENT_BYTES = 2**20  # more than this waits for the router: no images on top of it
_ROOM_POLL_S = 0.002
_MENDED_POLL_S = 0.05

_Answer = TypeVar("_Answer", State, ControlDone, RequestCounted, PooledCounts)
FindRouter = Callable[[], Awaitable[str]]


class CellClient:
    """Implements `seams.Cell`.

    Args:
        find_router: Gives the router's address; asked again before every dial.
        secret: The deployment's secret.
        ingress_id: Unique among the replicas.
        submit_timeout_s: How long the router may take to accept a request.
        recovery_timeout_s: How long a request that was lost waits for the cell to be mended.
        on_keys: Told who may call, at first and on change, if the deployment has keys.
    """

    def __init__(
        self,
        find_router: FindRouter,
        secret: bytes,
        *,
        ingress_id: str,
        submit_timeout_s: float,
        recovery_timeout_s: float = 0.0,
        on_keys: Callable[[KeyTable], None] = lambda _: None,
    ) -> None:
        self._find_router = find_router
        self._secret = secret
        self._ingress_id = ingress_id
        self._submit_timeout_s = submit_timeout_s
        self._recovery_timeout_s = recovery_timeout_s
        self._closed = False
        self._on_keys = on_keys
        self._router: AsyncConnection | None = None
        self._members = Members(0, False, {})
        self._inboxes: dict[str, Inbox] = {}  # by the id of each choice
        self._running: set[tuple[str, str]] = set()
        self._turn_to_send = asyncio.Lock()
        self._answers: dict[int, asyncio.Future[Message]] = {}
        self._tags = itertools.count(1)
        self._streams: dict[int, asyncio.Task[None]] = {}
        self._streaming: set[int] = set()
        self._main: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to dial; `ready` tells when requests are taken."""
        self._main = asyncio.get_running_loop().create_task(self._stay_connected())

    def check(self) -> None:
        """Raise if the client has given up, which is a bug: the replica must be replaced."""
        if self._main is not None and self._main.done():
            self._main.result()
            raise NotReadyError("the connection to the router was given up")

    async def close(self) -> None:
        """End every connection; running requests fail."""
        self._closed = True
        for task in (self._main, *self._streams.values()):
            if task is not None:
                task.cancel()
        if self._router is not None:
            self._router.close()
        self._fail(self._inboxes.values(), lambda: NotReadyError("the ingress is closing"))

    @property
    def ready(self) -> bool:
        """Whether requests are taken."""
        members = self._members
        return (
            self._router is not None
            and members.ready
            and self._streaming == set(members.token_addresses)
        )

    async def submit(self, *requests: GenerationRequest) -> AsyncIterator[TokenEvent]:
        """See `seams.Cell.submit`."""
        callers_name = (requests[0].tenant, requests[0].request_id)
        self._check_new(callers_name)
        self._running.add(callers_name)
        unfinished = Unfinished(requests)
        del requests  # `unfinished` lets go of images when they are not needed any more
        try:
            async with aclosing(self._pursue(unfinished)) as events:
                async for event in events:
                    yield event
        finally:
            self._running.discard(callers_name)

    async def _pursue(self, unfinished: Unfinished) -> AsyncGenerator[TokenEvent, None]:
        """Events of one attempt after the other: what is lost is submitted again."""
        losses = Losses(self._recovery_timeout_s)
        while unfinished:
            try:
                async with aclosing(self._attempt(unfinished)) as events:
                    async for event in events:
                        losses.latest = None
                        yield event
                return
            except (ShardLostError, NotReadyError) as error:
                if not losses.can_go_on(error, unfinished):
                    raise
                loss = losses.latest or error
            for event in unfinished.take_cancelled():
                yield event
            if unfinished:
                await self._until_mended(loss, losses.give_up_s)

    async def _attempt(self, unfinished: Unfinished) -> AsyncGenerator[TokenEvent, None]:
        submits = unfinished.submits(f"{self._ingress_id[:_SERIAL_CHARS]}-{next(self._tags)}")
        choices = [name for submit in submits for name in choice_ids(submit.request)]
        open_ids, inbox, num_unplaced = set(choices), Inbox(), len(submits)
        self._inboxes.update(dict.fromkeys(choices, inbox))
        try:
            while submits:
                await self._submit(submits.pop(0))
            while open_ids:
                item = await inbox.next(self._submit_timeout_s if num_unplaced else None)
                if isinstance(item, OstroError):
                    raise item
                if isinstance(item, TokenEvent):
                    unfinished.observe(item)
                    if item.finish_reason is not None:
                        open_ids.discard(item.request_id)
                    yield item
                else:
                    num_unplaced -= 1
                    unfinished.was_accepted = True
        finally:
            for choice_id in choices:
                del self._inboxes[choice_id]
            unfinished.heed(inbox.controls)
            unfinished.drop(inbox.dropped)
            if open_ids:
                self._forget(submission_of(choices[0]))

    async def _until_mended(self, loss: OstroError, give_up_s: float) -> None:
        """Wait until requests are taken again, or raise what was lost."""
        while not self._closed and asyncio.get_running_loop().time() < give_up_s:
            await asyncio.sleep(_MENDED_POLL_S)
            if self.ready:
                return
        raise loss

    def drop(self, request_id: str) -> None:
        """See `seams.Cell.drop`."""
        inbox = self._inboxes.get(request_id)
        if inbox is not None:
            inbox.dropped.add(request_id)
            self._forget(request_id)

    async def cancel(self, request_id: str, *, tenant: str | None = None) -> bool:
        """See `seams.Cell.cancel`."""
        return await self._control(lambda tag: CancelGeneration(tag, request_id, tenant))

    async def end_thinking(self, request_id: str, *, tenant: str | None = None) -> bool:
        """See `seams.Cell.end_thinking`."""
        return await self._control(lambda tag: EndThinkingGeneration(tag, request_id, tenant))

    async def _control(self, make: Callable[[int], Message]) -> bool:
        done = await self._ask(ControlDone, make)
        if not done.applied and not self.ready:  # what waits to go on is in no books of the router
            raise NotReadyError("the server is recovering; try again", retry_after_s=5)
        return done.applied

    async def count_request(self, tenant: str) -> None:
        """See `seams.Cell.count_request`."""
        counted = await self._ask(RequestCounted, lambda tag: CountRequest(tag, tenant))
        if counted.refusal is not None:
            raise counted.refusal.as_error()

    async def state(self) -> State:
        """See `seams.Cell.state`."""
        return await self._ask(State, AskState)

    def tell_counts(self, counts: Counts) -> None:
        """See `replica_families.CountsExchange.tell_counts`."""
        if self._router is not None:
            self._router.send(ReplicaCounts(counts))

    async def pooled_counts(self) -> Counts:
        """See `replica_families.CountsExchange.pooled_counts`."""
        return (await self._ask(PooledCounts, AskCounts)).counts

    async def _ask(self, kind: type[_Answer], make: Callable[[int], Message]) -> _Answer:
        tag = next(self._tags)
        answer: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        self._answers[tag] = answer
        try:
            self._send_to_router(make(tag))
            answered = await asyncio.wait_for(answer, _ANSWER_TIMEOUT_S)
        except TimeoutError:
            raise NotReadyError("the router does not answer; try again", retry_after_s=5) from None
        finally:
            del self._answers[tag]
        if not isinstance(answered, kind):
            raise NotReadyError(f"the router answered with {type(answered).__name__}")
        return answered

    def _send_to_router(self, message: Message) -> None:
        if self._router is None:
            raise NotReadyError("the router cannot be reached; try again", retry_after_s=5)
        self._router.send(message)

    def _check_new(self, callers_name: tuple[str, str]) -> None:
        if not self.ready:
            raise NotReadyError(
                "the server is starting, recovering or stopping; try again", retry_after_s=5
            )
        if callers_name in self._running:
            raise errors.InvalidRequestError(
                f"request_id {callers_name[1]!r} is running already; choose another",
                param="request_id",
                code="duplicate_request_id",
            )

    async def _submit(self, submit: Submit) -> None:
        if submit.request.images or submit.output_token_ids is not None:
            await self._room_to_send()
        self._send_to_router(submit)

    async def _room_to_send(self) -> None:
        """Images, and what a loss brings at once, go out one by one: the channel drops the rest.

        Raises:
            NotReadyError: The router takes nothing.
        """
        loop = asyncio.get_running_loop()
        give_up_s = loop.time() + self._submit_timeout_s
        async with self._turn_to_send:  # one looks, for all that wait
            while self._router is not None and self._router.unsent_bytes > _MAX_UNSENT_BYTES:
                if loop.time() > give_up_s:
                    raise NotReadyError("the router takes nothing as large now", retry_after_s=5)
                await asyncio.sleep(_ROOM_POLL_S)

    def _forget(self, name: str) -> None:
        """Stop a choice or a whole submission without waiting for an answer."""
        if self._router is not None:
            self._router.send(CancelGeneration(0, name))

    async def _stay_connected(self) -> None:
        while True:
            try:
                await self._talk_to_router()
            except (ConnectionError, TimeoutError, OSError, OstroError) as error:
                logger.info("the router cannot be reached: %s", error)
            self._router = None
            self._fail(
                self._inboxes.values(),
                lambda: ShardLostError("the router was lost; try again", retry_after_s=5),
            )
            await asyncio.sleep(_REDIAL_PAUSE_S)

    async def _talk_to_router(self) -> None:
        router = await connect(await self._find_router(), self._secret, timeout_s=_DIAL_TIMEOUT_S)
        try:
            router.send(IngressHello(self._ingress_id))
            self._router = router
            while (message := await router.receive()) is not None:
                self._take(message)
        finally:
            router.close()

    def _take(self, message: Message) -> None:
        match message:
            case Members():
                self._follow(message)
            case Keys(table=table):
                self._on_keys(table)
            case Accepted() | Rejected() | Cancel() | EndThinking():
                inbox = self._inboxes.get(message.request_id)
                if inbox is not None:
                    inbox.hear(message)
                    if isinstance(message, Accepted) and message.rank not in self._streaming:
                        inbox.put(_lost(message.rank))  # it broke after the request had gone out
            case State() | ControlDone() | RequestCounted() | PooledCounts():
                answer = self._answers.get(message.tag)
                if answer is not None and not answer.done():
                    answer.set_result(message)
            case _:
                logger.warning("the router sent %s", type(message).__name__)

    def _follow(self, members: Members) -> None:
        """Dial the token streams of a new epoch; the old ones end."""
        before, self._members = self._members, members
        same = (members.epoch, members.token_addresses) == (before.epoch, before.token_addresses)
        if same and all(not task.done() for task in self._streams.values()):
            return
        for task in self._streams.values():
            task.cancel()
        self._streaming.clear()
        self._fail(
            (inbox for inbox in self._inboxes.values() if inbox.ranks),
            lambda: ShardLostError("the server lost a part of itself; try again", retry_after_s=5),
        )
        loop = asyncio.get_running_loop()
        self._streams = {
            rank: loop.create_task(self._read_tokens(rank, address, members.epoch))
            for rank, address in members.token_addresses.items()
        }

    async def _read_tokens(self, rank: int, address: str, epoch: int) -> None:
        """Read a shard's stream, dialling again until the epoch's task is cancelled."""
        while True:
            try:
                await self._read_stream(rank, address, epoch)
            except (ConnectionError, TimeoutError, OSError) as error:
                logger.info("the token stream of rank %d ended: %s", rank, error)
            self._streaming.discard(rank)
            here = (inbox for inbox in self._inboxes.values() if rank in inbox.ranks)
            self._fail(here, lambda: _lost(rank))
            await asyncio.sleep(_REDIAL_PAUSE_S)

    async def _read_stream(self, rank: int, address: str, epoch: int) -> None:
        shard = await connect(address, self._secret, timeout_s=_DIAL_TIMEOUT_S)
        try:
            shard.send(IngressHello(self._ingress_id))
            while (message := await shard.receive()) is not None:
                if isinstance(message, StepEvents) and message.epoch == epoch:
                    self._streaming.add(rank)  # its first message greets, with no events
                    self._hand_out(message.events)
        finally:
            shard.close()

    def _hand_out(self, events: list[TokenEvent]) -> None:
        for event in events:
            inbox = self._inboxes.get(event.request_id)
            if inbox is not None:
                inbox.put(event)

    def _fail(self, inboxes: Iterable[Inbox], error: Callable[[], OstroError]) -> None:
        """End submissions, each with an error of its own: a raised one carries its traceback."""
        for inbox in set(inboxes):
            inbox.put(error())


def _lost(rank: int) -> ShardLostError:
    return ShardLostError(f"attention-{rank} was lost", retry_after_s=5)
