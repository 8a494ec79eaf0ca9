"""The ingress replica that Ray Serve runs: HTTP and gRPC in front of one cell."""

from __future__ import annotations

import gc
import os
import uuid
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import ray
from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayError
from ray.serve.config import BackpressureConfig

from ostro.actors.errors import NotReadyError
from ostro.cluster.audit import AuditLog
from ostro.cluster.cell_client import CellClient
from ostro.cluster.door import Door
from ostro.cluster.frontend import Frontend
from ostro.cluster.grpc_ingress import GrpcMethods
from ostro.cluster.http_ingress import build_http_app
from ostro.cluster.image_fetch import ImageFetcher
from ostro.cluster.key_ring import KeyRing
from ostro.cluster.metrics import Metrics
from ostro.cluster.model_card import make_card
from ostro.cluster.node_placement import HEAD_RESOURCE
from ostro.cluster.prompt import PromptBuilder
from ostro.cluster.tracing import NO_TRACES, make_tracer
from ostro.configs.deployment import DeploymentConfig
from ostro.configs.model import load_model_config

SERVICERS = (
    "ostro.cluster.grpc_services.add_generation_service",
    "ostro.cluster.grpc_services.add_cluster_service",
    "ostro.cluster.grpc_services.add_health_service",
)
_DRAIN_POLL_S = 2.0
_WATCHES_SHARE = 4  # of a replica's calls, one in so many may be without a key and without an end


@dataclass(frozen=True, slots=True, kw_only=True)
class IngressSpec:
    """What a replica needs to find its cell; small and picklable.

    Attributes:
        router_name: The router actor's name.
        namespace: Its Ray namespace.
        secret: The deployment's secret.
        dtype: The cell's dtype, for the model card.
        weight_dtype: What its weights are held in, likewise.
    """

    deployment: DeploymentConfig
    model_dir: str
    router_name: str
    namespace: str
    secret: bytes = field(repr=False)
    dtype: str
    weight_dtype: str


class Ingress(GrpcMethods):
    """One replica: a frontend over the cell, behind both faces.

    Ray Serve calls the gRPC methods by name and builds the HTTP application once per replica.
    """

    _tracer = NO_TRACES  # until there is a model to trace

    def __init__(self, spec: IngressSpec) -> None:
        self._spec = spec
        model_dir, deployment = Path(spec.model_dir), spec.deployment
        config = load_model_config(model_dir)
        prompts = PromptBuilder(model_dir, deployment.reasoning, deployment.serving)
        card = replace(
            make_card(
                model_dir,
                config,
                deployment,
                weight_dtype=spec.weight_dtype,
                kv_dtype=deployment.engine.cached_in(spec.dtype),
            ),
            has_vision=prompts.serves_images(config.vision),
        )
        security = deployment.security
        keys = KeyRing(is_open=not security.has_keys)
        self._door = Door(keys, AuditLog(security), security)
        ingress_id = uuid.uuid4().hex
        self._cell = CellClient(
            self._find_router,
            spec.secret,
            ingress_id=ingress_id,
            submit_timeout_s=deployment.serving.submit_timeout_s,
            recovery_timeout_s=deployment.serving.recovery_timeout_s,
            on_keys=keys.replace,
        )
        observability = deployment.observability
        self._tracer = make_tracer(observability, card.name, ingress_id, os.environ)
        self._metrics = Metrics(card.name, observability, self._tracer, deployment.serving.tls)
        fetcher = ImageFetcher(deployment.serving, observe=self._metrics.observe_fetch)
        self._frontend = Frontend(self._cell, prompts, card, deployment, fetcher)
        GrpcMethods.__init__(
            self,
            lambda: self._frontend,
            self._metrics,
            self._door,
            max_watches=deployment.serving.max_ongoing_requests // _WATCHES_SHARE,
        )
        self._cell.start()
        self._metrics.share(self._cell)
        gc.collect()
        gc.freeze()  # vocabulary and libraries live as long as the replica: never walk them again

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Called by Ray Serve after the constructor."""
        return build_http_app(
            lambda: self._frontend,
            self._spec.deployment.serving,
            self._metrics,
            door=self._door,
            adds_request_id=False,
        )

    def __del__(self) -> None:
        """Called by Ray Serve when the replica ends."""
        self._tracer.close()

    async def check_health(self) -> None:
        """Called by Ray Serve; a replica that raises is replaced."""
        self._cell.check()

    async def _find_router(self) -> str:
        try:
            router = ray.get_actor(self._spec.router_name, namespace=self._spec.namespace)
            return str(await router.address.remote())
        except (ValueError, RayError) as error:
            raise NotReadyError(f"the router cannot be found: {type(error).__name__}") from None


def build_app(spec: IngressSpec, *, on_head: bool) -> Any:
    """The Serve application of a deployment; its replicas anywhere, or on the head node alone."""
    serving = spec.deployment.serving
    deployment = serve.deployment(
        name="ingress",
        num_replicas=serving.num_ingress_replicas,
        max_ongoing_requests=serving.max_ongoing_requests,
        max_queued_requests=serving.max_ongoing_requests,
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=2),
        graceful_shutdown_timeout_s=_DRAIN_POLL_S,
        graceful_shutdown_wait_loop_s=_DRAIN_POLL_S / 2,
        ray_actor_options={"num_cpus": 0, "resources": {HEAD_RESOURCE: 0.001} if on_head else {}},
    )
    return deployment(serve.ingress()(Ingress)).bind(spec)
