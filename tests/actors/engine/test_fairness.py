"""Tenants share by tokens: who is next, who gives way, and what a flood does to its neighbours."""

from __future__ import annotations

from dataclasses import replace

import pytest
from engine_fakes import FakeDevice, make_request
from hypothesis import given
from hypothesis import strategies as st

from ostro.actors.engine.fairness import TenantShares, WaitingQueue
from ostro.actors.engine.request import RequestProgress, RequestState
from ostro.actors.engine.request_pages import RequestPages
from ostro.actors.engine.scheduler import Scheduler
from ostro.configs.deployment import EngineConfig


def _progress(
    arrival: int, scheduling_class: int = 0, num_tokens: int = 3, tenant: str = ""
) -> RequestProgress:
    request = make_request(
        prompt=[5] * num_tokens, scheduling_class=scheduling_class, tenant=tenant
    )
    progress = RequestProgress(request, arrived_s=0.0)
    progress.arrival = arrival
    return progress


def _drain(queue: WaitingQueue) -> list[RequestProgress]:
    order = []
    while queue:
        order.append(queue.first())
        queue.remove(queue.first())
    return order


def test_requests_of_one_tenant_go_by_class_and_then_by_arrival() -> None:
    queue = WaitingQueue(TenantShares())
    for progress in (first := _progress(1, 1), second := _progress(3), third := _progress(2)):
        queue.add(progress)
    assert _drain(queue) == [third, second, first]


def test_queue_counts_the_prompt_tokens_that_wait() -> None:
    queue = WaitingQueue(TenantShares())
    queue.add(_progress(1, num_tokens=3))
    queue.add(middle := _progress(2, num_tokens=5, tenant="b"))
    queue.add(_progress(3, num_tokens=7, tenant="b"))
    newcomer = _progress(4, num_tokens=9, tenant="b")
    assert queue.beside(newcomer) == (3, 15, 9, (2, 12))
    queue.remove(middle)
    assert queue.beside(newcomer) == (2, 10, 9, (1, 7))
    assert queue.beside(_progress(5, num_tokens=9)) == (2, 10, 9, (0, 0))


def test_the_tenant_that_had_least_is_next_whatever_its_class() -> None:
    shares = TenantShares()
    queue = WaitingQueue(shares)
    for tenant in ("a", "b"):
        shares.enter(tenant)
    queue.add(urgent := _progress(1, -1000, tenant="a"))
    queue.add(patient := _progress(2, 2, tenant="b"))
    shares.charge("a", 10)
    assert _drain(queue) == [patient, urgent]


def test_who_comes_back_has_saved_nothing_up() -> None:
    shares = TenantShares()
    queue = WaitingQueue(shares)
    for tenant in ("a", "b"):
        shares.enter(tenant)
    queue.add(_progress(1, tenant="a"))
    shares.charge("a", 100)
    queue.add(_progress(2, tenant="b"))
    assert shares.level("b") == 100


def test_a_tenant_beyond_its_share_gives_way_with_its_youngest() -> None:
    shares = TenantShares()
    running = [_progress(i, tenant="a") for i in range(3)] + [_progress(9, tenant="b")]
    for tenant in ("a", "b"):
        shares.enter(tenant)
    newcomer = _progress(10, tenant="b")
    assert shares.victim_for_place(newcomer, running) is running[2]
    assert shares.victim_for_place(_progress(11, tenant="a"), running) is None  # has its share
    assert shares.victim_for_place(newcomer, running[2:]) is None  # nobody is beyond
    shares.enter("c")
    assert shares.victim_for_place(newcomer, running) is None  # would be beyond its own


def test_nobody_loses_a_last_request() -> None:
    shares = TenantShares()
    for tenant in ("a", "b"):
        shares.enter(tenant)
    pages = RequestPages(10, 1, prefix_cache=False)
    running = [_progress(1, tenant="a", num_tokens=9)]
    pages.grow(running[0], 9)
    newcomer = _progress(2, tenant="b")
    assert shares.victim_for_pages(newcomer, running, pages) is None
    running.append(_progress(3, tenant="a"))
    assert shares.victim_for_pages(newcomer, running, pages) is running[1]


def test_counters_of_tenants_that_left_are_not_kept_for_ever() -> None:
    shares = TenantShares()
    shares.enter("stays")
    shares.charge("stays", 7)
    for i in range(3000):
        shares.enter(str(i))
        shares.charge(str(i), 1)
        shares.leave(str(i))
    assert len(shares._counters) < 2000
    assert shares.level("stays") == 7


_CONFIG = EngineConfig(
    page_size=4,
    num_pages=64,
    max_tokens_per_step=32,
    max_running_requests=4,
    prefix_cache=False,
)


class _Shard:
    """A scheduler and its device, turned by hand."""

    def __init__(self, config: EngineConfig) -> None:
        assert config.num_pages is not None
        self.scheduler = Scheduler(config, config.num_pages, 10_000)
        self._device = FakeDevice(config.page_size)
        self.outputs: dict[str, int] = {}

    def add(self, name: str, tenant: str, num_tokens: int = 8, max_tokens: int = 16) -> None:
        request = make_request(
            name, prompt=[5] * num_tokens, max_tokens=max_tokens, tenant=tenant, ignore_eos=True
        )
        self.scheduler.add(RequestProgress(request, arrived_s=0.0))

    def step(self) -> None:
        step = self.scheduler.schedule()
        if step is None:
            return
        self._device.run(step, self.scheduler)
        for event in self.scheduler.complete(step):
            done = self.outputs.get(event.request_id, 0)
            self.outputs[event.request_id] = done + len(event.token_ids)

    def steps_until(self, name: str, limit: int = 200) -> int:
        for num_steps in range(1, limit):
            self.step()
            if self.outputs.get(name):
                return num_steps
        raise AssertionError(f"{name} got no token in {limit} steps")


