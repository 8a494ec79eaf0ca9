"""Real processes are killed or stopped: the failure is named, and the cell mends itself."""

import asyncio
import signal

import pytest
from local_cell import local_cell

from ostro.actors.engine.request import GenerationRequest, SamplingParams, StopParams
from ostro.actors.errors import NotReadyError, ShardLostError
from ostro.cluster.cell_metrics import CellCollector
from ostro.configs.deployment import DeploymentConfig, EngineConfig, Layout, LayoutConfig


def deployment(step_timeout_s=60.0):
    return DeploymentConfig(
        model="tiny",
        layout=LayoutConfig(
            layout=Layout.SPLIT,
            num_attention_shards=1,
            num_expert_shards=2,
            step_timeout_s=step_timeout_s,
        ),
        engine=EngineConfig(page_size=8, num_pages=1024, num_threads=1),
    )


def request(name, num_new):
    return GenerationRequest(
        request_id=name,
        prompt_token_ids=[100, 101, 102],
        sampling=SamplingParams(),
        stop=StopParams(max_tokens=num_new, ignore_eos=True),
    )


def tokens(events):
    """Of all events: a busy reader finds several tokens in one."""
    return [token_id for event in events for token_id in event.token_ids]


TOKENS = ("ostro_generation_tokens_total", ("tiny", "0"))


def counters(state):
    """Every counter of the cell that is served, by name and labels."""
    collector = CellCollector("tiny", expert_layers=True)
    collector.state = state
    return {
        (sample.name, tuple(sample.labels.values())): sample.value
        for family in collector.collect()
        if family.type == "counter"
        for sample in family.samples
    }


async def until_served(cell, name):
    """Ask again until the mended cell answers, as a client does."""
    async with asyncio.timeout(180):
        for attempt in range(10_000):
            try:
                return await cell.generate(request(f"{name}-{attempt}", 4))
            except (NotReadyError, ShardLostError):
                await asyncio.sleep(0.1)
    raise AssertionError


@pytest.mark.parametrize(
    ("rank", "name"), [(2, "expert-2"), (0, "attention-0")], ids=["expert", "attention"]
)
def test_a_killed_rank_is_named_and_the_cell_serves_again(pool, model_dir, rank, name):
    async def run():
        async with local_cell(pool, deployment(), model_dir) as cell:
            before = await cell.generate(request("before", 4))
            stream = cell.client.submit(request("victim", 3000))
            async for _ in stream:
                break
            counted = counters(await cell.client.state())
            cell.peers[rank].kill()
            async with asyncio.timeout(60):
                with pytest.raises(ShardLostError) as lost:
                    async for _ in stream:
                        pass
            after = await until_served(cell, "after")
            state = await cell.client.state()
            return before, lost.value, after, counted, state

    before, lost, after, counted, state = asyncio.run(run())
    assert name in lost.message
    assert lost.retry_after_s
    assert tokens(after) == tokens(before)
    assert state.epoch >= 1
    assert counted[TOKENS] > len(tokens(before))
    recounted = counters(state)
    assert {series for series, value in counted.items() if recounted[series] < value} == set()
    assert {actor.actor_id: actor.num_restarts for actor in state.actors}[name] == 1


def test_a_stopped_rank_fails_the_step_within_its_deadline(pool, model_dir):
    async def run():
        async with local_cell(pool, deployment(step_timeout_s=2.0), model_dir) as cell:
            stream = cell.client.submit(request("victim", 3000))
            async for _ in stream:
                break
            cell.peers[1].kill(signal.SIGSTOP)
            async with asyncio.timeout(60):
                with pytest.raises(ShardLostError, match="expert-1"):
                    async for _ in stream:
                        pass
            await until_served(cell, "after")

    asyncio.run(run())


def test_a_failed_epoch_frees_all_of_its_requests(pool, model_dir):
    async def run():
        async with local_cell(pool, deployment(), model_dir) as cell:
            streams = [asyncio.create_task(cell.generate(request(f"v{i}", 3000))) for i in range(6)]
            while (await cell.client.state()).loads[0].num_running < 6:
                await asyncio.sleep(0.02)
            cell.peers[1].kill()
            ends = await asyncio.gather(*streams, return_exceptions=True)
            await until_served(cell, "after")
            return ends, (await cell.client.state()).loads[0]

    ends, load = asyncio.run(run())
    assert all(isinstance(end, ShardLostError) for end in ends)
    assert load.num_running == 0


def test_a_rank_that_hangs_while_idle_is_named_when_a_request_comes(pool, model_dir):
    async def run():
        async with local_cell(pool, deployment(step_timeout_s=2.0), model_dir) as cell:
            await cell.generate(request("before", 4))
            cell.peers[0].kill(signal.SIGSTOP)
            async with asyncio.timeout(60):
                with pytest.raises(ShardLostError, match="attention-0"):
                    await cell.generate(request("victim", 4))
            await until_served(cell, "after")

    asyncio.run(run())


def test_start_again_leaves_a_healthy_cell_alone(pool, model_dir):
    async def run():
        async with local_cell(pool, deployment(), model_dir) as cell:
            await cell.router.start()
            await cell.generate(request("one", 4))
            return await cell.client.state()

    assert asyncio.run(run()).epoch == 0
