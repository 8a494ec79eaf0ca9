"""Real processes are killed while requests run: their answers go on as if nothing had happened."""

from __future__ import annotations

import asyncio

import msgspec
import pytest
from local_cell import LocalCell, local_cell

from ostro.actors.engine.followed_text import packed
from ostro.actors.engine.request import (
    FinishReason,
    GenerationRequest,
    SamplingParams,
    StopParams,
    ThinkingParams,
    TokenEvent,
)
from ostro.actors.fabric.channel import AsyncConnection, connect
from ostro.cluster import cell_client
from ostro.configs.deployment import DeploymentConfig, EngineConfig, Layout, LayoutConfig
from ostro.configs.speculation import DraftMethod, SpeculationConfig

_DRAFTS = SpeculationConfig(method=DraftMethod.NGRAM, num_draft_tokens=5, adaptive=False)
_NUM_NEW = 400
_KILL_AFTER = 40  # tokens, of all requests together
_LAYOUT = LayoutConfig(layout=Layout.SPLIT, num_attention_shards=2, num_expert_shards=1)
_ALONE = LayoutConfig(layout=Layout.SINGLE, num_attention_shards=1, num_expert_shards=1)


def deployment(
    layout: LayoutConfig = _LAYOUT, *, speculation: SpeculationConfig | None = None
) -> DeploymentConfig:
    return DeploymentConfig(
        model="tiny",
        layout=layout,
        engine=EngineConfig(page_size=8, num_pages=1024, num_threads=1, speculation=speculation),
    )


def requests() -> list[GenerationRequest]:
    """Greedy, sampled twice from one prompt, and one that thinks on a budget."""
    greedy = GenerationRequest(
        request_id="greedy",
        prompt_token_ids=[100, 101, 102],
        sampling=SamplingParams(),
        stop=StopParams(max_tokens=_NUM_NEW, ignore_eos=True),
    )
    sampled = msgspec.structs.replace(
        greedy,
        request_id="sampled",
        sampling=SamplingParams(temperature=1.0, seed=7, num_logprobs=0),
        num_choices=2,
    )
    thinking = msgspec.structs.replace(
        greedy,
        request_id="thinking",
        thinking=ThinkingParams(
            begin_token_id=5,
            end_token_id=6,
            budget_tokens=200,
            soft_zone_tokens=0,
            closing_token_ids=(40, 41, 6),
            starts_open=True,
        ),
    )
    return [greedy, sampled, thinking]


def without_budget(request_id: str) -> GenerationRequest:
    """One that thinks until its caller ends that."""
    *_, on_a_budget = requests()
    thinking = msgspec.structs.replace(on_a_budget.thinking, budget_tokens=None)
    return msgspec.structs.replace(on_a_budget, request_id=request_id, thinking=thinking)


async def read(cell: LocalCell, request: GenerationRequest, seen: list[int]) -> list[TokenEvent]:
    events = []
    async for event in cell.client.submit(request):
        events.append(event)
        seen[0] += len(event.token_ids)
    return events


def told(events: list[TokenEvent]) -> dict[int, tuple[list[int], object]]:
    """Of each choice its tokens, in order and without gaps, and how it ended."""
    tokens: dict[int, list[int]] = {}
    ends = {}
    for event in events:
        so_far = tokens.setdefault(event.choice, [])
        assert event.first_index == len(so_far)
        so_far.extend(event.token_ids)
        if event.finish_reason is not None:
            ends[event.choice] = (event.finish_reason, event.thinking_ended_by)
    return {choice: (so_far, ends[choice]) for choice, so_far in tokens.items()}


