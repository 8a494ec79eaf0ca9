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
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
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

from ostro.actors.errors import NotReadyError, OstroError, ShardLostError
from ostro.actors.fabric.messages import State
from ostro.actors.model.device import (
    choose_cache_dtype,
    choose_dtype,
    choose_precision,
    torch_dtype,
    weight_dtype,
)
from ostro.cluster.app import IngressSpec
from ostro.cluster.key_file import check_access
from ostro.cluster.key_watch import key_publishing, no_keys
from ostro.cluster.model_paths import settle_drafts
from ostro.cluster.node_placement import HEAD_RESOURCE, Node, request_group, resolve_device
from ostro.cluster.peers import address_in, with_place
from ostro.cluster.placed_shard import (
    PlacedAttentionShard,
    PlacedExpertShard,
    PlacedRouter,
    thread_environment,
)
from ostro.cluster.router_watch import RayRouter, watched_router
from ostro.cluster.running_cluster import RunningCluster
from ostro.cluster.serve_ingress import (
    clear_ingress,
    reachable_host,
    start_ingress,
    stop_ingress,
    wait_ready,
)
from ostro.cluster.tls_certificate import FaceCertificate, read_certificate
from ostro.cluster.tracing import check_exporter
from ostro.configs.deployment import DeploymentConfig, LayoutConfig
from ostro.configs.errors import ConfigError
from ostro.configs.model import load_model_config
from ostro.configs.tls import TlsConfig

logger = logging.getLogger(__name__)

NAMESPACE = "ostro"
ROUTER_NAME = "ostro-router"
_GROUP_TIMEOUT_S = 20.0
_CALL_TIMEOUT_S = 30.0
_POLL_S = 0.2
_LOOPBACK = "127.0.0.1"
_OBJECT_STORE_BYTES = 80 * 2**20

OnProgress = Callable[[str, State | None], None]


@dataclass(frozen=True, slots=True)
class ActorKind:
    """A class of shards, and what its constructor takes after the name and the socket folder."""

    of: type
    arguments: tuple[object, ...] = ()


_ATTENTION = ActorKind(PlacedAttentionShard)
_EXPERTS = ActorKind(PlacedExpertShard)


def launch(
    deployment: DeploymentConfig,
    model_dir: Path,
    on_progress: OnProgress = lambda *_: None,
    *,
    with_ingress: bool = True,
    attention: ActorKind = _ATTENTION,
) -> RunningCluster:
    """Bring a deployment up and wait until it answers.

    On the Ray cluster that this process is connected to, else on the one that `RAY_ADDRESS` names,
    else on a fresh one on this machine.

    Args:
        deployment: What to run.
        model_dir: The checkpoint, at the same path on every node.
        on_progress: Told the stage, and the cell's state while shards load.
        with_ingress: Whether HTTP and gRPC are served; benchmarks of the engine go without.
        attention: What attention shards are; benchmarks of the faces bring their own.

    Raises:
        ConfigError: The deployment does not fit the nodes or the checkpoint's config, its keys
            cannot be read, or the Ray cluster serves something already.
        CheckpointError: The checkpoint cannot be served.
        ShardLostError: A rank did not start; the message names it.
        NotReadyError: Ray did not start here.
    """
    seconds: dict[str, float] = {}
    config = load_model_config(model_dir)
    deployment = replace(deployment, engine=settle_drafts(deployment.engine, model_dir))
    if with_ingress:
        check_access(deployment)
        check_exporter(deployment.observability)
    with ExitStack() as undo:
        with _stage("ray", seconds, on_progress):
            if _connect(deployment.layout):
                undo.callback(ray.shutdown)
        nodes = _nodes()
        _refuse_second_cell()
        host, certificate = _prepare_ingress(deployment, nodes) if with_ingress else ("", None)
        device = resolve_device(deployment.layout.device, nodes)
        dtype = choose_dtype(deployment.engine.dtype, device, config)
        choose_cache_dtype(deployment.engine, torch_dtype(dtype), config)  # raises early
        spec = IngressSpec(
            deployment=deployment,
            model_dir=str(model_dir),
            router_name=ROUTER_NAME,
            namespace=NAMESPACE,
            secret=secrets.token_bytes(32),
            dtype=dtype,
            weight_dtype=weight_dtype(dtype, choose_precision(device, config)),
        )
        with _stage("actors", seconds, on_progress):
            router = _make_actors(spec, nodes, device, attention, undo)
            publish_keys = no_keys
            if with_ingress:
                start_timeout_s = deployment.layout.shard_start_timeout_s
                publish_keys = undo.enter_context(
                    key_publishing(deployment.security, router, start_timeout_s=start_timeout_s)
                )
        with _stage("load", seconds, on_progress), ThreadPoolExecutor(1) as pool:
            started = router.start.remote()
            if with_ingress:
                undo.callback(stop_ingress)
                opened = pool.submit(start_ingress, spec)
            _wait_started(router, started, on_progress)
            undo.enter_context(watched_router(RayRouter(router), publish_keys))
        if with_ingress:
            with _stage("answer", seconds, on_progress):
                opened.result()
                wait_ready(host, deployment.serving.http_port, certificate)
        return RunningCluster(deployment, router, spec.secret, undo.pop_all(), seconds, certificate)


