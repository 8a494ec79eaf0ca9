"""`ostro bench kernels`: its options and its tables."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from ostro.cluster.bench_options import Json, in_a_folder
from ostro.cluster.bench_progress import shown_progress
from ostro.cluster.cli_console import make_console, print_error

if TYPE_CHECKING:
    from ostro.kernels.bench.report import Report
    from ostro.kernels.bench.run import Result
    from ostro.kernels.bench.trials import Trial

_NUM_SHOWN = 3  # of the fastest configurations of a size
_LEFT = ("operation", "size", "beside", "verdict", "configuration")


def kernels(
    parts: Annotated[
        str, typer.Option(help="What to measure, by commas: all of it, or nothing if empty.")
    ] = "all",
    sweep: Annotated[
        str, typer.Option(help="Whose configurations to try, by commas: all, or none if empty.")
    ] = "",
    pdl: Annotated[
        bool, typer.Option("--pdl", help="Check and time every kernel by dependent launches too.")
    ] = False,
    json: Json = None,
    tuned: Annotated[
        Path | None,
        typer.Option(
            dir_okay=False,
            writable=True,
            callback=in_a_folder,
            help="Write the best tiles here, as kernels/tuned/ has them; needs --sweep.",
        ),
    ] = None,
) -> None:
    """Triton kernels on this GPU: checked against their references, then timed in CUDA graphs.

    "of floor" is the time that the GPU needs at least, by its own copies, sums and matrix products
    of this run, over the time taken; what the cache serves may pass 100 %.
    """
    from ostro.kernels.bench.ceilings import NoGpuError
    from ostro.kernels.bench.report import PARTS, SWEEPS, measure_kernels

    if tuned is not None and not sweep:
        raise typer.BadParameter("needs --sweep: tiles are what it finds", param_hint="--tuned")
    chosen = _chosen(parts, PARTS, "--parts"), _chosen(sweep, SWEEPS, "--sweep")
    console = make_console()
    try:
        with shown_progress() as progress:
            report = measure_kernels(
                *chosen, progress.note, with_pdl=pdl, json_path=json, tuned_path=tuned
            )
    except NoGpuError as error:
        print_error(str(error))
        raise typer.Exit(1) from None
    if report.results:
        console.print(results_table(report))
    if report.trials:
        console.print(trials_table(report.trials))
    for name, failure in report.failures.items():
        print_error(f"{name}: {failure}")
    if not report.is_right():
        raise typer.Exit(1)


def _chosen(text: str, known: Iterable[str], option: str) -> list[str]:
    names = list(known)
    chosen = names if text == "all" else [name for name in text.split(",") if name]
    unknown = [name for name in chosen if name not in names]
    if unknown:
        raise typer.BadParameter(
            f"{unknown[0]!r}: must be all or of {', '.join(names)}", param_hint=option
        )
    return chosen


def results_table(report: Report) -> Table:
    """One row a case."""
    columns = ("operation", "size", "us", "GB/s", "TFLOP/s", "of floor", "error", "verdict")
    table = _table(report.title(), (*columns, "beside"))
    for result in report.results:
        table.add_row(result.operation, result.size, *_cells(result))
    return table


def _cells(result: Result) -> Sequence[str]:
    others = ", ".join(
        f"{name} {us:.1f}" for name, us in result.others_us.items() if not math.isnan(us)
    )
    verdict = "right" if result.is_right else "WRONG"
    if result.failure:
        return "", "", "", "", "", "FAILED", result.failure
    return (
        f"{result.us:.1f}",
        f"{result.gigabytes_s:.0f}",
        f"{result.teraflops:.0f}" if result.teraflops >= 1.0 else "",
        f"{result.share_of_floor():.0%}",
        f"{result.error:.0e}",
        verdict,
        others,
    )


def trials_table(trials: Sequence[Trial]) -> Table:
    """The fastest configurations of each kernel and size."""
    from ostro.kernels.bench.trials import by_time

    table = _table("Fastest configurations", ("operation", "size", "us", "configuration"))
    for group in by_time(trials):
        for trial in group[:_NUM_SHOWN]:
            setting = ", ".join(f"{name} {value}" for name, value in trial.cut.items())
            name = f"{trial.operation} {trial.dtype}"
            table.add_row(name, trial.size, f"{trial.us:.1f}", setting)
    return table


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title)
    for name in columns:
        table.add_column(name, justify="left" if name in _LEFT else "right")
    return table
