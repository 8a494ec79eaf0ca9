"""Long prompts on CPU are answered in memory that does not grow with their square."""

import asyncio
import random
from pathlib import Path

import checkpoints
import pytest
from local_cell import ProcessPool, local_cell

from ostro.actors.engine.request import GenerationRequest, SamplingParams, StopParams
from ostro.configs.deployment import DeploymentConfig, EngineConfig, Layout, LayoutConfig

NUM_NEW = 8
PAGE_SIZE = 16
# The latents of 128K tokens take 12 MiB in bfloat16; the scores of one step's 2,048 tokens and two
# heads would take 2 GiB, were they kept.
MAX_GROWTH_BYTES = 256 * 2**20


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return checkpoints.make_tiny_checkpoint(
        tmp_path_factory.mktemp("long"), num_layers=1, num_heads=2
    )


@pytest.fixture
def pool():
    pool = ProcessPool()
    yield pool
    pool.close()


def deployment(num_prompt: int) -> DeploymentConfig:
    return DeploymentConfig(
        model="long",
        layout=LayoutConfig(
            layout=Layout.SINGLE,
            num_attention_shards=1,
            num_expert_shards=1,
            step_timeout_s=120.0,
        ),
        engine=EngineConfig(page_size=PAGE_SIZE, num_pages=num_prompt // PAGE_SIZE + 4),
    )


def request(name: str, prompt: list[int]) -> GenerationRequest:
    return GenerationRequest(
        request_id=name,
        prompt_token_ids=prompt,
        sampling=SamplingParams(),
        stop=StopParams(max_tokens=NUM_NEW, ignore_eos=True),
    )


def resident_bytes(pid: int, field: str) -> int:
    """VmRSS or VmHWM (its peak) of a process."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "num_prompt"), [("bfloat16", 131_072), ("float32", 32_768)])
def test_a_long_prompt_is_answered_in_bounded_memory(pool, model_dir, dtype, num_prompt):
    draw = random.Random(1)
    prompt = [draw.randrange(100, 1000) for _ in range(num_prompt)]

    async def run():
        async with local_cell(pool, deployment(num_prompt), model_dir, dtype=dtype) as cell:
            pid = cell.peers[0].process.pid
            await cell.generate(request("warm", prompt[:3000]))
            before = resident_bytes(pid, "VmRSS")
            events = await cell.generate(request("first", prompt))
            growth = resident_bytes(pid, "VmHWM") - before
            again = await cell.generate(request("again", prompt))
            return events, again, growth

    events, again, growth = asyncio.run(run())
    tokens = [token for event in events for token in event.token_ids]
    assert len(tokens) == NUM_NEW
    assert [token for event in again for token in event.token_ids] == tokens
    assert growth < MAX_GROWTH_BYTES
