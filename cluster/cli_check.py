"""`ostro check`: whether a deployment would run here, told before anything is loaded."""

from __future__ import annotations

import os
from pathlib import Path

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ostro.actors.errors import CheckpointError
from ostro.actors.model.device import choose_dtype, torch_dtype
from ostro.actors.model.draft_head import DraftHead, configured_head
from ostro.actors.model.inspection import Inspection, inspect_checkpoint
from ostro.actors.model.latent_cache import cached_token_bytes
from ostro.cluster.announced_faces import AnnouncedFaces
from ostro.cluster.cli_console import make_console
from ostro.cluster.cli_deployment import (
    describe_drafts,
    describe_layout,
    taken_ports,
)
from ostro.cluster.deployment_plan import (
    DeploymentPlan,
    Machine,
    RankPlan,
    plan_deployment,
)
from ostro.cluster.human_numbers import format_bytes, format_count
from ostro.cluster.key_file import check_access
from ostro.cluster.machine import local_device, this_machine
from ostro.cluster.model_paths import resolve_model
from ostro.cluster.prompt import PromptBuilder
from ostro.cluster.tls_certificate import read_certificate
from ostro.cluster.weight_plan import draft_head_bytes
from ostro.configs.deployment import DeploymentConfig, ServingConfig
from ostro.configs.errors import ConfigError
from ostro.configs.model import ModelConfig, load_model_config
from ostro.configs.quantization import WeightFormat
from ostro.kernels.latent_cache import FP8_ROWS

_TITLE_WIDTH = 12


def run(deployment: DeploymentConfig) -> None:
    """Write the report.

    Raises:
        ConfigError: There is nothing to judge: no checkpoint, or experts that cannot be spread.
        typer.Exit: With 1 if the deployment would not run here.
    """
    console = make_console()
    model_dir = resolve_model(deployment.model)
    config = load_model_config(model_dir)
    checkpoint = inspect_checkpoint(model_dir)
    machine = this_machine()
    device = local_device(deployment.layout.device)
    head, head_problems = _find_head(deployment, config)
    plan = plan_deployment(
        deployment,
        config,
        machine,
        device=device,
        dtype=torch_dtype(choose_dtype(deployment.engine.dtype, device, config)),
        has_other_nodes="RAY_ADDRESS" in os.environ,
        plain=checkpoint.plain,
        head=head,
    )
    _print_checkpoint(model_dir, checkpoint, console)
    _print_drafts(deployment, model_dir, head, plan, console)
    _print_plan(deployment, plan, machine, console)
    _print_image_fetch(deployment.serving, console)
    problems = [
        *([checkpoint.problem] if checkpoint.problem else []),
        *head_problems,
        *_tokenizer_problems(deployment, model_dir, config),
        *plan.problems,
        *_port_problems(deployment),
        *_print_certificate(deployment.serving, console),
        *_access_problems(deployment),
    ]
    _print_verdict(plan, problems, console)
    if problems:
        raise typer.Exit(1)


def _find_head(
    deployment: DeploymentConfig, config: ModelConfig
) -> tuple[DraftHead | None, list[str]]:
    """The draft head, or why there is none where one is asked for."""
    try:
        return configured_head(deployment.engine, config), []
    except (ConfigError, CheckpointError) as error:
        return None, [f"draft head: {error}"]


def _access_problems(deployment: DeploymentConfig) -> list[str]:
    try:
        check_access(deployment)
    except ConfigError as error:
        return [str(error)]
    return []


def _tokenizer_problems(
    deployment: DeploymentConfig, model_dir: Path, config: ModelConfig
) -> list[str]:
    try:
        PromptBuilder(model_dir, deployment.reasoning).serves_images(config.vision)
    except ConfigError as error:
        return [str(error)]
    return []


def _port_problems(deployment: DeploymentConfig) -> list[str]:
    return [
        f"port {port} on {deployment.serving.host} is taken by another process: "
        f"stop it or set serving.{name}"
        for name, port in taken_ports(deployment.serving).items()
    ]


# ---- what is said


def _print_certificate(serving: ServingConfig, console: Console) -> list[str]:
    """Write whom the certificate is for; the problem if there is one."""
    if serving.tls is None:
        return []
    try:
        certificate = read_certificate(serving.tls)
    except ConfigError as error:
        return [str(error)]
    _say(console, "TLS", "\n".join(AnnouncedFaces(serving, certificate).tls_lines()))
    return []


def _print_image_fetch(serving: ServingConfig, console: Console) -> None:
    if serving.image_fetch is not None:
        hosts = ", ".join(serving.image_fetch.allowed_hosts).replace("*.", "any under ")
        hosts = "any public host" if "*" in serving.image_fetch.allowed_hosts else hosts
        _say(console, "images", f"fetched over https from {hosts}, where a request names their URL")


