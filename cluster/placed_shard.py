"""Actors that find out where they run: Ray may start one anew, a shard on another node.

What `cluster.launch` makes actors of; `ostro.actors` knows nothing of Ray.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import ray

from ostro.actors.attention_shard import AttentionShard
from ostro.actors.expert_shard import ExpertShard
from ostro.actors.model.device import num_threads
from ostro.actors.router import Router
from ostro.cluster.peers import RayPeer
from ostro.configs.deployment import DeploymentConfig

_LOOPBACK = "127.0.0.1"


class PlacedAttentionShard(AttentionShard):
    """An attention shard on the node that Ray chose.

    Args:
        name: The actor's name.
        socket_dir: Where it offers its token stream on the cluster's only node; None for TCP.
    """

    def __init__(self, name: str, socket_dir: str | None) -> None:
        host = _host(socket_dir)
        super().__init__(
            host=host, node_id=_node_id(), token_address=listen_address(host, socket_dir, name)
        )


class PlacedExpertShard(ExpertShard):
    """An expert shard on the node that Ray chose; arguments as `PlacedAttentionShard`."""

    def __init__(self, _name: str, socket_dir: str | None) -> None:
        super().__init__(host=_host(socket_dir), node_id=_node_id())


class PlacedRouter(Router):
    """A router that listens where no earlier process of it left a socket.

    It finds its ranks by name: arguments with handles in them stay in Ray's object store, where a
    new process of the router might not find them.

    Args:
        rank_names: Of the ranks' actors, in rank order.
        host: Its address in the cell, on any node but the cluster's only one.
        socket_dir: See `PlacedAttentionShard`.
    """

    def __init__(
        self,
        deployment: DeploymentConfig,
        model_dir: str,
        rank_names: Sequence[str],
        *,
        device: str,
        dtype: str,
        host: str,
        socket_dir: str | None,
        secret: bytes,
    ) -> None:
        super().__init__(
            deployment,
            model_dir,
            [RayPeer(name, ray.get_actor(name)) for name in rank_names],
            device=device,
            dtype=dtype,
            host=host,
            listen_address=listen_address(host, socket_dir, f"router.{os.getpid()}"),
            secret=secret,
        )


def listen_address(host: str, socket_dir: str | None, name: str) -> str:
    """Unix sockets in a private folder on one node, TCP on the node's own address across nodes."""
    if socket_dir is not None:
        return f"unix:{socket_dir}/{name}"
    return f"tcp:[{host}]:0" if ":" in host else f"tcp:{host}:0"


def thread_environment(deployment: DeploymentConfig) -> dict[str, str]:
    """OpenMP threads pinned to cores: unpinned, one busy neighbour cost a factor of 33."""
    threads = num_threads(deployment)
    pinned = {"OMP_PROC_BIND": "true", "OMP_PLACES": "cores"} if threads > 1 else {}
    return {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), **pinned}


def _host(socket_dir: str | None) -> str:
    """On one node nothing of ours needs to leave the machine."""
    return ray.util.get_node_ip_address() if socket_dir is None else _LOOPBACK


def _node_id() -> str:
    node_id: str = ray.get_runtime_context().get_node_id()
    return node_id
