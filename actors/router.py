"""The router of a cell: admits and places requests, conducts steps, owns epochs and placement.

A plain class on one asyncio loop; `cluster.launch` makes it an actor. It decides and never carries:
rows travel between ranks, tokens travel from attention shards to ingress replicas.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from ostro.actors.cell_requests import CellRequests, LiveRequest
from ostro.actors.cell_totals import CellTotals
from ostro.actors.counts_pool import CountsPool
from ostro.actors.engine.quotas import TenantQuotas
from ostro.actors.errors import NotReadyError, OstroError, ShardLostError
from ostro.actors.fabric.channel import AsyncConnection, AsyncServer, ChannelError
from ostro.actors.fabric.epoch import host_store
from ostro.actors.fabric.messages import (
    Accepted,
    AskCounts,
    AskState,
    Assign,
    Cancel,
    CancelGeneration,
    ControlDone,
    CountRequest,
    EndThinking,
    EndThinkingGeneration,
    IngressHello,
    Keys,
    Members,
    Message,
    PooledCounts,
    RankHello,
    ReplicaCounts,
    State,
    Submit,
)
from ostro.actors.fabric.placement import Placement, initial_placement
from ostro.actors.health_book import HealthBook
from ostro.actors.ingress_links import IngressLinks, counted
from ostro.actors.model.weights import check_checkpoint
from ostro.actors.rank import EpochSpec, Peer, RankSpec, restart_if_silent, wait_for_all
from ostro.actors.router_epoch import RouterEpoch
from ostro.configs.deployment import DeploymentConfig
from ostro.configs.key_table import KeyTable

logger = logging.getLogger(__name__)

_LEAVE_TIMEOUT_S = 10.0
_MEND_PAUSE_S = (0.5, 1.0, 2.0, 5.0, 10.0)
_WATCH_EVERY_S = 1.0
_STEP_GRACE_S = 5.0
# Besides images: a rank reads between its steps only, so all that it serves may be on its way.
_MAX_UNSENT_BYTES = 64 * 2**20
_JOIN_GRACE_S = 15.0


@dataclass(frozen=True, slots=True)
class _Ground:
    """What all epochs of a cell stand on."""

    placement: Placement
    store: dist.TCPStore  # type: ignore[name-defined]
    address: str


class Router:
    """Conducts one cell.

    Remote surface: `start`, `resume`, `address`, `set_keys`, `state`, `drain`, `stop`. All else
    arrives on the step listener, from ranks and ingress replicas that show the secret.
    """

    def __init__(
        self,
        deployment: DeploymentConfig,
        model_dir: str,
        peers: Sequence[Peer],
        *,
        device: str,
        dtype: str,
        host: str,
        listen_address: str,
        secret: bytes,
    ) -> None:
        self._deployment = deployment
        self._model_dir = model_dir
        self._peers = list(peers)
        self._device = device
        self._dtype = dtype
        self._host = host
        self._secret = secret
        self._server = AsyncServer(
            listen_address,
            secret,
            self._on_connection,
            max_unsent_bytes=_MAX_UNSENT_BYTES + deployment.engine.max_live_image_bytes,
        )
        self._ground: _Ground | None = None
        self._rows_LE: list[list[int]] = []
        self._epoch: RouterEpoch | None = None
        self._epoch_number = -1
        self._keys: KeyTable | None = None
        self._quotas = TenantQuotas()
        self._num_resumed = 0
        self._done = CellTotals()  # in the epochs before this one
        self._requests = self._no_requests()
        self._ingresses = IngressLinks()
        self._counts = CountsPool()
        self._health = HealthBook(deployment.layout, self._peers)
        self._starting = asyncio.Lock()
        self._draining = False
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Load every rank and form an epoch; does nothing if one serves already.

        Raises:
            CheckpointError: The checkpoint cannot be served; nothing was loaded.
            ShardLostError: A rank did not start or join in time; the message names it.
        """
        async with self._starting:
            if self._ground is None:
                self._ground = await self._lay_ground()
            if not (self._epoch and self._epoch.serving):
                await self._begin_epoch(self._ground)

    async def resume(self) -> None:
        """Begin to take over the ranks of a router that died, and go on until that succeeds."""
        async with self._starting:
            if self._ground is not None:
                return
            # No number twice: what was sent in an earlier epoch may still be on its way.
            self._epoch_number = await self._health.latest_epoch()
            self._ground = await self._lay_ground()
        self._spawn(self._mend())

    async def address(self) -> str:
        """Where ranks and ingress replicas connect; NotReadyError before `start` or `resume`."""
        if self._ground is None:
            raise NotReadyError("the router has not been started; call start() first")
        return self._ground.address

    async def set_keys(self, table: KeyTable) -> None:
        """Put keys and quotas in force, here and at every ingress; what runs goes on."""
        self._keys = table
        self._quotas.configure(table.quotas)
        self._ingresses.tell_all(Keys(table))

    async def drain(self, timeout_s: float) -> int:
        """Take no new requests and wait for the running ones; how many were left at the end."""
        self._draining = True
        self._ingresses.tell_all(self._members())
        deadline_s = time.monotonic() + timeout_s
        while len(self._requests) and time.monotonic() < deadline_s:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        return len(self._requests)

    async def stop(self) -> None:
        """End the epoch and every connection; ranks keep their weights."""
        self._draining = True
        for task in self._tasks:
            task.cancel()
        if self._epoch is not None:
            self._epoch.close()
        await asyncio.gather(
            *(peer.leave(timeout_s=_LEAVE_TIMEOUT_S) for peer in self._peers),
            return_exceptions=True,
        )
        await self._server.close()

    async def state(self, tag: int = 0) -> State:
        """The cell at this moment; ranks that do not answer are shown as lost."""
        actors = await self._health.statuses()
        placement = self._ground.placement if self._ground else None
        done = self._done.then(self._epoch.totals()) if self._epoch else self._done
        return State(
            tag=tag,
            epoch=max(self._epoch_number, 0),
            ready=self._ready,
            actors=actors,
            loads=dict(done.loads),
            rows_LE=self._rows_LE,
            physical_to_logical=list(placement.physical_to_logical) if placement else [],
            rank_of_physical=list(placement.rank_of_physical) if placement else [],
            seconds=dict(done.seconds),
            num_steps=done.num_steps,
            num_resumed=self._num_resumed,
        )

    @property
    def _ready(self) -> bool:
        return self._epoch is not None and self._epoch.serving and not self._draining

    # ---- epochs

    async def _lay_ground(self) -> _Ground:
        config = await asyncio.to_thread(check_checkpoint, Path(self._model_dir))
        layout = self._deployment.layout
        placement = initial_placement(
            config.num_experts, list(layout.expert_ranks()), layout.num_redundant_experts
        )
        self._rows_LE = [[0] * config.num_experts for _ in range(config.num_layers)]
        ground = _Ground(placement, host_store(self._host), await self._server.start())
        self._spawn(self._watch())
        return ground

    async def _begin_epoch(self, ground: _Ground) -> None:
        timeouts = self._deployment.layout
        await wait_for_all(
            peer.start(self._rank_spec(rank, ground), timeout_s=timeouts.shard_start_timeout_s)
            for rank, peer in enumerate(self._peers)
        )
        if self._epoch is not None:
            self._epoch.close()
            self._done = self._done.then(self._epoch.totals())
        self._epoch_number += 1
        # There are some if `start` was called before the verdict on the last epoch.
        self._give_up("the server is recovering, try again")
        self._epoch = RouterEpoch(
            self._deployment.layout,
            number=self._epoch_number,
            placement=ground.placement,
            rows_LE=self._rows_LE,
            requests=self._requests,
            on_failure=self._on_failure,
        )
        spec = EpochSpec(
            epoch=self._epoch_number,
            store_host=self._host,
            store_port=ground.store.port,
            router_address=ground.address,
            secret=self._secret,
        )
        # Longer than the ranks wait for each other: they know which one did not come.
        patience_s = timeouts.join_timeout_s + _JOIN_GRACE_S
        try:
            await wait_for_all(peer.join(spec, timeout_s=patience_s) for peer in self._peers)
            await self._epoch.all_here(timeouts.join_timeout_s)
        except BaseException:
            self._epoch.close()
            raise
        logger.info("epoch %d serves on %d ranks", self._epoch_number, len(self._peers))
        self._ingresses.tell_all(self._members())

    def _rank_spec(self, rank: int, ground: _Ground) -> RankSpec:
        return RankSpec(
            rank=rank,
            model_dir=self._model_dir,
            deployment=self._deployment,
            placement=ground.placement,
            device=self._device,
            dtype=self._dtype,
        )

    def _on_failure(self, epoch: RouterEpoch, lost: Sequence[int], reason: str) -> None:
        if epoch is not self._epoch:
            return  # the verdict on an epoch that was replaced meanwhile
        names = ", ".join(self._peers[rank].name for rank in lost) or "a rank"
        message = f"lost {names}: {reason}; the server is recovering, try again"
        logger.error("%s", message)
        self._give_up(message)
        epoch.close()
        self._ingresses.tell_all(self._members())
        if not self._draining:
            self._spawn(self._mend())

    def _give_up(self, why: str) -> None:
        """Tell every reader that its requests are lost."""
        error = ShardLostError(why, retry_after_s=5)
        for live in self._requests.give_up():
            self._ingresses.reject(live.ingress_id, live.request_id, error)
        self._requests = self._no_requests()

    async def _mend(self) -> None:
        """Form the next epoch, waiting longer after each attempt that fails."""
        for attempt in itertools.count():
            await asyncio.sleep(_MEND_PAUSE_S[min(attempt, len(_MEND_PAUSE_S) - 1)])
            try:
                await wait_for_all(restart_if_silent(peer) for peer in self._peers)
                async with self._starting:
                    if self._ground and not (self._epoch and self._epoch.serving):
                        await self._begin_epoch(self._ground)
            except Exception as error:  # noqa: BLE001 (the next attempt may succeed)
                logger.warning("epoch %d did not form: %r", self._epoch_number, error)
            else:
                return

    async def _watch(self) -> None:
        """Name the ranks that sit on a step for too long."""
        timeout_s = self._deployment.layout.step_timeout_s + _STEP_GRACE_S
        while True:
            await asyncio.sleep(_WATCH_EVERY_S)
            if self._epoch is not None:
                self._epoch.check_overdue(timeout_s)

    # ---- connections

    async def _on_connection(self, connection: AsyncConnection) -> None:
        hello = await connection.receive()
        if isinstance(hello, RankHello) and self._epoch and hello.epoch == self._epoch.number:
            await self._epoch.serve_rank(connection, hello)
        elif isinstance(hello, IngressHello):
            await self._serve_ingress(connection, hello.ingress_id)
        else:
            logger.warning("dropped a connection that said %s first", type(hello).__name__)
        connection.close()

    async def _serve_ingress(self, connection: AsyncConnection, ingress_id: str) -> None:
        # One that dials again has given up on all it had asked for, whether that was heard or not.
        self._steer(Cancel, self._requests.of_ingress(ingress_id))
        self._ingresses.add(ingress_id, connection)
        if self._keys is not None:
            connection.send(Keys(self._keys))
        connection.send(self._members())
        try:
            while (message := await connection.receive()) is not None:
                self._answer(connection, ingress_id, message)
        except ChannelError:
            logger.info("ingress %s is gone", ingress_id)
        finally:
            if self._ingresses.remove(ingress_id, connection):
                self._counts.leave(ingress_id)
                self._steer(Cancel, self._requests.of_ingress(ingress_id))

    def _answer(self, connection: AsyncConnection, ingress_id: str, message: Message) -> None:
        match message:
            case Submit():
                self._submit(ingress_id, message)
            case CancelGeneration(tag=tag, request_id=request_id, tenant=tenant):
                found = self._requests.find(request_id, tenant)
                connection.send(ControlDone(tag, self._steer(Cancel, found)))
            case EndThinkingGeneration(tag=tag, request_id=request_id, tenant=tenant):
                found = self._requests.find(request_id, tenant)
                connection.send(ControlDone(tag, self._steer(EndThinking, found)))
            case CountRequest():
                connection.send(counted(message, self._quotas))
            case AskState(tag=tag):
                self._spawn(self._send_state(connection, tag))
            case ReplicaCounts(counts=counts):
                self._counts.take(ingress_id, counts)
            case AskCounts(tag=tag):
                connection.send(PooledCounts(tag, self._counts.total()))

    async def _send_state(self, connection: AsyncConnection, tag: int) -> None:
        connection.send(await self.state(tag))

    def _submit(self, ingress_id: str, submit: Submit) -> None:
        request, output = submit.request, submit.output_token_ids
        try:
            if not self._ready or self._epoch is None:
                why = "stopping" if self._draining else "starting or recovering"
                raise NotReadyError(f"the server is {why}; try again", retry_after_s=5)
            rank = self._requests.place(request, ingress_id, is_resumed=output is not None)
            self._num_resumed += output is not None
        except OstroError as error:
            self._ingresses.reject(ingress_id, request.request_id, error)
            return
        self._epoch.send(rank, Assign(self._epoch.number, request, ingress_id, output))
        self._ingresses.tell(ingress_id, Accepted(request.request_id, rank))

    def _steer(
        self, control: type[Cancel] | type[EndThinking], found: Sequence[LiveRequest]
    ) -> bool:
        """Have a control reach all of these, and their readers; False if there are none."""
        if self._epoch is None:
            return False
        for live in found:
            message = control(self._epoch.number, live.request_id)
            self._epoch.send(live.rank, message)
            self._ingresses.tell(live.ingress_id, message)
        return bool(found)

    def _members(self) -> Members:
        addresses = self._epoch.token_addresses if self._epoch and self._epoch.serving else {}
        return Members(max(self._epoch_number, 0), self._ready, dict(addresses))

    def _no_requests(self) -> CellRequests:
        ranks = list(self._deployment.layout.attention_ranks())
        return CellRequests(self._deployment.engine, ranks, self._quotas)

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._task_ended)

    def _task_ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("a task of the router failed", exc_info=error)
