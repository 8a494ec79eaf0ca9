"""What several ingress replicas count together, whichever of them is scraped."""

from __future__ import annotations

import asyncio
from itertools import pairwise

import pytest
from prometheus_client.parser import text_string_to_metric_families
from scripted_frontend import FINISHED, MODEL, STARTED, ScriptedFrontend

from ostro.actors.counts_pool import CountsPool
from ostro.actors.errors import NotReadyError
from ostro.actors.fabric.messages import AskCounts, PooledCounts, ReplicaCounts, decode, encode
from ostro.cluster import metrics as metrics_module
from ostro.cluster.cell_client import CellClient
from ostro.cluster.generation import ChatGeneration
from ostro.cluster.metrics import Metrics

Samples = dict[tuple[str, frozenset], float]


class Exchange:
    """A replica's way to the pool, over the wire's own encoding."""

    def __init__(self, pool: CountsPool, name: str) -> None:
        self.pool, self.name, self.is_up = pool, name, True

    def tell_counts(self, counts) -> None:
        if self.is_up:
            self.pool.take(self.name, decode(encode(ReplicaCounts(counts))).counts)

    async def pooled_counts(self):
        if not self.is_up:
            raise NotReadyError("no router")
        return decode(encode(PooledCounts(1, self.pool.total()))).counts


class Replica:
    """Metrics of one replica that shares a pool with others."""

    def __init__(self, pool: CountsPool, name: str) -> None:
        self.metrics, self.exchange = Metrics(MODEL), Exchange(pool, name)
        self.metrics.share(self.exchange)

    async def serve(self, num_requests: int) -> None:
        for _ in range(num_requests):
            events = ScriptedFrontend(STARTED, FINISHED).chat(ChatGeneration(messages=()))
            async for _ in self.metrics.watch(events):
                pass

    async def scrape(self) -> Samples:
        text = (await self.metrics.render(None)).decode()
        return {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }


def successes(samples: Samples) -> float:
    labels = {"model_name": MODEL, "finished_reason": "stop"}
    return samples.get(("ostro_request_success_total", frozenset(labels.items())), 0.0)


def test_every_replica_tells_of_all_and_no_count_ever_falls():
    async def run() -> list[Samples]:
        pool = CountsPool()
        one, two = Replica(pool, "one"), Replica(pool, "two")
        seen = []
        for serving, scraped in ((one, two), (two, one), (one, one), (two, two), (one, two)):
            await serving.serve(2)
            await serving.metrics._replicas.tell()
            seen.append(await scraped.scrape())
        return seen

    seen = asyncio.run(run())
    assert [successes(samples) for samples in seen] == [2, 4, 6, 8, 10]
    for before, after in pairwise(seen):
        assert {s for s, value in before.items() if after.get(s, -1.0) < value} == set()


def test_a_scrape_tells_what_its_own_replica_has_just_counted():
    async def run() -> tuple[float, float]:
        pool = CountsPool()
        one, two = Replica(pool, "one"), Replica(pool, "two")
        await one.serve(3)
        return successes(await one.scrape()), successes(await two.scrape())

    assert asyncio.run(run()) == (3, 3)


def test_what_a_replica_counted_outlives_it():
    async def run() -> float:
        pool = CountsPool()
        gone, here = Replica(pool, "gone"), Replica(pool, "here")
        await gone.serve(3)
        await gone.scrape()
        await here.serve(1)
        return successes(await here.scrape())

    assert asyncio.run(run()) == 4


def test_while_nobody_is_reached_the_last_of_the_others_holds():
    async def run() -> list[float]:
        pool = CountsPool()
        one, two = Replica(pool, "one"), Replica(pool, "two")
        await one.serve(3)
        await one.scrape()
        seen = [successes(await two.scrape())]
        two.exchange.is_up = False
        await two.serve(2)
        seen.append(successes(await two.scrape()))
        two.exchange.is_up = True
        await one.serve(1)
        await one.scrape()
        return [*seen, successes(await two.scrape())]

    assert asyncio.run(run()) == [3, 5, 6]


def test_news_are_told_without_a_scrape(monkeypatch):
    monkeypatch.setattr(metrics_module, "_TELL_EVERY_S", 0.001)

    async def run() -> None:
        pool = CountsPool()
        replica = Replica(pool, "one")
        await replica.serve(1)
        async with asyncio.timeout(20):
            while ("ostro_request_success_total", "stop") not in pool.total():
                await asyncio.sleep(0.001)

    asyncio.run(run())


def test_series_of_another_version_are_left_out():
    async def run() -> Samples:
        pool = CountsPool()
        pool.take("newer", {("ostro_request_success_total", "stop", "blue"): 5.0, ("x", "y"): 1.0})
        replica = Replica(pool, "one")
        await replica.serve(1)
        return await replica.scrape()

    assert successes(asyncio.run(run())) == 1


def test_the_pool_adds_what_is_new_however_often_it_is_told():
    pool = CountsPool()
    for counts in ({("a",): 2.0}, {("a",): 2.0}, {("a",): 5.0, ("b",): 1.0}):
        pool.take("one", counts)
    pool.take("two", {("a",): 10.0})
    assert pool.total() == {("a",): 15.0, ("b",): 1.0}
    pool.take("two", {("a",): 1.0})  # it has begun anew: what it had counted stays
    assert pool.total()[("a",)] == 15.0


class FakeRouter:
    """Answers at once."""

    def __init__(self, client: CellClient) -> None:
        self.client, self.pool = client, CountsPool()

    def send(self, message: object) -> bool:
        if isinstance(message, ReplicaCounts):
            self.pool.take("test", message.counts)
        if isinstance(message, AskCounts):
            self.client._take(PooledCounts(message.tag, self.pool.total()))
        return True


def test_the_cells_client_tells_and_asks_the_router():
    async def run() -> dict:
        async def nowhere() -> str:
            raise AssertionError

        client = CellClient(nowhere, b"secret", ingress_id="test", submit_timeout_s=1.0)
        client.tell_counts({("lost",): 1.0})
        with pytest.raises(NotReadyError):
            await client.pooled_counts()
        client._router = FakeRouter(client)  # type: ignore[assignment]
        client.tell_counts({("a", "b"): 2.0})
        return await client.pooled_counts()

    assert asyncio.run(run()) == {("a", "b"): 2.0}
