"""What `ostro serve` shows while a cell comes up: a live table, or plain lines into a pipe."""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import TracebackType
from typing import Protocol, Self

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from ostro.actors.fabric.messages import ActorStatus, State
from ostro.cluster.human_numbers import format_bytes

STAGES = {
    "ray": "starting Ray",
    "actors": "placing the shards",
    "load": "loading the shards",
    "answer": "waiting for the first answer",
}
STATE_STYLES = {
    "starting": "dim",
    "loading": "yellow",
    "ready": "green",
    "draining": "cyan",
    "lost": "bold red",
}
_BAR_WIDTH = 24
_NODE_CHARS = 8
_LINE_STEP = 0.25  # into a pipe, a shard's progress is told this often


class LoadingView(Protocol):
    """Told of each stage of a launch, and of the cell's state while shards load."""

    def __call__(self, stage: str, state: State | None) -> None:
        """Show it."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...


def loading_view(console: Console, weight_bytes: Mapping[int, int]) -> LoadingView:
    """The view that suits a console.

    Args:
        console: Where to.
        weight_bytes: Bytes that each rank will load.
    """
    if console.is_terminal:
        return LiveLoading(console, weight_bytes)
    return PlainLoading(console, weight_bytes)


class LiveLoading:
    """One table that is drawn anew in place; it stays on the screen when loading ends."""

    def __init__(self, console: Console, weight_bytes: Mapping[int, int]) -> None:
        self._weight_bytes = weight_bytes
        self._stage: Spinner | None = Spinner("dots", Text("starting"))
        self._state: State | None = None
        self._began_s: float | None = None
        self._live = Live(console=console, get_renderable=self._render, refresh_per_second=8)

    def __enter__(self) -> Self:
        self._live.start(refresh=True)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stage = None
        self._live.stop()

    def __call__(self, stage: str, state: State | None) -> None:
        """See `LoadingView`."""
        if state is not None:
            self._state = state
            self._began_s = self._began_s or time.monotonic()
        title = STAGES.get(stage, stage)
        if self._stage is not None:
            self._stage.update(text=Text(f"{title}{self._rate()}"))

    def _rate(self) -> str:
        """How much of all weights is there, how fast it comes, how long it will take yet."""
        total = sum(self._weight_bytes.values())
        if self._state is None or self._began_s is None or not total:
            return ""
        done = sum(_loaded(actor, self._weight_bytes) for actor in self._state.actors)
        text = f", {format_bytes(done)} of {format_bytes(total)}"
        rate = done / max(time.monotonic() - self._began_s, 0.1)
        if 0 < done < total:
            text += f", {format_bytes(rate)}/s, {(total - done) / rate:.0f} s left"
        return text

    def _render(self) -> Group:
        parts: list[Table | Spinner] = []
        if self._state is not None:
            parts.append(_shard_table(self._state, self._weight_bytes))
        if self._stage is not None:
            parts.append(self._stage)
        return Group(*parts)


class PlainLoading:
    """One line for each stage, and for each shard whenever it got visibly further."""

    def __init__(self, console: Console, weight_bytes: Mapping[int, int]) -> None:
        self._console = console
        self._weight_bytes = weight_bytes
        self._stage = ""
        self._told: dict[str, tuple[str, int]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        return

    def __call__(self, stage: str, state: State | None) -> None:
        """See `LoadingView`."""
        if stage != self._stage:
            self._stage = stage
            self._console.print(STAGES.get(stage, stage), markup=False)
        for actor in state.actors if state else ():
            progress = (actor.state, int(actor.load_progress / _LINE_STEP))
            if self._told.get(actor.actor_id) == progress:
                continue
            self._told[actor.actor_id] = progress
            size = format_bytes(self._weight_bytes.get(actor.rank, 0))
            self._console.print(
                f"{actor.actor_id}: {actor.state}, {actor.load_progress:.0%} of {size}",
                markup=False,
            )


def _shard_table(state: State, weight_bytes: Mapping[int, int]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for title in ("shard", "role", "node", "device", "state", ""):
        table.add_column(title, no_wrap=True)
    table.add_column("weights", justify="right", no_wrap=True)
    for actor in state.actors:
        done, total = _loaded(actor, weight_bytes), weight_bytes.get(actor.rank, 0)
        table.add_row(
            actor.actor_id,
            actor.role,
            actor.node_id[:_NODE_CHARS],
            actor.device,
            Text(actor.state, STATE_STYLES.get(actor.state, "")),
            ProgressBar(total=1.0, completed=actor.load_progress, width=_BAR_WIDTH),
            f"{format_bytes(done)} of {format_bytes(total)}",
        )
    return table


def _loaded(actor: ActorStatus, weight_bytes: Mapping[int, int]) -> float:
    return actor.load_progress * weight_bytes.get(actor.rank, 0)