@pytest.mark.parametrize(
    ("lost", "speculation"),
    [
        pytest.param(2, None, id="expert"),
        pytest.param(0, None, id="attention"),
        pytest.param(2, _DRAFTS, id="expert, with drafts", marks=pytest.mark.slow),
        pytest.param(0, _DRAFTS, id="attention, with drafts"),
    ],
)
def test_answers_are_those_of_a_cell_that_lost_nothing(pool, model_dir, lost, speculation):
    async def run():
        chosen = deployment(speculation=speculation)
        async with local_cell(pool, chosen, model_dir, recovery_timeout_s=240) as cell:
            undisturbed = [told(await read(cell, request, [0])) for request in requests()]
            seen = [0]
            reading = [asyncio.create_task(read(cell, request, seen)) for request in requests()]
            async with asyncio.timeout(240):
                while seen[0] < _KILL_AFTER:
                    await asyncio.sleep(0.005)
                cell.peers[lost].kill()
                disturbed = [told(events) for events in await asyncio.gather(*reading)]
            state = await cell.client.state()
            return undisturbed, disturbed, state

    undisturbed, disturbed, state = asyncio.run(run())
    assert state.epoch >= 1  # on a busy machine an epoch may fail to form before one does
    assert state.num_resumed >= 1
    num_right = sum(sum(load.num_accepted) for load in state.loads.values())
    assert (num_right > 0) == (speculation is not None)
    if lost in _LAYOUT.expert_ranks():  # what attention shards had computed, they still have
        assert sum(load.prefix_hits_tokens for load in state.loads.values()) > 0
    assert disturbed == undisturbed
    assert all(
        len(tokens) == _NUM_NEW and end[0] is FinishReason.LENGTH
        for answer in disturbed
        for tokens, end in answer.values()
    )
    assert disturbed[2][0][1][1] == "budget"
    assert all(load.num_running == load.num_waiting == 0 for load in state.loads.values())


@pytest.mark.slow
def test_a_predicted_answer_goes_on_and_is_told_as_if_nothing_were_lost(pool, model_dir):
    """Its second half alone was predicted, so that there is time to lose something."""
    sampled = msgspec.structs.replace(requests()[1], num_choices=1)
    drafting = SpeculationConfig(method=DraftMethod.NGRAM, adaptive=False)

    async def run():
        config = deployment(_ALONE, speculation=drafting)
        async with local_cell(pool, config, model_dir, recovery_timeout_s=240) as cell:
            ((wanted, end),) = told(await read(cell, sampled, [0])).values()
            predicted = msgspec.structs.replace(sampled, prediction=packed(wanted[_NUM_NEW // 2 :]))
            undisturbed = await read(cell, predicted, [0])
            seen = [0]
            reading = asyncio.create_task(read(cell, predicted, seen))
            async with asyncio.timeout(240):
                while seen[0] < _KILL_AFTER:
                    await asyncio.sleep(0.002)
                cell.peers[0].kill()
                disturbed = await reading
            assert told(undisturbed) == told(disturbed) == {0: (wanted, end)}
            assert (await cell.client.state()).num_resumed == 1
            return [events[-1].num_predicted_tokens for events in (undisturbed, disturbed)]

    undisturbed, disturbed = asyncio.run(run())
    assert disturbed == undisturbed > _NUM_NEW // 2 - 10


@pytest.mark.parametrize("lost", [0, 1], ids=["router", "attention"])
def test_answers_go_on_where_a_connection_breaks_and_nobody_dies(
    pool, model_dir, monkeypatch, lost
):
    """The first connection is that to the router, the second one that to the attention shard."""
    dialled = []

    async def dial(*arguments, **options) -> AsyncConnection:
        dialled.append(await connect(*arguments, **options))
        return dialled[-1]

    async def run():
        async with local_cell(pool, deployment(_ALONE), model_dir, recovery_timeout_s=240) as cell:
            undisturbed = [told(await read(cell, request, [0])) for request in requests()]
            seen = [0]
            asked = [*requests(), without_budget("steered")]
            reading = [asyncio.create_task(read(cell, request, seen)) for request in asked]
            async with asyncio.timeout(240):
                while seen[0] < _KILL_AFTER:
                    await asyncio.sleep(0.005)
                assert await cell.client.end_thinking("steered")
                dialled[lost]._writer.transport.abort()
                *disturbed, steered = [told(e) for e in await asyncio.gather(*reading)]
                while cell.router._requests:  # nor does what was given up run on
                    await asyncio.sleep(0.005)
            return undisturbed, disturbed, steered, await cell.client.state()

    monkeypatch.setattr(cell_client, "connect", dial)
    undisturbed, disturbed, steered, state = asyncio.run(run())
    assert disturbed == undisturbed
    assert steered[0][1] == (FinishReason.LENGTH, "caller")
    assert state.epoch == 0
    assert state.num_resumed >= 1
    assert state.loads[0].num_running == state.loads[0].num_waiting == 0
    assert state.loads[0].num_free_pages == state.loads[0].num_pages
