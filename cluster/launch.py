"""Launch: Ray, the actors of a cell, Ray Serve in front of it; and their orderly end.

The one file that makes actors of the plain classes in `ostro.actors`. Call
`ray_environment.prepare_environment()` before importing it.
"""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import ray
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from ostro.actors.attention_shard import AttentionShard
from ostro.actors.errors import OstroError, ShardLostError
from ostro.actors.expert_shard import ExpertShard
from ostro.actors.fabric.messages import State
from ostro.actors.model.device import choose_dtype, num_threads
from ostro.actors.router import Router
from ostro.cluster.app import IngressSpec
from ostro.cluster.node_placement import Node, request_group, resolve_device
from ostro.cluster.peers import RayPeer
from ostro.cluster.serve_ingress import start_ingress, stop_ingress, wait_ready
from ostro.configs.deployment import DeploymentConfig, LayoutConfig
from ostro.configs.errors import ConfigError
from ostro.configs.model import load_model_config

logger = logging.getLogger(__name__)

NAMESPACE = "ostro"
ROUTER_NAME = "ostro-router"
_GROUP_TIMEOUT_S = 60.0
_CALL_TIMEOUT_S = 30.0
_POLL_S = 0.2
_OBJECT_STORE_BYTES = 80 * 2**20

OnProgress = Callable[[str, State | None], None]


@dataclass(slots=True)
class RunningCluster:
    """A cell that answers, and what must be ended with it.

    Attributes:
        stage_seconds: How long each stage of the launch took.
    """

    deployment: DeploymentConfig
    router: Any
    ranks: list[Any]
    group: PlacementGroup
    socket_dir: str
    secret: bytes
    owns_ray: bool
    stage_seconds: dict[str, float] = field(default_factory=dict)

    def state(self) -> State:
        """The cell at this moment."""
        state: State = ray.get(self.router.state.remote(), timeout=_CALL_TIMEOUT_S)
        return state

    def stop(self, drain_s: float | None = None) -> None:
        """End everything that was started, once running requests have had time to finish.

        Args:
            drain_s: How long they may take; None is the deployment's `drain_timeout_s`.
        """
        drain_s = self.deployment.serving.drain_timeout_s if drain_s is None else drain_s
        try:
            ray.get(self.router.drain.remote(drain_s), timeout=drain_s + _CALL_TIMEOUT_S)
        except (ray.exceptions.RayError, TimeoutError) as error:
            logger.warning("the router could not be drained: %s", type(error).__name__)
        stop_ingress()
        _end_cell(self.router, self.ranks, self.group, self.socket_dir)
        if self.owns_ray:
            ray.shutdown()


def launch(
    deployment: DeploymentConfig,
    model_dir: Path,
    on_progress: OnProgress = lambda *_: None,
    *,
    with_ingress: bool = True,
) -> RunningCluster:
    """Bring a deployment up and wait until it answers.

    On an existing Ray cluster if `RAY_ADDRESS` names one, else on a fresh one on this machine.

    Args:
        deployment: What to run.
        model_dir: The checkpoint, at the same path on every node.
        on_progress: Told the stage, and the cell's state while shards load.
        with_ingress: Whether HTTP and gRPC are served; benchmarks of the engine go without.

    Raises:
        ConfigError: The deployment does not fit the nodes or the checkpoint's config.
        CheckpointError: The checkpoint cannot be served.
        ShardLostError: A rank did not start; the message names it.
    """
    seconds: dict[str, float] = {}
    config = load_model_config(model_dir)
    with _stage("ray", seconds, on_progress):
        owns_ray = _connect(deployment.layout)
    cell: tuple[Any, list[Any], PlacementGroup, str] | None = None
    try:
        nodes = _nodes()
        device = resolve_device(deployment.layout.device, nodes)
        dtype = choose_dtype(deployment.engine.dtype, device, config)
        secret = secrets.token_bytes(32)
        with _stage("actors", seconds, on_progress):
            cell = _make_actors(deployment, model_dir, nodes, device, dtype, secret)
        router, ranks, group, socket_dir = cell
        spec = IngressSpec(
            deployment=deployment,
            model_dir=str(model_dir),
            router_name=ROUTER_NAME,
            namespace=NAMESPACE,
            secret=secret,
            dtype=dtype,
        )
        with _stage("load", seconds, on_progress), ThreadPoolExecutor(1) as pool:
            started = router.start.remote()
            opened = pool.submit(start_ingress, spec) if with_ingress else None
            _wait_started(router, started, on_progress)
        if opened is not None:
            with _stage("answer", seconds, on_progress):
                opened.result()
                wait_ready(deployment.serving)
    except BaseException:
        if cell is not None:
            stop_ingress()
            _end_cell(*cell)
        if owns_ray:
            ray.shutdown()
        raise
    return RunningCluster(deployment, router, ranks, group, socket_dir, secret, owns_ray, seconds)


