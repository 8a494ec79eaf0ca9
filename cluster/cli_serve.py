"""`ostro serve`: bring a deployment up, say where it answers, keep an eye on it, end it well."""

from __future__ import annotations

import io
import logging
import os
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.text import Text

from ostro.actors.errors import NotReadyError, OstroError, ShardLostError
from ostro.actors.fabric.messages import State
from ostro.cluster.announced_faces import AnnouncedFaces
from ostro.cluster.cli_console import make_console, plain_errors
from ostro.cluster.cli_deployment import (
    GrpcPort,
    HttpPort,
    Model,
    Overrides,
    Source,
    check_ports_free,
    describe_drafts,
    describe_layout,
    read_deployment,
)
from ostro.cluster.cli_signals import signals_interrupt, take_signals
from ostro.cluster.model_paths import resolve_model
from ostro.configs.deployment import DeploymentConfig, ServingConfig
from ostro.configs.model import ModelConfig

if TYPE_CHECKING:
    from ostro.cluster.tls_certificate import FaceCertificate

_POLL_S = 3.0
_HURRIED_DRAIN_S = 0.1
_RAY_CHARS = 400  # of an error of Ray's
_RAY_LOGS = "/tmp/ray/session_latest/logs"


class Cell(Protocol):
    """What `launch.launch` gives back, as far as this command uses it."""

    deployment: DeploymentConfig
    stage_seconds: dict[str, float]
    certificate: FaceCertificate | None

    def state(self) -> State:
        """The cell at this moment."""
        ...

    def stop(self, drain_s: float | None = None) -> None:
        """Drain for a while, then end everything."""
        ...


OnProgress = Callable[[str, State | None], None]
Launch = Callable[[DeploymentConfig, Path, OnProgress], Cell]


@plain_errors()
def serve(
    source: Source = "laptop",
    model: Model = None,
    overrides: Overrides = None,
    http_port: HttpPort = None,
    grpc_port: GrpcPort = None,
) -> None:
    """Serve a model: on this machine, or on the Ray cluster that RAY_ADDRESS names.

    Without arguments the embedded model answers from the CPU.
    Ctrl-C lets running generations finish and ends everything;
    a second Ctrl-C does not wait for them.

    For example:

    ostro serve
    ostro serve laptop_single --model ~/models/small --http-port 8080
    ostro serve 8xh200_split --set engine.max_context=65536
    ostro serve my_deployment.yaml
    """
    console = make_console()
    deployment = read_deployment(
        source, overrides, model=model, http_port=http_port, grpc_port=grpc_port
    )
    check_ports_free(deployment.serving)
    _check_certificate(deployment.serving)
    model_dir = resolve_model(deployment.model)
    logging.basicConfig(
        level=logging.WARNING,
        format="%(message)s",
        handlers=[RichHandler(console=make_console(stderr=True), show_path=False)],
    )
    run(deployment, model_dir, console, _launch_on_ray)


def run(
    deployment: DeploymentConfig,
    model_dir: Path,
    console: Console,
    launch: Launch,
    poll_s: float = _POLL_S,
) -> None:
    """Launch, announce, watch until asked to stop, stop.

    Raises:
        ConfigError: From the launch or the checkpoint's config.
        OstroError: From the launch or the checkpoint, or the router died while serving.
        typer.Exit: Interrupted before it was ready.
    """
    from ostro.cluster.cli_loading import loading_view

    config = _check_model(deployment, model_dir)
    weight_bytes = _weight_bytes(deployment, config, model_dir)
    with signals_interrupt():
        try:
            with loading_view(console, weight_bytes) as view:
                cell = launch(deployment, model_dir, view)
        except (KeyboardInterrupt, SystemExit):
            console.print("interrupted before it was ready; nothing is left running")
            raise typer.Exit(130) from None
        try:
            take_signals()  # again: Ray has set a handler of its own
            _announce(cell, model_dir, config, console)
            _watch(cell, console, poll_s)
        except KeyboardInterrupt:
            drain_s = cell.deployment.serving.drain_timeout_s
            console.print(
                f"stopping; running generations may take {drain_s:g} s to finish, "
                f"Ctrl-C again does not wait for them"
            )
        finally:
            _stop(cell)
            console.print("stopped")


def _check_certificate(serving: ServingConfig) -> None:
    """Refuse a bad one before anything starts; on a cluster the head has it, and reads it later."""
    from ostro.cluster.tls_certificate import read_certificate

    if serving.tls is not None and "RAY_ADDRESS" not in os.environ:
        read_certificate(serving.tls)


def _check_model(deployment: DeploymentConfig, model_dir: Path) -> ModelConfig:
    """Refuse, before anything starts, what no shard or ingress could serve.

    The head of a cluster need not have the weights; there the router has a rank's node check them.
    """
    from ostro.actors.model.draft_head import configured_head
    from ostro.actors.model.weights import check_checkpoint
    from ostro.cluster.prompt import PromptBuilder
    from ostro.configs.model import load_model_config

    on_cluster = "RAY_ADDRESS" in os.environ
    config = load_model_config(model_dir) if on_cluster else check_checkpoint(model_dir)
    if not on_cluster:
        configured_head(deployment.engine, config)
    PromptBuilder(model_dir, deployment.reasoning).serves_images(config.vision)
    return config


