"""Local experts: shards of them add up to the whole, and rows are counted."""

from __future__ import annotations

from pathlib import Path

import checkpoints
import pytest
import torch

from ostro.actors.model.checkpoint import CheckpointReader
from ostro.actors.model.experts import LocalExperts
from ostro.actors.model.weights import load_expert_weights
from ostro.configs.model import ModelConfig, load_model_config


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.make_tiny_checkpoint(tmp_path_factory.mktemp("tiny"), num_experts=8)


def load(directory: Path, local_to_logical: list[int]) -> tuple[ModelConfig, LocalExperts]:
    config = load_model_config(directory)
    weights = load_expert_weights(
        CheckpointReader(directory), config, local_to_logical, device="cpu", dtype=torch.float32
    )
    return config, LocalExperts(config, weights)


def some_rows(config: ModelConfig, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(count)
    rows_RD = torch.randn(count, config.hidden_size, generator=generator)
    expert_RK = torch.rand(count, config.num_experts, generator=generator).argsort(1)[:, :4]
    return rows_RD, expert_RK, torch.rand(count, 4, generator=generator)


def test_shards_of_experts_add_up_to_all_of_them(directory: Path) -> None:
    config, everything = load(directory, list(range(8)))
    rows_RD, expert_RK, weight_RK = some_rows(config, 9)
    total_RD = torch.zeros_like(rows_RD)
    for local_to_logical in ([5, 0, 3], [1, 2, 4, 6, 7]):
        local_of_logical = torch.full((8,), -1)
        local_of_logical[local_to_logical] = torch.arange(len(local_to_logical))
        _, shard = load(directory, local_to_logical)
        total_RD += shard.forward(1, rows_RD, local_of_logical[expert_RK], weight_RK)
    torch.testing.assert_close(total_RD, everything.forward(1, rows_RD, expert_RK, weight_RK))


def test_counts_are_rows_by_layer_and_local_expert_since_last_asked(directory: Path) -> None:
    config, experts = load(directory, [6, 2])
    rows_RD = torch.randn(3, config.hidden_size)
    expert_RK = torch.tensor([[0, -1, 1, -1], [-1, -1, 1, -1], [-1, -1, -1, -1]])
    experts.forward(0, rows_RD, expert_RK, torch.ones(3, 4))
    experts.forward(2, rows_RD[:1], expert_RK[:1], torch.ones(1, 4))
    experts.forward(2, rows_RD[:0], expert_RK[:0], torch.ones(0, 4))
    assert experts.take_counts() == [[1, 2], [0, 0], [1, 1]]
    assert experts.take_counts() == [[0, 0]] * 3


def test_bfloat16_experts_give_the_same_rows_as_float32(
    tmp_path: Path,
) -> None:
    directory = checkpoints.make_tiny_checkpoint(
        tmp_path, num_experts=4, num_layers=1, hidden_size=256, expert_hidden_size=256
    )
    config = load_model_config(directory)
    reader = CheckpointReader(directory)
    everything = [0, 1, 2, 3]
    stacks = [
        load_expert_weights(reader, config, everything, device="cpu", dtype=dtype)
        for dtype in (torch.bfloat16, torch.float32)
    ]
    rows_RD, expert_RK, weight_RK = some_rows(config, 5)
    narrow = LocalExperts(config, stacks[0])
    found_RD = narrow.forward(0, rows_RD.bfloat16(), expert_RK, weight_RK)
    exact_RD = LocalExperts(config, stacks[1]).forward(0, rows_RD, expert_RK, weight_RK)
    torch.testing.assert_close(
        found_RD.float(), exact_RD, rtol=0.05, atol=0.05 * exact_RD.abs().max().item()
    )
    # Packed where they stood: a shard never holds its experts twice.
    assert narrow._layers[0].gate_up.data_ptr() == stacks[0].layers[0].gate_up.data_ptr()
