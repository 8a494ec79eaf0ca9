"""`ostro bench engine`: its options, its checks and its table."""

from __future__ import annotations

import importlib.util
from typing import Annotated

import typer

from ostro.cluster.bench_figures import STAGE_UNIT, to_table, write_json
from ostro.cluster.bench_options import LAYOUTS, Checkpoint, Json, Rounds, parse_counts
from ostro.cluster.bench_progress import shown_progress
from ostro.cluster.bench_workload import Workload, context_workloads, prefill_workloads
from ostro.cluster.cli_console import make_console, plain_errors
from ostro.cluster.ray_environment import prepare_environment


@plain_errors()
def engine(  # noqa: PLR0913  each is an option
    model: Checkpoint,
    layout: Annotated[
        list[str],
        typer.Option(help=f"{LAYOUTS}; repeat to compare."),
    ] = ["single"],  # noqa: B006  typer copies it
    batch: Annotated[str, typer.Option(help="Batch sizes, by commas; '' for none.")] = "1,8",
    prefill: Annotated[str, typer.Option(help="Lengths of one long prompt, by commas.")] = "",
    context: Annotated[
        str, typer.Option(help="Decode after so many tokens of context, by commas.")
    ] = "",
    prompt_tokens: Annotated[int, typer.Option(min=2, help="Of each request of a batch.")] = 128,
    new_tokens: Annotated[int, typer.Option(min=4, help="Of each request.")] = 64,
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "bfloat16",
    beside: Annotated[str, typer.Option(help="transformers, or nothing.")] = "",
    rounds: Rounds = 3,
    stages: Annotated[bool, typer.Option("--stages", help="Tell where each step goes.")] = False,
    json: Json = None,
) -> None:
    """Decode, prefill and first-token speed of a cell without ingress.

    With --beside transformers each layout takes turns with it, and ratios are to its figures in the
    same rounds; without, they are to the first layout.
    """
    if beside and (beside != "transformers" or importlib.util.find_spec(beside) is None):
        raise typer.BadParameter(
            f"{beside!r}: only transformers, and it must be installed", param_hint="--beside"
        )
    workloads = [
        *(
            Workload(batch=size, prompt_tokens=prompt_tokens, new_tokens=new_tokens)
            for size in parse_counts(batch, "--batch")
        ),
        *prefill_workloads(parse_counts(prefill, "--prefill")),
        *context_workloads(parse_counts(context, "--context"), new_tokens),
    ]
    if not workloads:
        raise typer.BadParameter("none of --batch, --prefill and --context asks for anything")
    prepare_environment()
    from ostro.cluster.bench_engine import (
        ANCHOR,
        anchor_subject,
        measure_engine,
        ostro_subject,
        parse_layout,
    )

    with shown_progress() as progress:
        figures = measure_engine(
            model,
            [parse_layout(text) for text in layout],
            layout,
            workloads,
            rounds=rounds,
            dtype=dtype,
            beside_transformers=bool(beside),
            note=progress.note,
        )
    anchor, anchor_of = ostro_subject(layout[0]), None
    if beside:
        anchor = ANCHOR
        anchor_of = {ostro_subject(name): anchor_subject(name) for name in layout}
    shown = [figure for figure in figures if stages or figure.unit != STAGE_UNIT]
    make_console().print(to_table("Engine", shown, anchor=anchor, anchor_of=anchor_of))
    if json is not None:
        write_json(json, figures, model=model.name, layouts=layout)
