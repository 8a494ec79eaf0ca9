"""`ostro bench`: measure the engine and the faces, side by side in one run.

Tables are for people; `--json` writes the same figures for machines.
Figures are medians over rounds that interleave what is compared, so a noisy machine hits all alike.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ostro.cluster.bench_command_gateway import gateway
from ostro.cluster.bench_command_scheduler import scheduler
from ostro.cluster.bench_command_serve import serve
from ostro.cluster.bench_figures import STAGE_UNIT, to_table, write_json
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
app.command()(gateway)
app.command()(scheduler)
_console = Console()


def _cache_dir() -> Path:
    """Where Ostro keeps what it can make again."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "ostro"


_Json = Annotated[Path | None, typer.Option("--json", help="Write the figures here as JSON.")]
_Model = Annotated[Path, typer.Option("--model", help="Checkpoint directory.")]
_Rounds = Annotated[int, typer.Option(min=1, help="Rounds; medians are reported.")]


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
def engine(  # noqa: PLR0913  each is an option
    model: _Model,
    layout: Annotated[
        list[str], typer.Option(help="single, colocated:N or split:A:E; repeat to compare.")
    ] = ["single"],  # noqa: B006  typer copies it
    batch: Annotated[str, typer.Option(help="Batch sizes, by commas.")] = "1,8",
    prompt_tokens: Annotated[int, typer.Option(min=2)] = 128,
    new_tokens: Annotated[int, typer.Option(min=4)] = 64,
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "bfloat16",
    beside: Annotated[str, typer.Option(help="transformers, or nothing.")] = "",
    rounds: _Rounds = 3,
    stages: Annotated[bool, typer.Option("--stages", help="Tell where each step goes.")] = False,
    json: _Json = None,
) -> None:
    """Decode and first-token speed of a cell without ingress."""
    if beside and (beside != "transformers" or importlib.util.find_spec(beside) is None):
        raise typer.BadParameter(
            f"{beside!r}: only transformers, and it must be installed", param_hint="beside"
        )
    prepare_environment()
    from ostro.cluster.bench_engine import Workload, measure_engine, parse_layout

    workloads = [
        Workload(batch=int(size), prompt_tokens=prompt_tokens, new_tokens=new_tokens)
        for size in batch.split(",")
    ]
    with _console.status("starting") as status:
        figures = measure_engine(
            model,
            [parse_layout(text) for text in layout],
            layout,
            workloads,
            rounds=rounds,
            dtype=dtype,
            beside_transformers=bool(beside),
            note=status.update,
        )
    shown = [figure for figure in figures if stages or figure.unit != STAGE_UNIT]
    _console.print(to_table("Engine", shown, anchor=f"ostro {layout[0]}"))
    if json is not None:
        write_json(json, figures, model=model.name, layouts=layout)


@app.command()
def faces(
    model: _Model,
    preset: Annotated[str, typer.Option(help="Preset or deployment file.")] = "laptop_single",
    concurrency: Annotated[str, typer.Option(help="Concurrent requests, by commas.")] = "1,16",
    prompt_tokens: Annotated[int, typer.Option(min=2)] = 128,
    new_tokens: Annotated[int, typer.Option(min=2)] = 32,
    rounds: _Rounds = 3,
    json: _Json = None,
) -> None:
    """What HTTP and gRPC add to the bare engine's first token, and what throughput they keep."""
    prepare_environment()
    from ostro.cluster.bench_engine import Workload
    from ostro.cluster.bench_faces import BARE, measure_faces

    deployment = load_deployment(preset, [f"model={model}", "engine.prefix_cache=false"])
    with _console.status("starting") as status:
        figures = measure_faces(
            deployment,
            model,
            concurrencies=[int(size) for size in concurrency.split(",")],
            workload=Workload(batch=8, prompt_tokens=prompt_tokens, new_tokens=new_tokens),
            rounds=rounds,
            note=status.update,
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
