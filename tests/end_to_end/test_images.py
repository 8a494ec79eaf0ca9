"""Prompts with images through a whole cell: real processes, against transformers."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import checkpoints
import msgspec
import pictures
import pytest
import torch
from local_cell import ProcessPool, local_cell
from model_rig import load_image_oracle, oracle_image_logits

from ostro.actors.engine import images as images_of_engine
from ostro.actors.engine.request import (
    FinishReason,
    GenerationRequest,
    ImageInput,
    SamplingParams,
    StopParams,
    TokenEvent,
)
from ostro.actors.errors import InvalidRequestError
from ostro.actors.model.random_checkpoint import TINY_VISION
from ostro.configs.deployment import (
    DeploymentConfig,
    DispatchMode,
    EngineConfig,
    Layout,
    LayoutConfig,
)

NUM_NEW = 6
_QUESTION = [300, 301, 302]
_LARGE = pictures.make_image(168, 140, seed=1)
_SMALL = pictures.make_image(28, 28, seed=2)
PROMPTS = {
    "two": pictures.prompt_of([1, 200, _LARGE, 201, _SMALL, *_QUESTION]),
    "other": pictures.prompt_of([1, 200, pictures.make_image(168, 140, seed=3), *_QUESTION]),
    "last": pictures.prompt_of([1, 202, 203, pictures.make_image(56, 84, seed=4)]),
    "text": ([1, *range(400, 420)], ()),
}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiny")
    return checkpoints.make_tiny_checkpoint(directory, num_layers=2, vision=TINY_VISION)


@pytest.fixture(scope="module")
def expected(model_dir: Path) -> dict[str, list[int]]:
    """What transformers says to each prompt, greedily."""
    oracle = load_image_oracle(model_dir)
    return {
        name: _greedy(oracle, tokens, images)
        for name, (tokens, images) in PROMPTS.items()
        if images
    }


def _greedy(oracle: Any, prompt: list[int], images: tuple[ImageInput, ...]) -> list[int]:
    output: list[int] = []
    for _ in range(NUM_NEW):
        logits = oracle_image_logits(oracle, [*prompt, *output], images)
        output.append(int(torch.argmax(logits[-1])))
    return output


def _deployment(layout: LayoutConfig, **engine: Any) -> DeploymentConfig:
    fields = {
        "page_size": 8,
        "num_pages": 64,
        "max_tokens_per_step": 16,
        "max_running_requests": 16,
        "num_threads": 1,
        **engine,
    }
    return DeploymentConfig(model="tiny", layout=layout, engine=EngineConfig(**fields))


SINGLE = LayoutConfig(
    layout=Layout.SINGLE, num_attention_shards=1, num_expert_shards=1, step_timeout_s=60.0
)
SPLIT = LayoutConfig(
    layout=Layout.SPLIT,
    num_attention_shards=2,
    num_expert_shards=2,
    dispatch=DispatchMode.AUTO,
    dense_max_tokens=8,
    num_micro_batches=2,
    min_tokens_per_micro_batch=2,
    step_timeout_s=60.0,
)


def _request(name: str, prompt: str, **fields: Any) -> GenerationRequest:
    tokens, images = PROMPTS[prompt]
    request = GenerationRequest(
        request_id=name,
        prompt_token_ids=tokens,
        sampling=SamplingParams(),
        stop=StopParams(max_tokens=NUM_NEW, ignore_eos=True),
        images=images,
    )
    return msgspec.structs.replace(request, **fields)


def _tokens(events: list[TokenEvent]) -> list[int]:
    return [token for event in events for token in event.token_ids]


@pytest.mark.parametrize("layout", [SINGLE, SPLIT], ids=["single", "split-m2"])
@pytest.mark.parametrize("num_pages", [64, 13], ids=["roomy", "preempting"])
def test_a_cell_says_what_transformers_says(
    pool: ProcessPool,
    model_dir: Path,
    expected: dict[str, list[int]],
    layout: LayoutConfig,
    num_pages: int,
) -> None:
    names = ["two", "other", "text", "last", "two", "other"]

    async def run() -> list[list[TokenEvent]]:
        async with local_cell(pool, _deployment(layout, num_pages=num_pages), model_dir) as cell:
            requests = [_request(f"{i}", name) for i, name in enumerate(names)]
            return await asyncio.gather(*(cell.generate(request) for request in requests))

    for name, events in zip(names, asyncio.run(run()), strict=True):
        assert events[-1].finish_reason is FinishReason.LENGTH
        if name in expected:
            assert _tokens(events) == expected[name]


def test_a_prefix_with_the_same_image_is_found_again_and_with_another_one_is_not(
    pool: ProcessPool, model_dir: Path, expected: dict[str, list[int]]
) -> None:
    async def run() -> list[list[TokenEvent]]:
        async with local_cell(pool, _deployment(SINGLE), model_dir) as cell:
            names = ["two", "two", "other"]
            return [await cell.generate(_request(f"{i}", n)) for i, n in enumerate(names)]

    first, again, other = asyncio.run(run())
    assert [events[0].num_cached_tokens for events in (first, again, other)] == [0, 40, 0]
    assert _tokens(first) == _tokens(again) == expected["two"]
    assert _tokens(other) == expected["other"]


def test_images_that_cannot_be_served_are_refused_and_the_cell_serves_on(
    pool: ProcessPool,
    model_dir: Path,
    expected: dict[str, list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    num_bytes = 600_000  # two of them are more than a request takes
    monkeypatch.setattr(images_of_engine, "MAX_REQUEST_IMAGE_BYTES", 1_000_000)
    images = PROMPTS["two"][1]
    shifted = msgspec.structs.replace(images[1], start=images[1].start + 1)

    async def run() -> tuple[list[TokenEvent], list[TokenEvent]]:
        async with local_cell(pool, _deployment(SINGLE), model_dir) as cell:
            refused = await cell.generate(_request("shifted", "two", images=(images[0], shifted)))
            huge = msgspec.structs.replace(images[0], pixels=bytes(num_bytes))
            with pytest.raises(InvalidRequestError, match="image 1: the 2 images"):
                await cell.generate(_request("huge", "two", images=(huge, huge)))
            return refused, await cell.generate(_request("right", "two"))

    refused, served = asyncio.run(run())
    assert refused[-1].finish_reason is FinishReason.ERROR
    assert "image 1: the prompt's tokens" in str(refused[-1].error_message)
    assert _tokens(served) == expected["two"]


def test_a_model_without_vision_refuses_images(pool: ProcessPool, tmp_path: Path) -> None:
    directory = checkpoints.make_tiny_checkpoint(tmp_path, num_layers=1)

    async def run() -> list[TokenEvent]:
        async with local_cell(pool, _deployment(SINGLE), directory) as cell:
            return await cell.generate(_request("r", "last"))

    (event,) = asyncio.run(run())
    assert event.finish_reason is FinishReason.ERROR
    assert event.error_code == "images_not_supported"


def test_a_burst_of_large_requests_breaks_no_connection(
    pool: ProcessPool, model_dir: Path, expected: dict[str, list[int]]
) -> None:
    images = PROMPTS["two"][1]
    # Too many pixels for its size, so that it travels to the shard and is refused there.
    large = msgspec.structs.replace(images[0], pixels=bytes(20 * 2**20))

    async def run() -> list[list[TokenEvent]]:
        async with local_cell(pool, _deployment(SPLIT), model_dir) as cell:
            burst = [_request(f"{i}", "two", images=(large, images[1])) for i in range(4)]
            right = [_request("text", "text"), _request("right", "two")]
            return await asyncio.gather(*(cell.generate(r) for r in (*burst, *right)))

    *refused, _, served = asyncio.run(run())
    assert {events[-1].finish_reason for events in refused} == {FinishReason.ERROR}
    assert _tokens(served) == expected["two"]