def _launch_on_ray(deployment: DeploymentConfig, model_dir: Path, on_progress: OnProgress) -> Cell:
    from ostro.cluster.ray_environment import prepare_environment

    prepare_environment(deployment.serving.max_body_bytes)
    from ray.exceptions import RayError

    from ostro.cluster.launch import launch

    try:
        return launch(deployment, model_dir, on_progress)
    except ConnectionError as error:
        where = f"at RAY_ADDRESS={os.environ['RAY_ADDRESS']}" if "RAY_ADDRESS" in os.environ else ""
        raise NotReadyError(f"no connection to Ray {where}: {error}") from None
    except RayError as error:
        told = " ".join(str(error).split())[:_RAY_CHARS]
        raise OstroError(f"Ray failed: {type(error).__name__}: {told}; see {_RAY_LOGS}") from error


def _weight_bytes(
    deployment: DeploymentConfig, config: ModelConfig, model_dir: Path
) -> dict[int, int]:
    from ostro.actors.model.checkpoint import CheckpointReader
    from ostro.actors.model.device import choose_dtype, torch_dtype
    from ostro.actors.model.draft_head import configured_head
    from ostro.actors.model.stored_weights import match_tensors, stored_plain
    from ostro.cluster.machine import local_device
    from ostro.cluster.weight_plan import plan_weights

    device = local_device(deployment.layout.device)
    dtype = choose_dtype(deployment.engine.dtype, device, config)
    return plan_weights(
        deployment,
        config,
        device=device,
        dtype=torch_dtype(dtype),
        plain=stored_plain(match_tensors(CheckpointReader(model_dir), config)),
        head=configured_head(deployment.engine, config),
    )


def _stop(cell: Cell) -> None:
    # Ray tells on stdout that its own actors are being killed; warnings of ours go to stderr.
    with redirect_stdout(io.StringIO()):
        try:
            cell.stop()
        except KeyboardInterrupt:
            cell.stop(_HURRIED_DRAIN_S)


# ---- what is said


def _announce(cell: Cell, model_dir: Path, config: ModelConfig, console: Console) -> None:
    from ostro.cluster.model_card import make_card

    deployment, serving = cell.deployment, cell.deployment.serving
    name = make_card(model_dir, config, deployment, weight_dtype=config.dtype).name
    stages = ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in cell.stage_seconds.items())
    total_s = sum(cell.stage_seconds.values())
    faces = AnnouncedFaces(serving, cell.certificate, deployment.security)
    lines = [
        ("model", name),
        *([("note", deployment.notice)] if deployment.notice else []),
        ("layout", describe_layout(deployment)),
        ("drafts", describe_drafts(deployment.engine.speculation, model_dir)),
        ("HTTP", faces.http_url()),
        ("gRPC", faces.grpc_address()),
        *(("TLS", line) for line in faces.tls_lines()),
        ("keys", faces.keys_line()),
        ("try", faces.curl_line(name)),
        ("or", faces.chat_line()),
    ]
    console.print()
    console.print(Text(f"Ostro is ready after {total_s:.1f} s", "bold green"), end="")
    console.print(Text(f"  ({stages})", "dim"))
    for title, text in lines:
        console.print(Text.assemble((f"  {title:<8}", "bold"), text), soft_wrap=True)
    console.print(Text("Ctrl-C stops it.", "dim"))


# ---- watching


@dataclass(frozen=True, slots=True)
class _Sight:
    """What is worth a line when it changes."""

    ready: bool
    lost: tuple[str, ...]
    epoch: int | None

    def __str__(self) -> str:
        if self.epoch is None:
            return "the router does not answer"
        lost = f": lost {', '.join(self.lost)}" if self.lost else ""
        return f"{'ready' if self.ready else 'not ready'} in epoch {self.epoch}{lost}"


def _watch(cell: Cell, console: Console, poll_s: float) -> None:
    """Write a line whenever readiness changes; ends only by an exception."""
    before: _Sight | None = None
    while True:
        sight = _look(cell)
        if before is not None and sight != before:
            style = "green" if sight.ready else "bold yellow"
            console.print(Text(f"{time.strftime('%H:%M:%S')}  {sight}", style), soft_wrap=True)
        before = sight
        time.sleep(poll_s)


def _look(cell: Cell) -> _Sight:
    from ray.exceptions import ActorDiedError, RayError

    try:
        state = cell.state()
    except ActorDiedError:
        raise ShardLostError("the router died; see Ray's logs") from None
    except (RayError, TimeoutError):
        return _Sight(False, (), None)
    lost = tuple(actor.actor_id for actor in state.actors if actor.state == "lost")
    return _Sight(state.ready, lost, state.epoch)
