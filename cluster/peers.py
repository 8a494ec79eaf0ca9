"""A rank as the router reaches it: a Ray actor handle behind `actors.rank.Peer`."""

from __future__ import annotations

import asyncio
import re
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from ostro.actors.errors import CheckpointError, OstroError, ShardLostError
from ostro.actors.rank import EpochSpec, RankHealth, RankSpec
from ostro.configs.errors import ConfigError

_ACTORS = "ostro-"  # how the names of our actors begin


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
            raise _named(error.cause, self.name, address_in(error)) from None
        except RayError as error:
            raise ShardLostError(f"{self.name} is not running ({type(error).__name__})") from None


def with_place(
    error: OstroError | ConfigError, actor_name: str, address: str
) -> OstroError | ConfigError:
    """Say where a file or device was wrong: it may be right on every other node."""
    if not isinstance(error, CheckpointError | ConfigError) or str(error).startswith(_ACTORS):
        return error
    told = f"{actor_name} on {address}: {error}"
    error.args = (told,)
    if isinstance(error, CheckpointError):
        error.message = told
    return error


def address_in(error: RayTaskError) -> str:
    """The node where a task failed.

    Ray says it in the text alone: an error of the cause's class too has the cause's attributes.
    """
    found = re.search(r"\bip=([^\s,)]+)", str(error))
    return found[1] if found else "an unknown node"


async def _result(reference: Any) -> Any:
    return await reference


def _named(cause: BaseException, name: str, address: str) -> Exception:
    """The rank's own error if it is one of ours, else one that names the rank."""
    if isinstance(cause, OstroError | ConfigError):
        return with_place(cause, name, address)
    return ShardLostError(f"{name} failed: {type(cause).__name__}: {cause}")
