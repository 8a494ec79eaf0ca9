"""Decode steps as CUDA graphs: their sizes anywhere, their bits and the model itself on a GPU."""

from __future__ import annotations

from pathlib import Path

import checkpoints
import pytest
import torch
from model_rig import ModelRig, make_progress, relative_error

from ostro.actors.engine.request import RequestProgress
from ostro.actors.fabric.local_exchange import LocalExchange
from ostro.actors.fabric.placement import initial_placement
from ostro.actors.model.batch import build_batches
from ostro.actors.model.cuda_graphs import GraphedDecoder, chunk_sizes, request_sizes

PAGE_SIZE, NUM_PAGES = 16, 256


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.make_tiny_checkpoint(tmp_path_factory.mktemp("tiny"), seed=3)


def test_request_sizes_worked_example() -> None:
    assert request_sizes(100) == [1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 100]


@pytest.mark.parametrize("most", [1, 2, 3, 256, 257, 1000])
def test_request_sizes_end_with_the_most(most: int) -> None:
    sizes = request_sizes(most)
    assert sizes[-1] == most
    assert sizes == sorted(set(sizes))


def test_chunk_sizes_worked_example() -> None:
    assert chunk_sizes(2, 100) == [16, 64, 100]
    assert chunk_sizes(2, 5) == [5]


def _prompts() -> list[RequestProgress]:
    generator = torch.Generator().manual_seed(1)
    lengths = (3, 40, 17)
    return [
        make_progress(str(n), torch.randint(3, 1000, (n,), generator=generator).tolist())
        for n in lengths
    ]


def _graphed(rig: ModelRig) -> tuple[GraphedDecoder, LocalExchange]:
    (experts, _), *_ = rig.exchange._shards
    num_experts = rig.config.num_experts
    placement = initial_placement(num_experts, [0])
    exchange = LocalExchange(experts.forward, placement, "cuda")
    return GraphedDecoder(rig.decoder, exchange), exchange


def _append_greedy(progress: list[RequestProgress], logits_BV: torch.Tensor) -> None:
    for one, token_id in zip(progress, logits_BV.argmax(dim=1).tolist(), strict=True):
        one.output_token_ids.append(token_id)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.bfloat16, 6e-2)], ids=str
)
def test_gpu_gives_the_logits_of_the_cpu(
    directory: Path, dtype: torch.dtype, tolerance: float
) -> None:
    rigs = [
        ModelRig(directory, page_size=PAGE_SIZE, num_pages=NUM_PAGES),
        ModelRig(directory, page_size=PAGE_SIZE, num_pages=NUM_PAGES, device="cuda", dtype=dtype),
    ]
    both = [_prompts(), _prompts()]
    for step in range(4):
        logits = [
            rig.step([rig.entry(one, 1 if step else one.num_tokens) for one in progress]).cpu()
            for rig, progress in zip(rigs, both, strict=True)
        ]
        assert relative_error(logits[1], logits[0]) < tolerance
        for progress in both:
            _append_greedy(progress, logits[0])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_graphs_give_the_bits_of_single_launches(directory: Path, dtype: torch.dtype) -> None:
    rig = ModelRig(directory, page_size=PAGE_SIZE, num_pages=NUM_PAGES, device="cuda", dtype=dtype)
    graphed, exchange = _graphed(rig)
    graphed.capture(max_requests=6, max_context=2048, num_pages=NUM_PAGES)
    progress = _prompts()
    _append_greedy(progress, rig.step([rig.entry(one, one.num_tokens) for one in progress]))
    for step in range(5):
        live = progress[: 1 + step % 3]
        entries = [rig.entry(one, 1) for one in live]
        batches = build_batches(entries, page_size=PAGE_SIZE, num_micro_batches=1, device="cuda")
        graphs = graphed.seconds["graph"]
        (logits_BV,) = graphed.forward(batches, exchange)
        assert graphed.seconds["graph"] > graphs
        expected_BV = rig.step(entries)
        torch.testing.assert_close(logits_BV, expected_BV, rtol=2e-2, atol=2e-2)
        assert torch.equal(logits_BV.argmax(dim=1), expected_BV.argmax(dim=1))
        _append_greedy(live, expected_BV)


@pytest.mark.gpu
def test_steps_without_a_graph_go_launch_by_launch(directory: Path) -> None:
    rig = ModelRig(directory, page_size=PAGE_SIZE, num_pages=NUM_PAGES, device="cuda")
    graphed, exchange = _graphed(rig)
    graphed.capture(max_requests=1, max_context=2048, num_pages=NUM_PAGES)
    entries = [rig.entry(one, one.num_tokens) for one in _prompts()]
    batches = build_batches(entries, page_size=PAGE_SIZE, num_micro_batches=1, device="cuda")
    (logits_BV,) = graphed.forward(batches, exchange)
    assert graphed.seconds["graph"] == 0.0
    assert relative_error(logits_BV, rig.step(entries)) < 1e-4
