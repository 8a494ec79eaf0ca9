"""The options that `ostro serve` and `ostro check` share, and the deployment they add up to."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from ostro.cluster.model_paths import head_beside, resolve_model, settle_drafts
from ostro.configs.deployment import DeploymentConfig, ServingConfig
from ostro.configs.errors import ConfigError
from ostro.configs.load import load_deployment, preset_names, read_model_defaults
from ostro.configs.speculation import DraftMethod, SpeculationConfig

Source = Annotated[
    str,
    typer.Argument(
        metavar="PRESET|FILE",
        help=f"A preset ({', '.join(preset_names())}) or a deployment file in YAML.",
    ),
]
Model = Annotated[
    str | None,
    typer.Option("--model", metavar="PATH", help="Checkpoint directory, or 'embedded'."),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Change one field, for example layout.num_expert_shards=3; may be repeated.",
    ),
]
HttpPort = Annotated[int | None, typer.Option(help="Port of the HTTP face.")]
GrpcPort = Annotated[int | None, typer.Option(help="Port of the gRPC face.")]


def read_deployment(
    source: str,
    overrides: Sequence[str] | None,
    *,
    model: str | None,
    http_port: int | None = None,
    grpc_port: int | None = None,
) -> DeploymentConfig:
    """The deployment that the options ask for; what they leave open, the checkpoint may set.

    Raises:
        ConfigError: As `load_deployment` and `read_model_defaults`, or a port out of range.
    """
    deployment = load_deployment(source, overrides or ())
    model = deployment.model if model is None else model
    model_dir = resolve_model(model)
    defaults = read_model_defaults(model_dir)
    deployment = load_deployment(source, overrides or (), defaults)
    serving = deployment.serving
    tls = None if serving.tls is None else serving.tls.absolute()
    return replace(
        deployment,
        model=model,
        engine=settle_drafts(deployment.engine, model_dir),
        serving=replace(
            serving,
            http_port=serving.http_port if http_port is None else http_port,
            grpc_port=serving.grpc_port if grpc_port is None else grpc_port,
            tls=tls,
        ),
    )


def check_ports_free(serving: ServingConfig) -> None:
    """Refuse to start where somebody else listens.

    Raises:
        ConfigError: A port is taken; the text says which and how to choose another.
    """
    taken = taken_ports(serving)
    if taken:
        options = " ".join(f"--{name.replace('_', '-')}" for name in taken)
        ports = " and ".join(f"{serving.host}:{port}" for port in taken.values())
        raise ConfigError(
            f"{ports} {'is' if len(taken) == 1 else 'are'} taken by another process; "
            f"stop it or choose with {options}"
        )


def taken_ports(serving: ServingConfig) -> dict[str, int]:
    """The ports of a deployment that somebody listens on, by their fields' names."""
    ports = {"http_port": serving.http_port, "grpc_port": serving.grpc_port}
    return {name: port for name, port in ports.items() if not _is_port_free(serving.host, port)}


def describe_layout(deployment: DeploymentConfig) -> str:
    """The layout in words.

    Example:
        "split, 1 attention + 2 expert shards"
    """
    layout = deployment.layout
    if layout.layout.value == "single":
        return "single, one shard with both roles"
    if layout.layout.value == "colocated":
        return f"colocated, {layout.world_size()} shards with both roles"
    experts = layout.num_expert_shards
    return (
        f"split, {layout.num_attention_shards} attention + {experts} expert "
        f"{'shard' if experts == 1 else 'shards'}"
    )


def describe_drafts(speculation: SpeculationConfig | None, model_dir: Path) -> str:
    """What is drafted in words; where nothing is, why not and how it would be.

    Example:
        "up to 3 tokens a step by a trained head, as many as pay"
    """
    if speculation is None:
        head = head_beside(model_dir)
        if head is not None:
            return f"none; engine.speculation.method=auto takes the head in {head}"
        return "none: the model brings no head; engine.speculation.method=ngram does without"
    by = "by a trained head"
    if speculation.method is DraftMethod.NGRAM:
        by = "from the text so far"
    how_many = "as many as pay" if speculation.adaptive else "wherever there is room"
    return f"up to {speculation.num_draft_tokens} tokens a step {by}, {how_many}"


def _is_port_free(host: str, port: int) -> bool:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        # As servers do: an old connection in TIME_WAIT is no obstacle, a listener is.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True
