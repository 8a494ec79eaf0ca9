"""What is told of ranks that answer, never answered, and answer no more."""

from __future__ import annotations

import asyncio

import pytest

from ostro.actors import health_book
from ostro.actors.errors import ShardLostError
from ostro.actors.health_book import HealthBook
from ostro.actors.rank import RankHealth, RankState
from ostro.configs.deployment import Layout, LayoutConfig

LAYOUT = LayoutConfig(layout=Layout.SPLIT, num_attention_shards=1, num_expert_shards=1)


class FakePeer:
    """Answers only while it is up."""

    def __init__(self, name: str, rank: int) -> None:
        self.name, self.rank, self.is_up = name, rank, False
        self.started_at_s = 0.0

    async def health(self, *, timeout_s: float) -> RankHealth:
        if not self.is_up:
            raise ShardLostError(f"{self.name} does not answer")
        return RankHealth(
            rank=self.rank,
            role="expert",
            state=RankState.READY,
            epoch=1,
            node_id="n",
            device="cpu",
            load_progress=1.0,
            memory_used_bytes=1,
            memory_total_bytes=2,
            peak_memory_bytes=1,
            num_steps=0,
            started_at_s=self.started_at_s,
            stage_seconds={},
        )


def test_a_rank_is_lost_only_once_it_has_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health_book, "_FRESH_S", 0.0)
    peers = [FakePeer("attention", 0), FakePeer("expert", 1)]
    book = HealthBook(LAYOUT, peers)

    async def states() -> list[str]:
        return [status.state for status in await book.statuses()]

    async def run() -> list[list[str]]:
        seen = [await states()]
        peers[1].is_up = True
        seen.append(await states())
        peers[1].is_up = False
        seen.append(await states())
        return seen

    assert asyncio.run(run()) == [["starting"] * 2, ["starting", "ready"], ["starting", "lost"]]


def test_new_processes_of_a_rank_are_counted_and_not_forgotten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(health_book, "_FRESH_S", 0.0)
    peers = [FakePeer("attention", 0), FakePeer("expert", 1)]
    peers[1].is_up = True
    book = HealthBook(LAYOUT, peers)

    async def run() -> list[int]:
        seen = []
        for started_at_s, is_up in ((1.0, True), (1.0, True), (2.0, True), (2.0, False)):
            peers[1].started_at_s, peers[1].is_up = started_at_s, is_up
            seen.append((await book.statuses())[1].num_restarts)
        return seen

    assert asyncio.run(run()) == [0, 0, 1, 1]
