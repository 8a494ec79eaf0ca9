"""`ostro bench scheduler`: its options and its tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer
from rich.table import Table

from ostro.cluster.bench_figures import to_table, write_json
from ostro.cluster.bench_options import Json, Rounds, parse_counts
from ostro.cluster.bench_progress import shown_progress
from ostro.cluster.bench_scheduler import ProfileLine, Scenario, measure_scheduler, profile_steps
from ostro.cluster.cli_console import make_console

_PROFILE_LINES = 15


def scheduler(
    running: Annotated[str, typer.Option(help="Running requests, by commas.")] = (
        "1,16,64,256,1000"
    ),
    steps: Annotated[int, typer.Option(min=1, help="Steps of each round.")] = 300,
    rounds: Rounds = 3,
    profile: Annotated[
        bool, typer.Option("--profile", help="Tell where a step goes, at the most requests.")
    ] = False,
    json: Json = None,
) -> None:
    """Host time of the production scheduler per step: add, schedule and complete.

    Without a model and without Ray. "growth" is what a step leaves behind in memory: the output
    itself in pure decode, nothing where requests come and go. "peak" is what it takes meanwhile.
    """
    sizes = parse_counts(running, "--running")
    if not sizes:
        raise typer.BadParameter("names no number", param_hint="--running")
    console = make_console()
    with shown_progress(len(sizes) * len(Scenario)) as progress:
        figures = measure_scheduler(sizes, num_steps=steps, rounds=rounds, progress=progress)
    console.print(to_table("Scheduler", figures, anchor=None))
    if profile:
        for scenario in Scenario:
            lines = profile_steps(scenario, max(sizes), steps)
            console.print(_profile_table(f"{scenario.value}, {max(sizes)} running", lines))
    if json is not None:
        write_json(json, figures, steps=steps)


def _profile_table(title: str, lines: Sequence[ProfileLine]) -> Table:
    table = Table(title=title)
    for name in ("function", "calls per step", "own us per step"):
        table.add_column(name, justify="left" if name == "function" else "right")
    for line in lines[:_PROFILE_LINES]:
        table.add_row(line.function, f"{line.calls_per_step:.1f}", f"{line.own_us_per_step:.1f}")
    return table