@pytest.mark.parametrize("flood", [8, 64])
def test_a_flood_does_not_delay_the_first_token_of_another_tenant(flood: int) -> None:
    shard = _Shard(_CONFIG)
    for i in range(flood):
        shard.add(f"flood-{i}", "a", max_tokens=200)
    for _ in range(3):
        shard.step()
    shard.add("other", "b")
    assert shard.steps_until("other") <= 3
    shard.scheduler.check_integrity()


def test_without_tenants_the_same_flood_goes_first() -> None:
    shard = _Shard(_CONFIG)
    for i in range(8):
        shard.add(f"flood-{i}", "", max_tokens=30)
    for _ in range(3):
        shard.step()
    shard.add("other", "")
    assert shard.steps_until("other") > 30


def test_a_flood_of_long_prompts_does_not_hold_up_a_short_one() -> None:
    shard = _Shard(replace(_CONFIG, num_pages=4096))
    for i in range(4):
        shard.add(f"flood-{i}", "a", num_tokens=2000)
    shard.step()
    shard.add("other", "b")
    assert shard.steps_until("other") <= 3


def test_no_tokens_are_kept_for_a_request_that_finds_no_place() -> None:
    shard = _Shard(replace(_CONFIG, max_running_requests=2, num_pages=512))
    shard.add("first", "a", num_tokens=320)
    shard.add("second", "b", num_tokens=320)
    shard.step()
    shard.add("other", "c", num_tokens=64)  # had least, and fills a step by itself
    assert shard.steps_until("first") <= 2 * 320 // 32
    assert shard.steps_until("other") <= 2 * 320 // 32 + 20


def _steps_beside_a_full_cache(tenant: str) -> int:
    shard = _Shard(replace(_CONFIG, max_running_requests=32))
    for i in range(16):
        shard.add(f"flood-{i}", "a", num_tokens=16, max_tokens=200)
    for _ in range(8):
        shard.step()
    shard.add("other", tenant, num_tokens=64)
    num_steps = shard.steps_until("other", limit=2000)
    shard.scheduler.check_integrity()
    return num_steps


def test_a_cache_full_of_one_tenants_pages_makes_room() -> None:
    assert 20 * _steps_beside_a_full_cache("b") < _steps_beside_a_full_cache("a")


def test_two_floods_get_the_same_number_of_tokens() -> None:
    shard = _Shard(_CONFIG)
    for i in range(12):
        shard.add(f"a-{i}", "a", num_tokens=30, max_tokens=4)  # mostly prompt
    for i in range(48):
        shard.add(f"b-{i}", "b", num_tokens=2, max_tokens=8)  # mostly output
    had = {"a": 0, "b": 0}
    while all(any(n.startswith(t) for n in shard.scheduler._roster._requests) for t in had):
        step = shard.scheduler.schedule()
        if step is None:
            break
        for entry in step.entries:
            # A token of output counts twice.
            had[entry.progress.request.tenant] += entry.num_tokens + entry.samples
        shard._device.run(step, shard.scheduler)
        shard.scheduler.complete(step)
    assert had["a"] == pytest.approx(had["b"], rel=0.35)


def test_what_a_tenant_had_long_ago_is_made_up_by_what_another_has_alone() -> None:
    shard = _Shard(replace(_CONFIG, num_pages=512))
    shard.add("light", "a", max_tokens=500)
    for i in range(20):
        shard.add(f"heavy-{i}", "b", num_tokens=64, max_tokens=4)
    shard.steps_until("heavy-19", limit=500)
    for _ in range(4):  # until it ends
        shard.step()
    for i in range(40):
        shard.add(f"alone-{i}", "a", num_tokens=64, max_tokens=4)
    shard.steps_until("alone-39", limit=500)
    for i in range(40):
        shard.add(f"again-{i}", "a", num_tokens=64)
    shard.add("back", "b", num_tokens=64)
    assert shard.steps_until("back") <= 12


@given(
    lives=st.lists(
        st.tuples(st.sampled_from("abc"), st.integers(1, 40), st.integers(1, 12)),
        min_size=1,
        max_size=24,
    ),
    num_pages=st.integers(14, 40),
    max_running=st.integers(1, 4),
    max_tokens_per_step=st.sampled_from([4, 32]),
)
def test_everybody_is_served_whoever_comes(
    lives: list[tuple[str, int, int]], num_pages: int, max_running: int, max_tokens_per_step: int
) -> None:
    config = replace(_CONFIG, max_tokens_per_step=max_tokens_per_step)
    shard = _Shard(replace(config, num_pages=num_pages, max_running_requests=max_running))
    for i, (tenant, num_tokens, max_tokens) in enumerate(lives):
        shard.add(str(i), tenant, num_tokens, max_tokens)
        if i % 3 == 0:
            shard.step()
    for _ in range(3000):
        if shard.scheduler.is_idle():
            break
        shard.step()
    assert shard.scheduler.is_idle()
    assert shard.outputs == {str(i): life[2] for i, life in enumerate(lives)}
    shard.scheduler.check_integrity()
    assert not [p for p in shard.scheduler._running if p.state is RequestState.RUNNING]