def _print_checkpoint(model_dir: Path, checkpoint: Inspection, console: Console) -> None:
    config, groups = checkpoint.config, checkpoint.groups
    _say(console, "checkpoint", str(model_dir))
    _say(
        console,
        "",
        f"{config.architecture}, {config.num_layers} layers, {config.num_experts_per_token} of "
        f"{config.num_experts} experts per token, {config.max_context} tokens of context",
    )
    if groups:
        state = "incomplete or broken, see below" if checkpoint.problem else "complete"
        precisions = dict.fromkeys(name for group in groups for name in group.precisions)
        _say(
            console,
            "",
            f"{format_count(checkpoint.num_parameters())} parameters, "
            f"{sum(group.num_tensors for group in groups)} tensors in {' and '.join(precisions)}, "
            f"{format_bytes(checkpoint.num_bytes())}; {state}",
        )


def _print_drafts(
    deployment: DeploymentConfig,
    model_dir: Path,
    head: DraftHead | None,
    plan: DeploymentPlan,
    console: Console,
) -> None:
    _say(console, "drafts", describe_drafts(deployment.engine.speculation, model_dir))
    if head is None:
        return
    per_token = cached_token_bytes(head.config, plan.cache_dtype)
    num_layers = head.config.num_layers
    num_bytes = draft_head_bytes(head, plan.device, plan.dtype)
    _say(
        console,
        "draft head",
        f"{head.directory}: {num_layers} {'layer' if num_layers == 1 else 'layers'}, "
        f"{format_bytes(num_bytes)} on every attention shard and {format_bytes(per_token)} of its "
        f"cache per token",
    )


def _print_plan(
    deployment: DeploymentConfig, plan: DeploymentPlan, machine: Machine, console: Console
) -> None:
    dtype = str(plan.dtype).removeprefix("torch.")
    if plan.precision is not WeightFormat.PLAIN:
        dtype += f" with {plan.precision.value} weights"
    _say(console, "layout", f"{describe_layout(deployment)}; {plan.device}, {dtype}")
    host = machine.host
    gpus = f", {len(machine.gpus)} x {machine.gpu_name}" if machine.gpus else ", no GPU"
    _say(
        console,
        "machine",
        f"{format_bytes(host.free_bytes)} of {format_bytes(host.total_bytes)} memory free, "
        f"{machine.num_cores} cores{gpus}",
    )
    console.print(_rank_table(plan))
    rank = plan.ranks[0]
    per_token = rank.page_bytes / rank.page_size
    held = " in FP8" if plan.cache_dtype == FP8_ROWS else ""
    text = f"{format_bytes(per_token)} per token{held}, {rank.page_size} tokens a page"
    _say(console, "cache", text)


def _rank_table(plan: DeploymentPlan) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    table.add_column("rank", justify="right")
    table.add_column("role", no_wrap=True)
    for title in ("experts", "weights", "cache", "pages", "tokens", "together"):
        table.add_column(title, justify="right", no_wrap=True)
    if plan.device == "cuda":
        table.add_column("may fill", justify="right", no_wrap=True)
    for rank in plan.ranks:
        budget = "?" if rank.budget_bytes is None else format_bytes(max(rank.budget_bytes, 0))
        row = [str(rank.rank), rank.role, *_rank_cells(rank)]
        table.add_row(*row, *([budget] if plan.device == "cuda" else []))
    return table


def _rank_cells(rank: RankPlan) -> list[str]:
    experts = str(rank.num_experts) if rank.num_experts else "-"
    weights = format_bytes(rank.weight_bytes)
    if rank.num_pages == 0:
        return [experts, weights, "-", "-", "-", weights]
    if rank.num_pages is None:
        return [experts, weights, "?", "?", "?", f"{weights} + cache"]
    return [
        experts,
        weights,
        format_bytes(rank.cache_bytes()),
        str(rank.num_pages),
        str(rank.num_cached_tokens()),
        format_bytes(rank.need_bytes()),
    ]


def _print_verdict(plan: DeploymentPlan, problems: list[str], console: Console) -> None:
    for note in plan.notes:
        _say(console, "note", note)
    if not problems:
        console.print(Text("It fits.", "bold green"))
        return
    for problem in problems:
        _say(console, "problem", problem, style="bold red")
    console.print(Text("It would not run here.", "bold red"))


def _say(console: Console, title: str, text: str, style: str = "bold") -> None:
    """One titled paragraph, wrapped beside its title."""
    grid = Table.grid(padding=0)
    grid.add_column(width=_TITLE_WIDTH)
    grid.add_column()
    grid.add_row(Text(title, style), Text(text))
    console.print(grid)