@contextmanager
def _stage(name: str, seconds: dict[str, float], on_progress: OnProgress) -> Iterator[None]:
    on_progress(name, None)
    began_s = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - began_s


def _connect(layout: LayoutConfig) -> bool:
    """Connect to `RAY_ADDRESS`, or start Ray here; whether it was started."""
    address = os.environ.get("RAY_ADDRESS")
    if address:
        ray.init(
            address=address, namespace=NAMESPACE, log_to_driver=False, logging_level=logging.WARNING
        )
        return False
    if ray.is_initialized():
        return False
    ray.init(
        address="local",
        num_cpus=max(os.cpu_count() or 1, layout.world_size()),
        include_dashboard=False,
        object_store_memory=_OBJECT_STORE_BYTES,
        namespace=NAMESPACE,
        log_to_driver=False,
        logging_level=logging.WARNING,
    )
    return True


def _nodes() -> list[Node]:
    return [
        Node(
            node["NodeID"],
            node["NodeManagerAddress"],
            node.get("Labels") or {},
            node.get("Resources") or {},
        )
        for node in ray.nodes()
        if node["Alive"]
    ]


def _make_actors(
    deployment: DeploymentConfig,
    model_dir: Path,
    nodes: list[Node],
    device: str,
    dtype: str,
    secret: bytes,
) -> tuple[Any, list[Any], PlacementGroup, str]:
    """The router and every rank, placed and named; nothing is loaded yet."""
    _refuse_second_cell()
    layout = deployment.layout
    group = _make_group(layout, device, nodes)
    one_node = len(nodes) == 1
    homes = _homes(group, nodes)
    if one_node:  # nothing of ours needs to leave the machine
        homes = [replace(home, address="127.0.0.1") for home in homes]
    socket_dir = tempfile.mkdtemp(prefix="ostro-")
    ranks, peers = [], []
    for rank in range(layout.world_size()):
        name, actor = _make_rank(
            deployment, rank, group, homes[rank], device, socket_dir if one_node else None
        )
        ranks.append(actor)
        peers.append(RayPeer(name, actor))
    router = (
        ray.remote(Router)
        .options(
            name=ROUTER_NAME,
            num_cpus=0,
            max_restarts=0,
            max_concurrency=1000,
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, 0),
        )
        .remote(
            deployment,
            str(model_dir),
            peers,
            device=device,
            dtype=dtype,
            host=homes[0].address,
            listen_address=_address(homes[0], socket_dir if one_node else None, "router"),
            secret=secret,
        )
    )
    return router, ranks, group, socket_dir