@contextmanager
def _stage(name: str, seconds: dict[str, float], on_progress: OnProgress) -> Iterator[None]:
    on_progress(name, None)
    began_s = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - began_s


def _connect(layout: LayoutConfig) -> bool:
    """Connect to `RAY_ADDRESS`, or start Ray here; False if this process was connected."""
    if ray.is_initialized():
        return False
    address = os.environ.get("RAY_ADDRESS") or "local"
    if address.startswith("ray://"):
        raise ConfigError(
            f"RAY_ADDRESS={address}: Ray Client cannot reach the shards' sockets; "
            f"run on a node of the cluster, with RAY_ADDRESS=auto"
        )
    fresh: dict[str, Any] = {
        "num_cpus": max(os.cpu_count() or 1, layout.world_size()),
        "include_dashboard": False,
        "object_store_memory": _OBJECT_STORE_BYTES,
    }
    try:
        ray.init(
            address=address,
            namespace=NAMESPACE,
            log_to_driver=False,
            logging_level=logging.WARNING,
            **(fresh if address == "local" else {}),
        )
    except Exception as error:
        if type(error) is not Exception:
            raise
        # What Ray raises where its processes did not come up in the 30 s that it gives them.
        raise NotReadyError(f"Ray did not start, is the machine busy? {error}") from error
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


def _prepare_ingress(
    deployment: DeploymentConfig, nodes: list[Node]
) -> tuple[str, FaceCertificate | None]:
    """Make way for HTTP and gRPC; the host at which this process will reach them."""
    clear_ingress()
    head = next(node for node in nodes if node.is_head())
    is_here = head.node_id == ray.get_runtime_context().get_node_id()
    host = reachable_host(deployment.serving, None if is_here else head.address)
    tls = deployment.serving.tls
    return host, None if tls is None else _read_certificate(tls, is_here=is_here)


def _read_certificate(tls: TlsConfig, *, is_here: bool) -> FaceCertificate:
    """The certificate as the head reads it, which may be another machine."""
    if is_here:
        return read_certificate(tls)
    there = ray.remote(num_cpus=0, resources={HEAD_RESOURCE: 0.001})(read_certificate)
    try:
        return ray.get(there.remote(tls), timeout=_CALL_TIMEOUT_S)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, ConfigError):
            raise ConfigError(f"{error.cause} (on the head node, {address_in(error)})") from None
        raise


def _make_actors(
    spec: IngressSpec, nodes: list[Node], device: str, attention: ActorKind, undo: ExitStack
) -> Any:
    """Every rank and the router, placed and named; nothing is loaded yet."""
    deployment, layout = spec.deployment, spec.deployment.layout
    group = _make_group(layout, device, nodes)
    undo.callback(remove_placement_group, group)
    socket_dir = None
    if len(nodes) == 1:
        socket_dir = tempfile.mkdtemp(prefix="ostro-")
        undo.callback(shutil.rmtree, socket_dir, ignore_errors=True)
    names = []
    for rank in range(layout.world_size()):
        is_attention = rank in layout.attention_ranks()
        name = f"ostro-{'attention' if is_attention else 'expert'}-{rank}"
        kind = attention if is_attention else _EXPERTS
        actor = _make_rank(deployment, rank, group, device, kind, name, socket_dir)
        undo.callback(ray.kill, actor, no_restart=True)
        names.append(name)
    host = _LOOPBACK if socket_dir else _address_of_first(group)
    router = (
        ray.remote(PlacedRouter)
        .options(
            name=ROUTER_NAME,
            namespace=NAMESPACE,
            num_cpus=0,
            max_restarts=-1,
            max_concurrency=1000,
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, 0),
        )
        .remote(
            deployment,
            spec.model_dir,
            names,
            device=device,
            dtype=spec.dtype,
            host=host,
            socket_dir=socket_dir,
            secret=spec.secret,
        )
    )
    undo.callback(_end_router, router)
    return router


