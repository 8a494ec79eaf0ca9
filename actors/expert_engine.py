"""The engine of an expert shard during one epoch: it serves rows as plans arrive."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from ostro.actors.engine.stages import EXPERTS_COMPUTE, EXPERTS_WAIT
from ostro.actors.fabric.channel import ChannelClosedError, SyncConnection
from ostro.actors.fabric.local_exchange import ExchangeCounters
from ostro.actors.fabric.messages import AbortEpoch, ExpertCounts, StepPlan

logger = logging.getLogger(__name__)

_IDLE_WAIT_S = 0.5
_REPORT_EVERY_S = 1.0


class RowServer(Protocol):
    """The expert side of a transport."""

    def begin_step(self, plan: StepPlan) -> None:
        """Make ready for the rows of a plan."""
        ...

    def serve_all(self, num_layers: int) -> None:
        """Serve every layer and micro-batch of the plan."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertParts:
    """What one epoch's engine works with."""

    rank: int
    epoch: int
    server: RowServer
    connection: SyncConnection
    num_layers: int
    take_counts: Callable[[], list[list[int]]]
    counters: ExchangeCounters


class ExpertEngine:
    """What an expert shard does in an epoch; `rank_loop.RankLoop` turns it."""

    def __init__(self, parts: ExpertParts) -> None:
        self._parts = parts
        self._counted = self._is_at_rest = False
        self._reported_s = time.monotonic()
        self.num_steps = 0

    def turn(self) -> None:
        """See `rank_loop.Engine`."""
        message = self._parts.connection.receive(timeout_s=_IDLE_WAIT_S)
        self._is_at_rest = message is None
        if isinstance(message, StepPlan) and message.epoch == self._parts.epoch:
            self._parts.server.begin_step(message)
            self._parts.server.serve_all(self._parts.num_layers)
            self.num_steps += 1
            self._counted = True
        elif isinstance(message, AbortEpoch):
            raise ChannelClosedError(message.reason)
        elif message is not None:
            logger.warning("rank %d: unexpected %s", self._parts.rank, type(message).__name__)
        self._report_counts()

    def is_at_rest(self) -> bool:
        """See `rank_loop.Engine`."""
        return self._is_at_rest

    def _report_counts(self) -> None:
        now_s = time.monotonic()
        if self._counted and now_s - self._reported_s > _REPORT_EVERY_S:
            self._reported_s, self._counted = now_s, False
            parts = self._parts
            rows_LE = parts.take_counts()
            counters = parts.counters
            seconds = {
                EXPERTS_WAIT: counters.wait_s,
                EXPERTS_COMPUTE: counters.experts_s,
            }
            parts.connection.send(ExpertCounts(parts.epoch, parts.rank, rows_LE, seconds))
