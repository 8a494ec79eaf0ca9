"""The ingress replica that Ray Serve runs: HTTP and gRPC in front of one cell."""

from __future__ import annotations

import asyncio
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from fastapi import FastAPI
from ray import serve

from ostro.cluster.cell_client import CellClient
from ostro.cluster.frontend import Frontend
from ostro.cluster.grpc_ingress import GrpcMethods
from ostro.cluster.http_ingress import build_http_app
from ostro.cluster.metrics import Metrics
from ostro.cluster.model_card import make_card
from ostro.cluster.prompt import PromptBuilder
from ostro.configs.deployment import DeploymentConfig
from ostro.configs.model import load_model_config
from ostro.actors.errors import NotReadyError

SERVICERS = (
    "ostro.protos.generation_pb2_grpc.add_GenerationServiceServicer_to_server",
    "ostro.protos.cluster_pb2_grpc.add_ClusterServiceServicer_to_server",
    "grpc_health.v1.health_pb2_grpc.add_HealthServicer_to_server",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class IngressSpec:
    """What a replica needs to find its cell; small, picklable.

    Attributes:
        router_name: The router actor's name.
        namespace: Its Ray namespace.
        secret: The deployment's secret.
        dtype: The cell's dtype, for the model card.
    """

    deployment: DeploymentConfig
    model_dir: str
    router_name: str
    namespace: str
    secret: bytes
    dtype: str