def _make_rank(
    deployment: DeploymentConfig,
    rank: int,
    group: PlacementGroup,
    home: Node,
    device: str,
    socket_dir: str | None,
) -> tuple[str, Any]:
    layout = deployment.layout
    is_attention = rank in layout.attention_ranks()
    name = f"ostro-{'attention' if is_attention else 'expert'}-{rank}"
    arguments = {"host": home.address, "node_id": home.node_id}
    if is_attention:
        arguments["token_address"] = _address(home, socket_dir, f"tokens-{rank}")
    options = {
        "name": name,
        "num_cpus": 1,
        "num_gpus": 1 if device == "cuda" else 0,
        "max_restarts": -1,
        "max_task_retries": 0,
        "scheduling_strategy": PlacementGroupSchedulingStrategy(group, rank),
        "runtime_env": {"env_vars": _thread_environment(deployment)},
    }
    # Ray's stubs do not know this argument.
    make: Any = ray.remote(concurrency_groups={"control": 2})  # type: ignore[call-overload]
    return name, make(AttentionShard if is_attention else ExpertShard).options(**options).remote(
        **arguments
    )


def _thread_environment(deployment: DeploymentConfig) -> dict[str, str]:
    """OpenMP threads pinned to cores: unpinned, one busy neighbour cost a factor of 33."""
    threads = num_threads(deployment)
    pinned = {"OMP_PROC_BIND": "true", "OMP_PLACES": "cores"} if threads > 1 else {}
    return {"OMP_NUM_THREADS": str(threads), **pinned}


def _address(home: Node, socket_dir: str | None, name: str) -> str:
    """Unix sockets in a private folder on one node, TCP on the node's own address across nodes."""
    return f"unix:{socket_dir}/{name}" if socket_dir else f"tcp:{home.address}:0"


def _make_group(layout: LayoutConfig, device: str, nodes: list[Node]) -> PlacementGroup:
    wanted = request_group(layout, device, nodes)
    group: PlacementGroup = placement_group(
        wanted.bundles,
        strategy=None if wanted.topology else "PACK",
        name="ostro-cell",
        bundle_label_selector=wanted.label_selectors if any(wanted.label_selectors) else None,
        topology_strategy=wanted.topology,
    )
    if not group.wait(_GROUP_TIMEOUT_S):
        state = placement_group_table(group)["stats"]["scheduling_state"]
        remove_placement_group(group)
        raise ConfigError(
            f"no nodes for {layout.num_attention_shards} attention and {layout.num_expert_shards} "
            f"expert shards within {_GROUP_TIMEOUT_S:.0f} s ({state}); check labels "
            f"`ostro.role`, NVLink domains and free resources with `ray status`"
        )
    return group


def _homes(group: PlacementGroup, nodes: list[Node]) -> list[Node]:
    by_id = {node.node_id: node for node in nodes}
    placed = placement_group_table(group)["bundles_to_node_id"]
    return [by_id[placed[bundle]] for bundle in sorted(placed)]


def _refuse_second_cell() -> None:
    try:
        ray.get_actor(ROUTER_NAME, namespace=NAMESPACE)
    except ValueError:
        return
    raise ConfigError(
        f"this Ray cluster already runs a cell (actor {ROUTER_NAME!r}); stop it first"
    )


def _wait_started(router: Any, started: Any, on_progress: OnProgress) -> None:
    while True:
        done, _ = ray.wait([started], timeout=_POLL_S)
        if done:
            break
        on_progress("load", ray.get(router.state.remote(), timeout=_CALL_TIMEOUT_S))
    try:
        ray.get(started)
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        raise cause if isinstance(cause, OstroError | ConfigError) else error from None
    except ray.exceptions.RayActorError:
        raise ShardLostError("the router died while it started; see Ray's logs") from None
    on_progress("load", ray.get(router.state.remote(), timeout=_CALL_TIMEOUT_S))


def _end_cell(router: Any, ranks: list[Any], group: PlacementGroup, socket_dir: str) -> None:
    try:
        ray.get(router.stop.remote(), timeout=_CALL_TIMEOUT_S)
    except (ray.exceptions.RayError, TimeoutError) as error:
        logger.warning("the router did not stop: %s", type(error).__name__)
    for actor in (router, *ranks):
        ray.kill(actor, no_restart=True)
    remove_placement_group(group)
    shutil.rmtree(socket_dir, ignore_errors=True)
