"""`ostro weights`: what a checkpoint is, and how it becomes another layout or precision."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table
from rich.text import Text

from ostro.cluster.cli_console import make_console, plain_errors
from ostro.cluster.cli_signals import signals_interrupt
from ostro.cluster.human_numbers import format_bytes, format_count
from ostro.configs.checkpoint_layout import CheckpointLayout, find_layout
from ostro.configs.model import ModelConfig
from ostro.configs.quantization import WeightFormat

if TYPE_CHECKING:
    from ostro.actors.model.inspection import Inspection

_LISTED = 10  # names of each kind that are shown without --all
_GB = 10**9
_LAYOUT_NAMES = {
    CheckpointLayout.HUGGING_FACE: "Hugging Face's layout",
    CheckpointLayout.MISTRAL: "Mistral's own layout",
}

app = typer.Typer(
    name="weights",
    help="Look into a checkpoint; turn it into another layout or precision.",
    no_args_is_help=True,
)


@app.command()
@plain_errors()
def inspect(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="A checkpoint's directory, or a draft head's.")
    ],
    show_all: Annotated[bool, typer.Option("--all", help="List every tensor at fault.")] = False,
) -> None:
    """Tell what a checkpoint or a draft head is, reading its config and headers alone.

    Exit code 1 if it would not load.

    For example:

    ostro weights inspect /models/Mistral-Small-4-119B-2603
    """
    from ostro.actors.model.inspection import inspect_checkpoint

    inspection = inspect_checkpoint(directory)
    console = make_console()
    _print_headline(directory, inspection, console)
    if inspection.groups:
        console.print(_group_table(inspection))
    for title, names in (
        ("missing", inspection.missing),
        ("unknown", inspection.unknown),
        ("not as the config says", inspection.misfits),
        ("known and not served", inspection.ignored),
    ):
        _print_names(title, names, len(names) if show_all else _LISTED, console)
    if inspection.problem is None:
        console.print(Text("It would load.", "bold green"))
        return
    if not (inspection.missing or inspection.unknown or inspection.misfits):
        console.print(Text(inspection.problem), soft_wrap=True)
    console.print(Text("It would not load.", "bold red"))
    raise typer.Exit(1)


@app.command()
@plain_errors()
def convert(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="The checkpoint there is.")],
    target: Annotated[Path, typer.Argument(metavar="DST", help="The directory to make.")],
    layout: Annotated[
        CheckpointLayout | None, typer.Option(help="Names and config; unchanged without it.")
    ] = None,
    precision: Annotated[
        WeightFormat | None, typer.Option(help="Of the large weights; unchanged without it.")
    ] = None,
    max_shard_gb: Annotated[
        float,
        typer.Option(
            min=0.001, max=1e6, help="Larger checkpoints are cut into files of this size."
        ),
    ] = 5.0,
) -> None:
    """Write a checkpoint in another layout or precision, with every other file that is in SRC.

    Weights that are in the wanted precision keep their bytes. The rest is rounded anew, without
    calibration: such fp8 and nvfp4 weights bring no scales for their inputs. So are gate and up of
    an fp8 expert where the layout has one scale for both and SRC has two. Folders in SRC stay
    behind. Interrupted, it leaves nothing.

    For example:

    ostro weights convert Mistral-Small-4-119B-2603 small4-bf16 --layout hf --precision bf16
    ostro weights convert Mistral-Small-4-119B-2603 small4-hf --layout hf
    """
    from ostro.actors.model.conversion import plan_conversion
    from ostro.actors.model.converted_checkpoint import write_conversion
    from ostro.configs.model import load_model_config

    wanted = precision or _weight_format(load_model_config(source))
    plan = plan_conversion(source, layout or find_layout(source), wanted)
    with signals_interrupt(), _progress() as progress:
        task = progress.add_task(target.name, total=plan.num_bytes())
        write_conversion(
            plan,
            target,
            progress=lambda num_bytes: progress.advance(task, num_bytes),
            max_shard_bytes=int(max_shard_gb * _GB),
        )
    make_console().print(
        f"{target}: {wanted.value}, {_LAYOUT_NAMES[plan.layout]}, {format_bytes(plan.num_bytes())}",
        soft_wrap=True,
    )


def _describe(config: ModelConfig) -> str:
    if config.is_draft_head():
        return (
            f"a draft head of {config.num_layers} layers without experts, for a model of hidden "
            f"size {config.hidden_size} and {config.vocab_size} tokens"
        )
    return (
        f"{config.num_layers} layers, {config.num_experts_per_token} of {config.num_experts} "
        f"experts per token, {'images and text' if config.vision else 'text alone'}"
    )


def _weight_format(config: ModelConfig) -> WeightFormat:
    declared = config.quantization
    return WeightFormat.PLAIN if declared is None else declared.weight_format


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=make_console(stderr=True),
    )


def _print_headline(directory: Path, inspection: Inspection, console: Console) -> None:
    config, layout = inspection.config, inspection.layout
    declared = config.quantization
    scales = "with" if declared and declared.has_input_scales else "without"
    precision = _weight_format(config).value + (f" {scales} scales for inputs" if declared else "")
    lines = [
        f"{directory}: {_LAYOUT_NAMES[layout]}, {config.architecture}",
        _describe(config),
        f"{layout.config_name} declares {precision}; {inspection.num_files} files of weights",
    ]
    if inspection.other is not None:
        lines.append(
            f"{_LAYOUT_NAMES[inspection.other]} is here too and is not read; move "
            f"{layout.config_name} away to have it read"
        )
    for line in lines:
        console.print(Text(line), soft_wrap=True)


def _group_table(inspection: Inspection) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold", show_footer=True)
    table.add_column("weights", "together")
    table.add_column("precision", no_wrap=True)
    for title, total in (
        ("tensors", str(sum(group.num_tensors for group in inspection.groups))),
        ("parameters", format_count(inspection.num_parameters())),
        ("size", format_bytes(inspection.num_bytes())),
    ):
        table.add_column(title, total, justify="right", no_wrap=True)
    for group in inspection.groups:
        table.add_row(
            group.title,
            " and ".join(group.precisions),
            str(group.num_tensors),
            format_count(group.num_parameters),
            format_bytes(group.num_bytes),
        )
    return table


def _print_names(title: str, names: Sequence[str], most: int, console: Console) -> None:
    if not names:
        return
    console.print(Text(f"{len(names)} {title}:", "bold"))
    for name in names[:most]:
        console.print(Text(f"  {name}"), soft_wrap=True)
    if len(names) > most:
        console.print(Text(f"  and {len(names) - most} more; --all lists them", "dim"))
