"""How far a benchmark is: one line on stderr with a bar where the length is known."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.progress import Progress as RichProgress

from ostro.cluster.cli_console import make_console


class Progress:
    """A bar of so many parts.

    Args:
        bar: Shows it.
        total: Parts; None if nobody knows.
    """

    def __init__(self, bar: RichProgress, total: int | None) -> None:
        self._bar = bar
        self._task = bar.add_task("starting", total=total)

    def note(self, text: str) -> None:
        """Say what goes on."""
        self._bar.update(self._task, description=text)

    def advance(self) -> None:
        """One more part is done."""
        self._bar.advance(self._task)


@contextmanager
def shown_progress(total: int | None = None) -> Iterator[Progress]:
    """A bar that is gone when the work is done; nothing where stderr is no terminal."""
    columns = [SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()]
    counting = [BarColumn(), MofNCompleteColumn()] if total is not None else []
    console = make_console(stderr=True)
    with RichProgress(
        *columns, *counting, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        yield Progress(bar, total)
