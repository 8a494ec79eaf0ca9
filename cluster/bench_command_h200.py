"""`ostro bench h200`: its options and its table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.table import Table

from ostro.cluster.bench_options import Json
from ostro.cluster.bench_progress import shown_progress
from ostro.cluster.cli_console import make_console, print_error
from ostro.configs.deployment import EngineConfig
from ostro.configs.quantization import WeightFormat

if TYPE_CHECKING:
    from ostro.cluster.bench_whole_model import StepFigure

_DECODES = "1x1024,8x1024,32x1024,128x1024,245x4096,1x262080"
_PREFILLS = "2048x2048,8192x8192,8192x32768"
_COLUMNS = ("step", "requests", "context", "GPU", "with host", "floor", "of floor", "tokens/s")


def h200(
    decode: Annotated[
        str, typer.Option(help="Decode steps, REQUESTSxCONTEXT by commas; none if empty.")
    ] = _DECODES,
    prefill: Annotated[
        str, typer.Option(help="Prefill chunks, TOKENSxCONTEXT by commas; none if empty.")
    ] = _PREFILLS,
    layers: Annotated[
        int, typer.Option(min=1, max=36, help="Fewer where the GPU does not hold all.")
    ] = 36,
    precision: Annotated[
        str, typer.Option(help="Of the weights, as the official checkpoints have them: fp8, nvfp4.")
    ] = "fp8",
    latent_cache_dtype: Annotated[
        Literal["auto", "fp8"], typer.Option(help="As the key of `engine`.")
    ] = "auto",
    pdl: Annotated[
        bool, typer.Option("--pdl", help="Measure decode steps by dependent launches too.")
    ] = False,
    json: Json = None,
) -> None:
    """All of Mistral Small 4 on one GPU, with random weights: no checkpoint is needed.

    "floor" is what the bytes of a decode step (experts that were hit, everything else once,
    latents) or the FLOPs of a prefill chunk take at the rates that this GPU reached by itself in
    this run. "GPU" replays a step's CUDA graph; "with host" adds inputs, draw and its ids, but no
    scheduler. "PDL" is as "GPU" where kernels start before the one ahead has ended, and what it
    takes of that; if it is less, `"dependent_launch": true` in the GPU's file of kernels/tuned
    switches it on.
    """
    import torch

    from ostro.actors.model.device import choose_cache_dtype
    from ostro.cluster.bench_whole_model import WholeModel, measure, mistral_small_4
    from ostro.kernels.bench.ceilings import NoGpuError, gpu_name, measure_ceilings
    from ostro.kernels.bench.json_text import json_text

    held = parse_precision(precision)
    config = mistral_small_4(layers)
    engine = EngineConfig(latent_cache_dtype=latent_cache_dtype)
    cache_dtype = choose_cache_dtype(engine, torch.bfloat16, config)
    decodes = parse_sizes(decode, "--decode")
    prefills = parse_sizes(prefill, "--prefill")
    try:
        device = gpu_name()
    except NoGpuError as error:
        print_error(str(error))
        raise typer.Exit(1) from None
    figures: list[StepFigure] = []
    is_whole = True
    with shown_progress() as progress:
        progress.note("ceilings")
        ceilings = measure_ceilings()
        progress.note(f"{layers} layers of random {precision} weights")
        places = cache_tokens(decodes, prefills)
        try:
            model = WholeModel(config, cache_tokens=places, cache_dtype=cache_dtype, precision=held)
            for figure in measure(model, ceilings, decodes, prefills, with_pdl=pdl):
                figures.append(figure)
                progress.note(f"{figure.kind} {figure.num_tokens} at {figure.context}")
        except torch.OutOfMemoryError:
            is_whole = False
    latents = engine.cached_in("bfloat16")
    if figures:
        title = f"{device}, {layers} layers, {precision.upper()}, latents in {latents}"
        make_console().print(to_table(title, figures))
    if json is not None:
        tree = {
            "device": device,
            "layers": layers,
            "precision": precision,
            "latents": latents,
            "ceilings": asdict(ceilings),
            "figures": [asdict(figure) for figure in figures],
        }
        json.write_text(json_text(tree))
    if not is_whole:
        what = "the next size" if figures else "it"
        print_error(f"{device} does not hold {what}; try fewer --layers or smaller contexts")
        raise typer.Exit(1)


def cache_tokens(decodes: Sequence[tuple[int, int]], prefills: Sequence[tuple[int, int]]) -> int:
    """Places in the cache that the largest step needs, each request on pages of its own."""
    from ostro.cluster.bench_whole_model import PAGE_SIZE

    steps = [(requests, context) for requests, context in decodes]
    steps += [(1, context) for _, context in prefills]
    return max((requests * (context + PAGE_SIZE) for requests, context in steps), default=0)


def parse_precision(text: str) -> WeightFormat:
    """The precision of a name.

    Raises:
        typer.BadParameter: It is no precision that fits a GPU with all layers.
    """
    served = {each.value: each for each in (WeightFormat.FP8, WeightFormat.NVFP4)}
    if text not in served:
        raise typer.BadParameter(f"{text!r}: must be fp8 or nvfp4", param_hint="--precision")
    return served[text]


def parse_sizes(text: str, option: str) -> list[tuple[int, int]]:
    """Pairs from "1x1024,8x1024"; nothing from "".

    Raises:
        typer.BadParameter: It is something else.
    """
    sizes = []
    for part in text.split(","):
        first, mark, second = part.partition("x")
        if not part:
            continue
        if not (mark and first.isdecimal() and second.isdecimal() and int(first) and int(second)):
            raise typer.BadParameter(
                f"{part!r}: must be two numbers such as 8x1024", param_hint=option
            )
        sizes.append((int(first), int(second)))
    return sizes


def to_table(title: str, figures: Sequence[StepFigure]) -> Table:
    """One row a step."""
    table = Table(title=title)
    with_pdl = any(figure.pdl_ms is not None for figure in figures)
    for name in (*_COLUMNS, *("PDL",) * with_pdl):
        table.add_column(name, justify="left" if name == "step" else "right")
    for figure in figures:
        table.add_row(
            f"{figure.kind} {figure.num_tokens}",
            str(figure.num_requests),
            f"{figure.context:,}",
            f"{figure.graph_ms:.2f} ms",
            f"{figure.step_ms:.2f} ms",
            f"{figure.floor_ms:.2f} ms",
            f"{figure.floor_ms / figure.graph_ms:.0%}",
            f"{figure.tokens_per_s():,.0f}",
            *(_pdl_cell(figure),) * with_pdl,
        )
    return table


def _pdl_cell(figure: StepFigure) -> str:
    if figure.pdl_ms is None:
        return ""
    if math.isnan(figure.pdl_ms):
        return "other logits"
    return f"{figure.pdl_ms:.2f} ms ({figure.pdl_ms / figure.graph_ms:.2f})"
