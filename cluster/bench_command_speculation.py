"""`ostro bench speculation`: its options and its table."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ostro.cluster.bench_figures import to_table, write_json
from ostro.cluster.bench_options import LAYOUTS, Checkpoint, Json, Rounds, parse_counts
from ostro.cluster.bench_progress import shown_progress
from ostro.cluster.cli_console import make_console, plain_errors
from ostro.cluster.model_paths import EMBEDDED, head_beside
from ostro.cluster.ray_environment import prepare_environment


@plain_errors()
def speculation(  # noqa: PLR0913  each is an option
    model: Checkpoint = Path(EMBEDDED),
    subject: Annotated[
        list[str] | None,
        typer.Option(
            "--speculation",
            help="none, ngram, auto (the head that the model brings), eagle:DIR, or a deployment's "
            "engine.speculation such as '{method: ngram, num_draft_tokens: 5, adaptive: false}'; "
            "repeat to compare. Left out, all of none, ngram and auto that there are.",
        ),
    ] = None,
    layout: Annotated[str, typer.Option(help=f"{LAYOUTS}.")] = "single",
    batch: Annotated[str, typer.Option(help="Batch sizes, by commas.")] = "1,8",
    questions: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="Text file, one question a line, asked as chats in turn; without it prompts are "
            "random tokens.",
        ),
    ] = None,
    effort: Annotated[str, typer.Option(help="Of those chats.")] = "high",
    prompt_tokens: Annotated[int, typer.Option(min=2, help="Of a random prompt.")] = 128,
    new_tokens: Annotated[int, typer.Option(min=4, help="Of each request.")] = 64,
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "bfloat16",
    rounds: Rounds = 3,
    json: Json = None,
) -> None:
    """Decode with and without drafts, the same requests for each.

    Every round starts a cell for each --speculation, lets it run all batches once to learn what
    pays, and measures them then. "answers as the first" tells how many answers are the same to the
    last token; where the model computes in bfloat16, other batch shapes round a near tie otherwise.
    """
    batches = parse_counts(batch, "--batch")
    if not batches:
        raise typer.BadParameter("ask for some", param_hint="--batch")
    subjects = subject or ["none", "ngram", *(["auto"] if head_beside(model) else [])]
    prepare_environment()
    from ostro.cluster.bench_engine import parse_layout
    from ostro.cluster.bench_speculation import (
        SpeculationBench,
        measure_speculation,
        question_prompts,
    )

    chats = None
    if questions is not None:
        lines = [line for line in questions.read_text().splitlines() if line.strip()]
        chats = question_prompts(model, lines, effort)
    with shown_progress() as progress:
        bench = SpeculationBench(
            model=model,
            layout=parse_layout(layout),
            batches=batches,
            chats=chats,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            rounds=rounds,
            dtype=dtype,
        )
        figures = measure_speculation(bench, subjects, progress.note)
    make_console().print(to_table("Speculation", figures, anchor=subjects[0]))
    if json is not None:
        write_json(json, figures, model=model.name, layout=layout)
