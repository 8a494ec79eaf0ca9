"""What the router knows of its ranks' health: asked for when it is old, shown for every rank."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Sequence

from ostro.actors.fabric.messages import ActorStatus
from ostro.actors.rank import Peer, RankHealth, RankState
from ostro.configs.deployment import LayoutConfig

_TIMEOUT_S = 2.0
_FRESH_S = 0.5


class HealthBook:
    """Every rank's last account of itself; one that no longer answers is lost.

    One that never did is still on its way: importing torch takes seconds on a busy machine.
    """

    def __init__(self, layout: LayoutConfig, peers: Sequence[Peer]) -> None:
        self._layout = layout
        self._peers = peers
        self._answers: dict[int, RankHealth] = {}
        self._started_s: dict[int, float] = {}  # of those that ever answered
        self._num_restarts: Counter[int] = Counter()
        self._asked_s = -_FRESH_S

    async def latest_epoch(self) -> int:
        """The highest epoch that any rank knows of; -1 if none does."""
        await self.statuses()
        epochs = (health.epoch for health in self._answers.values())
        return max((epoch for epoch in epochs if epoch is not None), default=-1)

    async def statuses(self) -> list[ActorStatus]:
        """All ranks, in rank order."""
        if time.monotonic() - self._asked_s >= _FRESH_S:
            self._asked_s = time.monotonic()
            answers = await asyncio.gather(
                *(peer.health(timeout_s=_TIMEOUT_S) for peer in self._peers),
                return_exceptions=True,
            )
            self._answers = {
                rank: answer
                for rank, answer in enumerate(answers)
                if isinstance(answer, RankHealth)
            }
            self._count_restarts()
        return [self._status(rank) for rank in range(len(self._peers))]

    def _count_restarts(self) -> None:
        for rank, health in self._answers.items():
            before_s = self._started_s.get(rank, health.started_at_s)
            self._num_restarts[rank] += health.started_at_s != before_s
            self._started_s[rank] = health.started_at_s

    def _status(self, rank: int) -> ActorStatus:
        name, health = self._peers[rank].name, self._answers.get(rank)
        if health is None:
            role = "attention" if rank in self._layout.attention_ranks() else "expert"
            state = RankState.LOST if rank in self._started_s else RankState.STARTING
            return ActorStatus(
                name, role, state.value, "", "", rank, 0.0, 0, 0, 0.0, self._num_restarts[rank]
            )
        return ActorStatus(
            actor_id=name,
            role=health.role,
            state=health.state.value,
            node_id=health.node_id,
            device=health.device,
            rank=rank,
            load_progress=health.load_progress,
            memory_used_bytes=health.memory_used_bytes,
            memory_total_bytes=health.memory_total_bytes,
            started_at_s=health.started_at_s,
            num_restarts=self._num_restarts[rank],
        )
