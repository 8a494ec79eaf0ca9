"""One epoch as the router runs it: the ranks' connections, the conductor, and the first failure."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence

from ostro.actors.cell_requests import CellRequests
from ostro.actors.cell_totals import CellTotals
from ostro.actors.conductor import Conductor
from ostro.actors.engine.step import ShardLoad
from ostro.actors.errors import ShardLostError
from ostro.actors.fabric.channel import AsyncConnection, ChannelError
from ostro.actors.fabric.messages import (
    AbortEpoch,
    Assign,
    ExpertCounts,
    Message,
    Proposal,
    RankFailed,
    RankHello,
    StepDone,
)
from ostro.actors.fabric.placement import Placement
from ostro.configs.deployment import LayoutConfig

logger = logging.getLogger(__name__)

# A killed rank's own connection closes at once. Where a rank hangs, those that wait for it reach
# their deadlines one after another, and the first to complain may not be the one that waits for it.
_SETTLE_S = 0.2
_SETTLE_ROUNDS = 5

OnFailure = Callable[["RouterEpoch", Sequence[int], str], None]


class RouterEpoch:
    """Serves the step connections of every rank until the epoch is closed or fails.

    `rows_LE` belongs to the router and grows by what expert shards report.
    """

    def __init__(
        self,
        layout: LayoutConfig,
        *,
        number: int,
        placement: Placement,
        rows_LE: list[list[int]],
        requests: CellRequests,
        on_failure: OnFailure,
    ) -> None:
        self.number = number
        self.serving = False
        self.token_addresses: dict[int, str] = {}
        self._layout = layout
        self._placement = placement
        self._rows_LE = rows_LE
        self._requests = requests
        self._on_failure = on_failure
        self._conductor = Conductor(layout, epoch=number, placement_version=placement.version)
        self._connections: dict[int, AsyncConnection] = {}
        self._num_steps = 0
        self._loads = {rank: ShardLoad() for rank in layout.attention_ranks()}
        self._seconds: dict[int, dict[str, float]] = {}
        self._here = asyncio.Event()
        self._closed = False
        self._heard_s = dict.fromkeys(layout.attention_ranks(), time.monotonic())
        self._accused: list[tuple[int, str]] = []
        self._fell_silent: list[int] = []
        self._explained: set[int] = set()
        self._settling: asyncio.Task[None] | None = None

    async def all_here(self, timeout_s: float) -> None:
        """Wait until every rank has connected.

        Raises:
            ShardLostError: Some did not in time; the message names them.
        """
        try:
            await asyncio.wait_for(self._here.wait(), timeout_s)
        except TimeoutError:
            missing = sorted(set(range(self._layout.world_size())) - set(self._connections))
            raise ShardLostError(
                f"ranks {missing} did not connect to the router within {timeout_s:.0f} s"
            ) from None
        if self._closed or self._settling is not None:
            raise ShardLostError(f"epoch {self.number} ended as it began: {self._accused}")
        self.serving = True

    async def serve_rank(self, connection: AsyncConnection, hello: RankHello) -> None:
        """Take a rank's messages until its connection ends."""
        self._connections[hello.rank] = connection
        if hello.token_address is not None:
            self.token_addresses[hello.rank] = hello.token_address
        if len(self._connections) == self._layout.world_size():
            self._here.set()
        try:
            while (message := await connection.receive()) is not None:
                self._take(message)
        except ChannelError:
            logger.info("rank %d closed its step connection", hello.rank)
        if hello.rank not in self._explained:
            self._fell_silent.append(hello.rank)
            self._suspect(hello.rank, "its step connection closed")

    def send(self, rank: int, message: Message) -> None:
        """Send to a rank; one that is gone is noticed by its own connection."""
        connection = self._connections.get(rank)
        if connection is not None:
            connection.send(message)
        if isinstance(message, Assign):
            is_first = self._requests.num_live(rank) == message.request.num_choices
            if is_first:
                self._heard_s[rank] = time.monotonic()

    def check_overdue(self, timeout_s: float) -> None:
        """Fail the epoch if a step, or a rank that has requests, is silent for `timeout_s`."""
        if self._closed or not self.serving:
            return
        now_s = time.monotonic()
        overdue = self._conductor.overdue(now_s=now_s, timeout_s=timeout_s)
        for rank in overdue[1] if overdue else ():
            self._suspect(rank, f"its step did not end within {timeout_s:.0f} s")
        for rank, heard_s in self._heard_s.items():
            owes = self._requests.num_live(rank) and not self._conductor.waits_for_plan(rank)
            if owes and now_s - heard_s > timeout_s:
                self._suspect(rank, f"it has requests and said nothing for {timeout_s:.0f} s")

    def totals(self) -> CellTotals:
        """What the epoch has done so far; once closed, it has no requests any more."""
        seconds: dict[str, float] = {}
        for of_rank in self._seconds.values():
            for stage, value in of_rank.items():
                seconds[stage] = seconds.get(stage, 0.0) + value
        loads = self._loads
        if self._closed:
            loads = {rank: load.at_rest() for rank, load in loads.items()}
        return CellTotals(loads, seconds, self._num_steps)

    def close(self) -> None:
        """End the epoch for every rank."""
        self._closed, self.serving = True, False
        for rank, connection in self._connections.items():
            self.send(rank, AbortEpoch(self.number, "the router closed the epoch"))
            connection.close()

    def _take(self, message: Message) -> None:
        if getattr(message, "epoch", None) != self.number or self._closed:
            return
        match message:
            case Proposal(rank=rank, num_tokens=num_tokens):
                self._heard_s[rank] = time.monotonic()
                self._conductor.propose(rank, num_tokens)
                self._plan()
            case StepDone():
                self._step_done(message)
            case ExpertCounts():
                self._count(message)
            case RankFailed(rank=rank, suspect=suspect, reason=reason):
                self._explained.add(rank)
                self._suspect(rank if suspect is None else suspect, f"rank {rank}: {reason}")
            case _:
                logger.warning("a rank sent %s", type(message).__name__)

    def _plan(self) -> None:
        while (plan := self._conductor.next_plan(now_s=time.monotonic())) is not None:
            for rank in self._conductor.takes_part(plan):
                self.send(rank, plan)

    def _step_done(self, report: StepDone) -> None:
        now_s = time.monotonic()
        self._requests.follow(report, elapsed_s=now_s - self._heard_s[report.rank])
        self._heard_s[report.rank] = now_s
        self._loads[report.rank] = report.load
        self._seconds[report.rank] = report.seconds
        if report.step is not None:
            self._num_steps = max(self._num_steps, report.step + 1)
            self._conductor.done(report.rank, report.step, now_s=now_s)
            self._plan()

    def _count(self, report: ExpertCounts) -> None:
        logical = self._placement.local_to_logical(report.rank)
        for total_E, rows_E in zip(self._rows_LE, report.rows_LE, strict=True):
            for expert, rows in zip(logical, rows_E, strict=True):
                total_E[expert] += rows
        if report.seconds:
            self._seconds[report.rank] = report.seconds

    def _suspect(self, rank: int, reason: str) -> None:
        """Note a failure; the verdict waits a moment so that the right rank is named."""
        if self._closed:
            return
        self.serving = False
        self._accused.append((rank, reason))
        if self._settling is None:
            self._settling = asyncio.get_running_loop().create_task(self._settle())

    async def _settle(self) -> None:
        for _ in range(_SETTLE_ROUNDS):
            await asyncio.sleep(_SETTLE_S)
            if self._fell_silent:
                break
        if self._closed:
            return
        # A rank that could still complain is alive: it was waiting for the one that is lost.
        mute = [rank for rank, _ in self._accused if rank not in self._explained]
        lost = sorted(set(self._fell_silent)) or mute[:1] or [self._accused[0][0]]
        reason = next((why for rank, why in self._accused if rank in lost), self._accused[0][1])
        self._on_failure(self, lost, reason)
