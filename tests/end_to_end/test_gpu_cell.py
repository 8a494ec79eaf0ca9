"""A cell on a GPU answers as one on the CPU does: graphs, batches of draws, preemption."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from pathlib import Path

import checkpoints
import pytest
from local_cell import ProcessPool, local_cell

from ostro.actors.engine.request import (
    GenerationRequest,
    SamplingParams,
    StopParams,
    TokenEvent,
    TokenLogprob,
)
from ostro.actors.model.random_checkpoint import TINY, write_random_head
from ostro.configs.deployment import DeploymentConfig, EngineConfig, Layout, LayoutConfig
from ostro.configs.model import load_model_config
from ostro.configs.speculation import DraftMethod, SpeculationConfig

pytestmark = pytest.mark.gpu

NUM_NEW = 24
PROMPT_LENGTHS = (3, 40, 17, 1, 700)
KINDS: dict[str, dict[str, object]] = {
    "greedy": {"num_logprobs": 3},
    "drawn": {"temperature": 1.0, "seed": 5},
    "filtered": {"temperature": 1.2, "top_p": 0.8, "top_k": 40, "min_p": 0.02, "seed": 6},
    "penalized": {"presence_penalty": 0.7, "repetition_penalty": 1.2, "logit_bias": {7: 3.0}},
}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiny")
    checkpoints.make_tiny_checkpoint(directory, num_layers=2)
    return directory


def deployment(**engine: object) -> DeploymentConfig:
    layout = LayoutConfig(
        layout=Layout.SINGLE, num_attention_shards=1, num_expert_shards=1, step_timeout_s=60.0
    )
    settings = {"page_size": 16, "num_pages": 128, "max_tokens_per_step": 64}
    return DeploymentConfig(
        model="tiny",
        layout=layout,
        engine=EngineConfig(**{**settings, "max_running_requests": 16, **engine}),
    )


def requests(kind: str) -> list[GenerationRequest]:
    draw = random.Random(5)
    return [
        GenerationRequest(
            request_id=f"{kind}{index}",
            prompt_token_ids=[draw.randrange(100, 1000) for _ in range(length)],
            sampling=SamplingParams(**KINDS[kind]),
            stop=StopParams(max_tokens=NUM_NEW, ignore_eos=True),
        )
        for index, length in enumerate(PROMPT_LENGTHS)
    ]


def answers(
    pool: ProcessPool,
    model_dir: Path,
    wanted: Sequence[GenerationRequest],
    device: str,
    **engine: object,
) -> list[list[TokenEvent]]:
    async def run() -> list[list[TokenEvent]]:
        async with local_cell(pool, deployment(**engine), model_dir, device=device) as cell:
            return await asyncio.gather(*(cell.generate(request) for request in wanted))

    return asyncio.run(run())


def tokens_of(events: Sequence[TokenEvent]) -> list[int]:
    return [token for event in events for token in event.token_ids]


def logprobs_of(events: Sequence[TokenEvent]) -> list[TokenLogprob]:
    return [logprob for event in events for logprob in event.logprobs or []]


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("cuda_graphs", [True, False], ids=["graphs", "launches"])
def test_gpu_gives_the_tokens_of_the_cpu(
    pool: ProcessPool, model_dir: Path, kind: str, cuda_graphs: bool
) -> None:
    wanted = requests(kind)
    expected = answers(pool, model_dir, wanted, "cpu")
    found = answers(pool, model_dir, wanted, "cuda", cuda_graphs=cuda_graphs)
    for one, other in zip(found, expected, strict=True):
        assert tokens_of(one) == tokens_of(other)
        pairs = zip(logprobs_of(one), logprobs_of(other), strict=True)
        for logprob, wide in pairs:
            assert logprob.logprob == pytest.approx(wide.logprob, abs=1e-3)


@pytest.mark.parametrize("kind", ["greedy", "filtered"])
@pytest.mark.parametrize("cuda_graphs", [True, False], ids=["graphs", "launches"])
def test_drafts_of_a_head_change_no_token(
    pool: ProcessPool, model_dir: Path, tmp_path: Path, kind: str, cuda_graphs: bool
) -> None:
    write_random_head(tmp_path, TINY, load_model_config(model_dir))
    drafting = SpeculationConfig(method=DraftMethod.EAGLE, draft_model=str(tmp_path))
    wanted = requests(kind)
    expected = answers(pool, model_dir, wanted, "cpu")
    found = answers(pool, model_dir, wanted, "cuda", cuda_graphs=cuda_graphs, speculation=drafting)
    assert [tokens_of(one) for one in found] == [tokens_of(one) for one in expected]


def test_requests_outlive_preemption_with_the_same_tokens(
    pool: ProcessPool, model_dir: Path
) -> None:
    wanted = requests("drawn")
    expected = answers(pool, model_dir, wanted, "cuda")
    found = answers(pool, model_dir, wanted, "cuda", num_pages=48, prefix_cache=False)
    assert [tokens_of(one) for one in found] == [tokens_of(one) for one in expected]
