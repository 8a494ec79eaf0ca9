"""A router that dies: a new one takes over its ranks, whose weights stay loaded."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from local_cell import LocalCell, local_cell

from ostro.actors.engine.request import GenerationRequest, SamplingParams, StopParams, TokenEvent
from ostro.actors.errors import NotReadyError
from ostro.actors.router import Router
from ostro.configs.deployment import DeploymentConfig, EngineConfig, Layout, LayoutConfig

DEPLOYMENT = DeploymentConfig(
    model="tiny",
    layout=LayoutConfig(layout=Layout.SPLIT, num_attention_shards=1, num_expert_shards=1),
    engine=EngineConfig(page_size=8, num_pages=512, num_threads=1),
)


def request(name: str, num_new: int) -> GenerationRequest:
    return GenerationRequest(
        request_id=name,
        prompt_token_ids=[100, 101, 102],
        sampling=SamplingParams(),
        stop=StopParams(max_tokens=num_new, ignore_eos=True),
    )


def tokens(events: list[TokenEvent]) -> list[int]:
    """Of all events: a busy reader finds several tokens in one."""
    return [token_id for event in events for token_id in event.token_ids]


async def lose_router(cell: LocalCell, model_dir: Path) -> Router:
    """End a cell's router as its process would, and bring up another."""
    lost = cell.router
    lost._draining = True  # or it would mend what is taken from it
    successor = Router(
        DEPLOYMENT,
        str(model_dir),
        cell.peers,
        device="cpu",
        dtype="float32",
        host="127.0.0.1",
        listen_address="unix:",
        secret=lost._secret,
    )
    cell.client._find_router = successor.address
    await lost._server.close()
    return successor


def test_a_new_router_takes_over_the_ranks_of_one_that_died(pool, model_dir) -> None:
    async def run():
        async with local_cell(pool, DEPLOYMENT, model_dir, recovery_timeout_s=120) as cell:
            whole = tokens(await cell.generate(request("whole", 600)))
            loaded_s = [(await peer.health(timeout_s=30)).started_at_s for peer in cell.peers]
            told: list[TokenEvent] = []
            async for event in cell.client.submit(request("victim", 600)):
                if not told:
                    cell.router = await lose_router(cell, model_dir)
                    with pytest.raises(NotReadyError, match="not been started"):
                        await cell.router.address()
                    await cell.router.resume()
                    await cell.router.resume()  # once is enough
                told.append(event)
            state = await cell.client.state()
            started_s = [(await peer.health(timeout_s=30)).started_at_s for peer in cell.peers]
            return whole, tokens(told), state, loaded_s == started_s

    whole, told, state, are_the_same = asyncio.run(run())
    assert told == whole
    assert state.epoch >= 1
    assert state.num_resumed >= 1
    assert state.loads[0].num_running == 0
    assert are_the_same
