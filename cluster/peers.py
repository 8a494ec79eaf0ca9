"""A rank as the router reaches it: a Ray actor handle behind `actors.rank.Peer`."""

from __future__ import annotations

import asyncio
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from ostro.actors.errors import OstroError, ShardLostError
from ostro.actors.rank import EpochSpec, RankHealth, RankSpec
from ostro.configs.errors import ConfigError


class RayPeer:
    """Calls a rank's actor; a dead or silent one raises ShardLostError with its name."""

    def __init__(self, name: str, actor: Any) -> None:
        self.name = name
        self._actor = actor

    async def start(self, spec: RankSpec, *, timeout_s: float) -> None:
        """See `Peer.start`."""
        await self._call(self._actor.start.remote(spec), timeout_s)

    async def join(self, epoch: EpochSpec, *, timeout_s: float) -> None:
        """See `Peer.join`."""
        await self._call(self._actor.join.remote(epoch), timeout_s)

    async def leave(self, *, timeout_s: float) -> None:
        """See `Peer.leave`."""
        await self._call(self._actor.leave.remote(), timeout_s)

    async def health(self, *, timeout_s: float) -> RankHealth:
        """See `Peer.health`."""
        asked = self._actor.health.options(concurrency_group="control").remote()
        health: RankHealth = await self._call(asked, timeout_s)
        return health

    async def restart(self) -> None:
        """See `Peer.restart`."""
        ray.kill(self._actor, no_restart=False)

    async def _call(self, reference: Any, timeout_s: float) -> Any:
        try:
            return await asyncio.wait_for(asyncio.ensure_future(_result(reference)), timeout_s)
        except TimeoutError:
            raise ShardLostError(f"{self.name} did not answer within {timeout_s:.0f} s") from None
        except RayTaskError as error:
            raise _named(error.cause, self.name) from None
        except RayActorError:
            raise ShardLostError(f"{self.name} is not running") from None


async def _result(reference: Any) -> Any:
    return await reference


def _named(cause: BaseException, name: str) -> Exception:
    """The rank's own error if it is one of ours, else one that names the rank."""
    if isinstance(cause, OstroError | ConfigError):
        return cause
    return ShardLostError(f"{name} failed: {type(cause).__name__}: {cause}")
