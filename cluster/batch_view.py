"""How far a batch is: a bar in a terminal, a line now and then into a pipe."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

from ostro.cluster.batch_run import BatchProgress
from ostro.cluster.human_numbers import format_seconds

_BAR_PERIOD_S = 0.25
_LINE_PERIOD_S = 10.0


def told(progress: BatchProgress, num_bytes: int = 0) -> str:
    """What there is to tell of a batch of so many bytes.

    Example:
        "120 done, 3 failed, 398 tok/s, 2 min 5 s left"
    """
    parts = [f"{progress.num_done:,} done", f"{progress.num_failed:,} failed"]
    if progress.num_skipped:
        parts.append(f"{progress.num_skipped:,} were there already")
    if progress.num_failed_before:
        parts.append(f"{progress.num_failed_before:,} had failed before")
    parts.append(f"{progress.tokens_per_second():.0f} tok/s")
    left_s = progress.time_left_s(num_bytes)
    if left_s is not None:
        parts.append(f"{format_seconds(left_s)} left")
    return ", ".join(parts)


@asynccontextmanager
async def shown(progress: BatchProgress, num_bytes: int, console: Console) -> AsyncIterator[None]:
    """Show how far it is while the body runs.

    Args:
        progress: Looked at from time to time.
        num_bytes: Of the batch; 0 if nobody knows.
        console: Where to.
    """
    show = _show_bar if console.is_terminal else _show_lines
    task = asyncio.create_task(show(progress, num_bytes, console))
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])


async def _show_bar(progress: BatchProgress, num_bytes: int, console: Console) -> None:
    columns = (BarColumn(), TaskProgressColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=num_bytes or None)
        while True:
            text = told(progress, num_bytes)
            bar.update(task, completed=progress.read_bytes, description=text)
            await asyncio.sleep(_BAR_PERIOD_S)


async def _show_lines(progress: BatchProgress, num_bytes: int, console: Console) -> None:
    while True:
        await asyncio.sleep(_LINE_PERIOD_S)
        console.print(told(progress, num_bytes))