def _make_rank(
    deployment: DeploymentConfig,
    rank: int,
    group: PlacementGroup,
    device: str,
    kind: ActorKind,
    name: str,
    socket_dir: str | None,
) -> Any:
    options = {
        "name": name,
        "namespace": NAMESPACE,
        "num_cpus": 1,
        "num_gpus": 1 if device == "cuda" else 0,
        "max_restarts": -1,
        "max_task_retries": 0,
        "scheduling_strategy": PlacementGroupSchedulingStrategy(group, rank),
        "runtime_env": {"env_vars": thread_environment(deployment)},
    }
    # Ray's stubs do not know this argument.
    make: Any = ray.remote(concurrency_groups={"control": 2})  # type: ignore[call-overload]
    return make(kind.of).options(**options).remote(name, socket_dir, *kind.arguments)


def _make_group(layout: LayoutConfig, device: str, nodes: list[Node]) -> PlacementGroup:
    wanted = request_group(layout, device, nodes)
    group: PlacementGroup = placement_group(
        wanted.bundles,
        strategy=None if wanted.topology else "PACK",
        name="ostro-cell",
        bundle_label_selector=wanted.label_selectors if any(wanted.label_selectors) else None,
        topology_strategy=wanted.topology,
    )
    try:
        _wait_placed(group, wanted.bundles)
    except BaseException:
        remove_placement_group(group)
        raise
    return group


def _wait_placed(group: PlacementGroup, bundles: list[dict[str, float]]) -> None:
    """Wait for what others on the cluster may be about to free."""
    deadline_s = time.monotonic() + _GROUP_TIMEOUT_S
    while not group.wait(_POLL_S):
        state = placement_group_table(group)["stats"]["scheduling_state"]
        if state == "INFEASIBLE" or time.monotonic() > deadline_s:
            break
    else:
        return
    free = ray.available_resources()
    each = " and ".join(f"{much:g} {name}" for name, much in bundles[0].items())
    have = " and ".join(f"{free.get(name, 0):g} {name}" for name in bundles[0])
    raise ConfigError(
        f"no place for {len(bundles)} ranks with {each} each: the cluster is large enough, but "
        f"{have} are free now ({state}); see `ray status` for what holds the rest, and check "
        f"the nodes' labels"
    )


def _address_of_first(group: PlacementGroup) -> str:
    """Address of the node that rank 0 and the router go to."""
    node_id = placement_group_table(group)["bundles_to_node_id"][0]
    return next(node.address for node in _nodes() if node.node_id == node_id)


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
        _tell_progress(router, on_progress)
    try:
        ray.get(started)
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        if isinstance(cause, OstroError | ConfigError):
            raise with_place(cause, ROUTER_NAME, address_in(error)) from None
        raise
    except ray.exceptions.RayActorError:
        raise ShardLostError("the router died while it started; see Ray's logs") from None
    _tell_progress(router, on_progress)


def _tell_progress(router: Any, on_progress: OnProgress) -> None:
    """A router that is too busy to say how far it is goes on loading all the same."""
    with suppress(ray.exceptions.GetTimeoutError):
        on_progress("load", ray.get(router.state.remote(), timeout=_CALL_TIMEOUT_S))


def _end_router(router: Any) -> None:
    try:
        ray.get(router.stop.remote(), timeout=_CALL_TIMEOUT_S)
    except (ray.exceptions.RayError, TimeoutError) as error:
        logger.warning("the router did not stop: %s", type(error).__name__)
    ray.kill(router, no_restart=True)
