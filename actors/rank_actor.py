"""What every shard does, whatever its role: load once, join and leave epochs, tell its health."""

from __future__ import annotations

import gc
import time
from abc import ABC, abstractmethod
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ostro.actors.errors import NotReadyError, ShardLostError
from ostro.actors.fabric.channel import SyncConnection
from ostro.actors.fabric.epoch import EpochGroup, Membership, join, leave
from ostro.actors.fabric.messages import RankHello
from ostro.actors.fabric.row_codec import RowLayout
from ostro.actors.fabric.wiring import Wiring
from ostro.actors.model.device import prepare_device, torch_dtype
from ostro.actors.model.weights import check_checkpoint
from ostro.actors.rank import EpochSpec, RankHealth, RankSpec, RankState
from ostro.actors.rank_loop import Engine, RankLoop, RankStatus
from ostro.configs.model import ModelConfig

_STOP_TIMEOUT_S = 5.0
_CONNECT_TIMEOUT_S = 10.0


class RankActor(ABC):
    """One rank of a cell.

    A plain class, so that tests drive it with no cluster; `cluster.launch` makes it an actor.
    Tensors never travel through Ray: methods take and give small Python values, and rows move by
    the process group of an epoch. Remote surface: `start`, `join`, `leave`, `health`.
    """

    def __init__(self, role: str, *, host: str, node_id: str) -> None:
        self._host = host
        self._status = RankStatus(role, node_id)
        self._spec: RankSpec | None = None
        self._loop: RankLoop | None = None
        self._group: EpochGroup | None = None

    def start(self, spec: RankSpec) -> None:
        """Load this rank's weights; does nothing if they are loaded already.

        Raises:
            CheckpointError: The checkpoint cannot be served.
            ConfigError: The device or the model's config cannot be served.
        """
        if self._spec == spec:
            return
        began_s = time.perf_counter()
        status = self._status
        status.rank, status.device, status.state = spec.rank, spec.device, RankState.LOADING
        prepare_device(spec.device, spec.deployment)
        with ThreadPoolExecutor(1) as apart:
            # A thread that ends takes its OpenMP team along. With more threads in teams than there
            # are cores, barriers sleep instead of spinning: a step of one token took twice as long.
            apart.submit(self._load, spec, check_checkpoint(Path(spec.model_dir))).result()
        self._spec = spec
        gc.collect()
        gc.freeze()  # what is loaded stays: no full collection walks it again, which takes 30 ms
        status.state = RankState.READY
        status.stage_seconds["load"] = time.perf_counter() - began_s

    def join(self, epoch: EpochSpec) -> None:
        """Form the epoch's process group and begin to serve.

        Raises:
            TransportError: A peer did not come in time; the message names it.
        """
        spec = self._spec
        if spec is None:
            raise NotReadyError("start() comes before join()")
        layout = spec.deployment.layout
        self._status.latest_epoch = epoch.epoch
        self.leave()
        began_s = time.perf_counter()
        if layout.world_size() > 1:
            membership = Membership(
                epoch=epoch.epoch,
                rank=spec.rank,
                world_size=layout.world_size(),
                store_host=epoch.store_host,
                store_port=epoch.store_port,
                timeout_s=layout.join_timeout_s,
            )
            self._group = join(membership, device=spec.device, host=self._host)
        connection = SyncConnection.connect(
            epoch.router_address, epoch.secret, timeout_s=_CONNECT_TIMEOUT_S
        )
        try:
            engine, token_address = self._make_engine(spec, epoch, connection)
            connection.send(RankHello(epoch.epoch, spec.rank, token_address))
        except BaseException:
            connection.close()
            raise
        self._loop = RankLoop(spec.rank, epoch.epoch, connection, engine)
        self._loop.start()
        self._status.stage_seconds["join"] = time.perf_counter() - began_s

    def leave(self) -> None:
        """Leave the epoch, if in one.

        Raises:
            ShardLostError: The engine does not stop; the process must be ended.
        """
        group, self._group = self._group, None
        loop, self._loop = self._loop, None
        if loop is not None:
            loop.ask_to_stop()
        if group is not None:
            leave(group)
        if loop is not None and not loop.wait(_STOP_TIMEOUT_S):
            # Its thread may still write to the cache: nothing new may begin beside it.
            self._loop = loop
            raise ShardLostError(f"rank {loop.rank} is stuck in a wait of epoch {loop.epoch}")
        self._epoch_ended()

    def health(self) -> RankHealth:
        """This rank's own account; never touches the device."""
        return self._status.health(self._loop)

    def _wiring(self, spec: RankSpec, config: ModelConfig) -> Wiring:
        """What this rank's transport must know of the epoch."""
        if self._group is None:
            raise NotReadyError("a cell of one rank has no wiring")
        return Wiring(
            group=self._group,
            attention_ranks=list(spec.deployment.layout.attention_ranks()),
            placement=spec.placement,
            layout=RowLayout(
                config.hidden_size, config.num_experts_per_token, torch_dtype(spec.dtype)
            ),
            timeout_s=spec.deployment.layout.step_timeout_s,
        )

    @abstractmethod
    def _load(self, spec: RankSpec, config: ModelConfig) -> None:
        """Read this role's weights and make what lasts over epochs."""

    @abstractmethod
    def _make_engine(
        self, spec: RankSpec, epoch: EpochSpec, connection: SyncConnection
    ) -> tuple[Engine, str | None]:
        """What this role does in an epoch, and the address of its token stream if it has one."""

    def _epoch_ended(self) -> None:
        """Close what `_make_engine` opened."""
        return
