"""`ostro bench`: measure the engine and the faces, side by side in one run.

Tables are for people; `--json` writes the same figures for machines.
Figures are medians over rounds that interleave what is compared, so a noisy machine hits all alike.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from ostro.cluster.bench_command_engine import engine
from ostro.cluster.bench_command_gateway import gateway
from ostro.cluster.bench_command_scheduler import scheduler
from ostro.cluster.bench_command_serve import serve
from ostro.cluster.bench_figures import to_table, write_json
from ostro.cluster.bench_options import Checkpoint, Json, Rounds, parse_counts
from ostro.cluster.bench_progress import shown_progress
from ostro.cluster.bench_workload import Workload
from ostro.cluster.cli_console import make_console, plain_errors
from ostro.cluster.ray_environment import prepare_environment
from ostro.cluster.tekken import write_tekken
from ostro.configs.load import load_deployment

app = typer.Typer(
    help="Measure servers, the engine, the faces and the scheduler, side by side.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(serve)
app.command()(engine)
app.command()(gateway)
app.command()(scheduler)
_console = make_console()


def _cache_dir() -> Path:
    """Where Ostro keeps what it can make again."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "ostro"


@app.command()
def checkpoint(
    directory: Path,
    size: Annotated[str, typer.Option(help="mid (0.9 B parameters) or tiny.")] = "mid",
    seed: Annotated[int, typer.Option(help="Same seed, same bytes.")] = 0,
) -> None:
    """Write a seeded random checkpoint to measure with; it says nothing sensible."""
    from ostro.actors.model.random_checkpoint import MID, TINY, write_random_checkpoint

    shapes = {"mid": MID, "tiny": TINY}
    if size not in shapes:
        raise typer.BadParameter(f"{size!r}: must be one of {', '.join(shapes)}", param_hint="size")
    directory.mkdir(parents=True, exist_ok=True)
    with _console.status(f"writing {size} to {directory}"):
        write_random_checkpoint(directory, shapes[size], seed)
        write_tekken(directory / "tekken.json", shapes[size].vocab_size)


@app.command()
@plain_errors()
def faces(
    model: Checkpoint,
    preset: Annotated[str, typer.Option(help="Preset or deployment file.")] = "laptop_single",
    concurrency: Annotated[str, typer.Option(help="Concurrent requests, by commas.")] = "1,16",
    prompt_tokens: Annotated[int, typer.Option(min=2)] = 128,
    new_tokens: Annotated[int, typer.Option(min=2)] = 32,
    rounds: Rounds = 3,
    json: Json = None,
) -> None:
    """What HTTP and gRPC add to the bare engine's first token, and what throughput they keep."""
    prepare_environment()
    from ostro.cluster.bench_faces import BARE, measure_faces

    deployment = load_deployment(preset, [f"model={model}", "engine.prefix_cache=false"])
    with shown_progress() as progress:
        figures = measure_faces(
            deployment,
            model,
            concurrencies=parse_counts(concurrency, "--concurrency"),
            workload=Workload(batch=8, prompt_tokens=prompt_tokens, new_tokens=new_tokens),
            rounds=rounds,
            note=progress.note,
        )
    _console.print(to_table("Faces", figures, anchor=BARE))
    if json is not None:
        write_json(json, figures, model=model.name, preset=preset)


@app.command()
def quick() -> None:
    """A short run of all of it on the mid checkpoint, which is made in the cache if need be."""
    mid = _cache_dir() / "mid"
    if not (mid / "model.safetensors").exists():
        checkpoint(mid)
    _console.print(
        "Engine: tokens per second of a batch that decodes together, and the time to its first\n"
        "token, without HTTP or gRPC; one process beside one attention and two expert shards."
    )
    engine(mid, ["single", "split:1:2"], rounds=1)
    _console.print(
        "Faces: the same requests straight into the engine, over HTTP and over gRPC; what they\n"
        "add to the first token, and how much of the throughput they keep."
    )
    faces(mid, rounds=1)
