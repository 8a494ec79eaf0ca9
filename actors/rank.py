"""What the router tells a rank and a rank tells of itself: small values that Ray carries."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from ostro.actors.errors import ShardLostError, TransportError
from ostro.actors.fabric.placement import Placement
from ostro.configs.deployment import DeploymentConfig

logger = logging.getLogger(__name__)

_SILENT_TIMEOUT_S = 15.0


class RankState(StrEnum):
    """Where a rank stands."""

    STARTING = "starting"
    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    LOST = "lost"


@dataclass(frozen=True, slots=True, kw_only=True)
class RankSpec:
    """What a rank needs to load its part of the model.

    Attributes:
        rank: Place in the process group.
        model_dir: Directory of the checkpoint, readable on the rank's node.
        deployment: The whole deployment; a rank reads its role from the layout.
        placement: Which experts this rank holds.
        device: "cpu" or "cuda".
        dtype: "float32" or "bfloat16".
    """

    rank: int
    model_dir: str
    deployment: DeploymentConfig
    placement: Placement
    device: str
    dtype: str


@dataclass(frozen=True, slots=True, kw_only=True)
class EpochSpec:
    """What a rank needs to take part in one epoch.

    Attributes:
        epoch: Its number; everything on the wire carries it.
        store_host: Where the router hosts the rendezvous store.
        store_port: Its port.
        router_address: The router's step listener.
        secret: The deployment's secret, asked for by every internal listener.
    """

    epoch: int
    store_host: str
    store_port: int
    router_address: str
    secret: bytes = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class RankHealth:
    """A rank's own account; making it never touches the device.

    Attributes:
        epoch: The latest that it was to join, whether that formed or not; None before the first.
        load_progress: 0..1 of the weights' bytes.
        memory_used_bytes: Resident bytes on CPU, allocated device bytes on CUDA.
        peak_memory_bytes: Highest resident bytes so far.
        started_at_s: Unix time.
        stage_seconds: How long each stage of the start took.
    """

    rank: int
    role: str
    state: RankState
    epoch: int | None
    node_id: str
    device: str
    load_progress: float
    memory_used_bytes: int
    memory_total_bytes: int
    peak_memory_bytes: int
    num_steps: int
    started_at_s: float
    stage_seconds: dict[str, float]


class Peer(Protocol):
    """A rank as the router reaches it; `cluster.launch` makes it from a Ray actor handle.

    Every call may raise `ShardLostError` if the rank is dead or does not answer in `timeout_s`.
    """

    name: str

    async def start(self, spec: RankSpec, *, timeout_s: float) -> None:
        """Load the rank's weights; does nothing if they are loaded already."""
        ...

    async def join(self, epoch: EpochSpec, *, timeout_s: float) -> None:
        """Form the epoch's process group and begin to serve."""
        ...

    async def leave(self, *, timeout_s: float) -> None:
        """Leave the epoch, if in one."""
        ...

    async def health(self, *, timeout_s: float) -> RankHealth:
        """The rank's own account."""
        ...

    async def restart(self) -> None:
        """End the rank's process; its weights must be loaded again."""
        ...


async def wait_for_all(calls: Iterable[Coroutine[None, None, None]]) -> None:
    """Wait for every call, then raise an error if there is one: one that names a peer first."""
    results = await asyncio.gather(*calls, return_exceptions=True)
    errors = [result for result in results if isinstance(result, BaseException)]
    errors.sort(key=lambda error: not isinstance(error, TransportError))
    if errors:
        raise errors[0]


async def restart_if_silent(peer: Peer) -> None:
    """End a rank that hangs; one that died comes back by itself and answers in time."""
    try:
        await peer.health(timeout_s=_SILENT_TIMEOUT_S)
    except ShardLostError as error:
        logger.warning("restarting %s: %s", peer.name, error)
        await peer.restart()
