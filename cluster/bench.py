"""`ostro bench`: measure servers, the engine, the faces, the scheduler and a GPU's kernels.

Tables are for people; `--json` writes the same figures for machines.
Figures are medians over rounds that interleave what is compared, so a noisy machine hits all alike.
Torch and Ray are imported when a command that needs them runs; `serve` and `scheduler` do not.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from ostro.cluster.bench_command_engine import engine
from ostro.cluster.bench_command_gateway import gateway
from ostro.cluster.bench_command_h200 import h200
from ostro.cluster.bench_command_kernels import kernels
from ostro.cluster.bench_command_scheduler import scheduler
from ostro.cluster.bench_command_serve import serve
from ostro.cluster.bench_command_speculation import speculation
from ostro.cluster.bench_figures import to_table, write_json
from ostro.cluster.bench_options import Checkpoint, Json, Rounds, parse_counts
from ostro.cluster.bench_progress import shown_progress
from ostro.cluster.cli_console import make_console, plain_errors
from ostro.cluster.ray_environment import prepare_environment
from ostro.cluster.tekken import write_tekken
from ostro.configs.errors import ConfigError
from ostro.configs.load import load_deployment

app = typer.Typer(
    help="Measure servers, the engine, the faces, the scheduler and kernels, side by side.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(serve)
app.command()(engine)
app.command()(speculation)
app.command()(gateway)
app.command()(scheduler)
app.command()(kernels)
app.command()(h200)
_console = make_console()


def _cache_dir() -> Path:
    """Where Ostro keeps what it can make again."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "ostro"


@app.command()
@plain_errors()
def checkpoint(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="Where it goes; made if need be.")
    ],
    size: Annotated[str, typer.Option(help="mid (0.9 B parameters) or tiny.")] = "mid",
    seed: Annotated[int, typer.Option(help="Same seed, same bytes.")] = 0,
    draft_head: Annotated[
        bool,
        typer.Option("--draft-head", help="Write a draft head for it too, into DIR/eagle."),
    ] = False,
) -> None:
    """Write a seeded random checkpoint to measure with; it says nothing sensible."""
    from ostro.actors.model.random_checkpoint import (
        MID,
        TINY,
        write_random_checkpoint,
        write_random_head,
    )
    from ostro.configs.model import load_model_config

    shapes = {"mid": MID, "tiny": TINY}
    if size not in shapes:
        raise typer.BadParameter(
            f"{size!r}: must be one of {', '.join(shapes)}", param_hint="--size"
        )
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{directory}: {error.strerror or error}") from None
    with _console.status(f"writing {size} to {directory}"):
        write_random_checkpoint(directory, shapes[size], seed)
        write_tekken(directory / "tekken.json", shapes[size].vocab_size)
        if draft_head:
            config = load_model_config(directory)
            write_random_head(directory / "eagle", shapes[size], config, seed=seed)


@app.command()
@plain_errors()
def faces(
    model: Checkpoint,
    preset: Annotated[str, typer.Option(help="Preset or deployment file.")] = "laptop_single",
    concurrency: Annotated[str, typer.Option(help="Concurrent requests, by commas.")] = "1,16",
    prompt_tokens: Annotated[int, typer.Option(min=2, help="Of each request.")] = 128,
    new_tokens: Annotated[int, typer.Option(min=2, help="Of each request.")] = 32,
    rounds: Rounds = 3,
    json: Json = None,
) -> None:
    """What HTTP and gRPC add to the bare engine's first token, and what throughput they keep."""
    prepare_environment()
    from ostro.cluster.bench_face_calls import Face
    from ostro.cluster.bench_faces import measure_faces

    deployment = load_deployment(preset, [f"model={model}", "engine.prefix_cache=false"])
    with shown_progress() as progress:
        figures = measure_faces(
            deployment,
            model,
            concurrencies=parse_counts(concurrency, "--concurrency"),
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            rounds=rounds,
            progress=progress,
        )
    _console.print(to_table("Faces", figures, anchor=Face.ENGINE))
    if json is not None:
        write_json(json, figures, model=model.name, preset=preset)


@app.command()
@plain_errors()
def quick(
    json: Annotated[
        Path | None, typer.Option("--json", help="Write each table's figures into this folder.")
    ] = None,
) -> None:
    """A short run of all of it on the mid checkpoint, which is made in the cache if need be."""
    mid = _cache_dir() / "mid"
    if not (mid / "model.safetensors").exists():
        checkpoint(mid)
    if json is not None:
        json.mkdir(parents=True, exist_ok=True)

    def told(name: str) -> Path | None:
        return None if json is None else json / f"{name}.json"

    _say("Scheduler: what planning a step costs the host, and what a step leaves in memory.")
    scheduler("16,256", steps=200, rounds=1, json=told("scheduler"))
    _say(
        "Engine: tokens per second of a batch, of a prefill and after a long context, without "
        "HTTP or gRPC; one process beside one attention and two expert shards."
    )
    layouts = ["single", "split:1:2"]
    engine(mid, layouts, prefill="1024", context="1024", rounds=1, json=told("engine"))
    _say(
        "Gateway: what HTTP and gRPC add to the first token of an engine that computes nothing, "
        "the tokens per second they carry, and the longest wait between a stream's tokens."
    )
    gateway(concurrency="1,16", streams=64, rounds=1, json=told("gateway"))
    _say(
        "Faces: the same requests straight into a real engine, over HTTP and over gRPC; what they "
        "add to the first token, and how much of the throughput they keep."
    )
    faces(mid, rounds=1, json=told("faces"))
    _say(
        "Serving: what callers of the HTTP API see, one at a time, eight at a time and two a "
        "second; goodput is the share whose first token comes within a second."
    )
    with _served("laptop_single", mid) as url:
        serve(
            url,
            mid.name,
            concurrency="1,8",
            request_rate="2",
            requests=16,
            rounds=1,
            slo_ttft_ms=1000.0,
            json=told("serve"),
        )


@contextmanager
def _served(preset: str, model: Path) -> Iterator[str]:
    """A deployment behind HTTP while the block runs; its URL."""
    prepare_environment()
    from ostro.cluster.launch import launch

    deployment = load_deployment(preset, [f"model={model}"])
    with _console.status("starting"):
        cluster = launch(deployment, model)
    try:
        yield f"http://127.0.0.1:{deployment.serving.http_port}"
    finally:
        cluster.stop()


def _say(text: str) -> None:
    """A table's introduction."""
    _console.print(text, markup=False)
