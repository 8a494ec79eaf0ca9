"""What a cell counts over its epochs, and what a shard counts of its steps."""

from __future__ import annotations

import pytest

from ostro.actors import counts_pool
from ostro.actors.cell_totals import CellTotals
from ostro.actors.counts_pool import CountsPool
from ostro.actors.engine.stages import STAGES, step_stages
from ostro.actors.engine.step import ShardLoad
from ostro.actors.fabric.local_exchange import ExchangeCounters
from ostro.actors.stage_counts import StageCounts


def test_epochs_add_up_and_the_moment_is_the_last_ones() -> None:
    earlier = CellTotals(
        {0: ShardLoad(num_running=5, num_output_tokens=10), 1: ShardLoad(num_prompt_tokens=7)},
        {"forward": 2.0, "experts: compute": 1.0},
        4,
    )
    later = CellTotals({0: ShardLoad(num_running=1, num_output_tokens=3)}, {"forward": 0.5}, 2)
    both = earlier.then(later)
    assert both.loads == {
        0: ShardLoad(num_running=1, num_output_tokens=13),
        1: ShardLoad(num_prompt_tokens=7),
    }
    assert both.seconds == {"forward": 2.5, "experts: compute": 1.0}
    assert both.num_steps == 6


def test_drafts_of_epochs_add_up_by_position() -> None:
    earlier = ShardLoad(num_drafted=(5, 2), num_accepted=(3, 0))
    later = ShardLoad(num_drafted=(4, 4, 4), num_accepted=(4, 2, 1))
    both = CellTotals({0: earlier}).then(CellTotals({0: later})).loads[0]
    assert (both.num_drafted, both.num_accepted) == ((9, 6, 4), (7, 2, 1))


def test_a_shard_at_rest_keeps_its_totals_and_frees_its_pages() -> None:
    load = ShardLoad(
        num_running=2, num_waiting=1, num_waiting_tokens=9, num_pages=8, num_prompt_tokens=7
    )
    assert load.at_rest() == ShardLoad(num_free_pages=8, num_pages=8, num_prompt_tokens=7)


def test_stages_worked_example() -> None:
    counted = {"forward": 5.0, "attention": 1.0, "combine": 3.0, "wait": 2.0, "add": 1.0}
    stages = step_stages({**counted, "sample": 1.0})
    told = {"attention": 1.0, "experts": 2.0, "combine": 1.0, "forward": 1.0, "sample": 1.0}
    assert stages == {**dict.fromkeys(STAGES, 0.0), **told}


def test_stages_share_no_time_and_miss_none() -> None:
    counters = ExchangeCounters()
    decoder = {"attention": 1.0, "gate": 0.5, "dispatch": 0.25, "combine": 3.0, "head": 0.125}
    decoder_seconds = dict.fromkeys(decoder, 0.0)
    counts = StageCounts(decoder_seconds, counters)
    decoder_seconds.update(decoder)
    counts.host.update(plan=1.0, forward=6.0, sample=2.0, deliver=4.0)
    counters.wait_s, counters.experts_s = 1.5, 0.5
    stages = counts.by_stage()
    assert stages["combine"] == 1.0
    assert sum(stages.values()) == pytest.approx(1.0 + 6.0 + 2.0 + 4.0)


def test_an_epochs_counts_begin_at_zero_though_the_decoder_lives_on() -> None:
    decoder = {"attention": 7.0}
    counts = StageCounts(decoder, ExchangeCounters())
    decoder["attention"] += 1.0
    assert counts.counted()["attention"] == 1.0


def test_adding_up_never_falls_where_a_rank_waits_outside_of_it() -> None:
    decoder, counters = {"combine": 0.0}, ExchangeCounters()
    counts = StageCounts(decoder, counters)
    decoder["combine"] = 2.0
    assert counts.counted()["add"] == 2.0
    counters.wait_s = 1.0
    assert counts.counted()["add"] == 2.0


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def test_replicas_long_gone_are_forgotten_and_what_they_counted_is_not() -> None:
    clock, series = Clock(), ("requests", "")
    pool = CountsPool(clock)
    pool.take("stays", {series: 1.0})
    for number in range(3):
        pool.take(str(number), {series: 2.0})
        pool.leave(str(number))
        clock.now_s += counts_pool._GONE_S / 2
    pool.leave("never told anything")
    assert set(pool._told) == {"stays", "2"}
    assert pool.total() == {series: 7.0}


def test_many_replicas_that_are_gone_take_bounded_room() -> None:
    pool, series = CountsPool(Clock()), ("requests", "")
    pool.take("stays", {series: 1.0})
    for number in range(counts_pool._MAX_GONE + 10):
        pool.take(str(number), {series: 1.0})
        pool.leave(str(number))
    assert len(pool._told) == 1 + counts_pool._MAX_GONE
    assert {"stays", str(counts_pool._MAX_GONE + 9)} <= set(pool._told)
    assert pool.total() == {series: 11.0 + counts_pool._MAX_GONE}


def test_a_replica_that_lost_its_connection_alone_is_not_counted_twice() -> None:
    clock, series = Clock(), ("requests", "")
    pool = CountsPool(clock)
    pool.take("a", {series: 5.0})
    pool.leave("a")
    clock.now_s += counts_pool._GONE_S - 1
    pool.take("a", {series: 6.0})
    clock.now_s += 2
    pool.take("a", {series: 7.0})
    assert pool.total() == {series: 7.0}
