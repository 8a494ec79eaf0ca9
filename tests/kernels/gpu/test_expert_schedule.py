"""The schedule: order, offsets, tiles, counts."""

from __future__ import annotations

import pytest
import torch

from ostro.kernels.gpu.expert_schedule import (
    ExpertSchedule,
    expert_schedule_reference,
    expert_schedule_triton,
)


def make_experts(num_rows: int, num_experts: int, absent: float, seed: int = 0) -> torch.Tensor:
    """int64 ids [num_rows, 4], none twice in a row, -1 for about a share of `absent`."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(num_rows, max(num_experts, 4), generator=generator)
    expert_RK = scores.argsort(dim=1)[:, :4]
    expert_RK[torch.rand(num_rows, 4, generator=generator) < absent] = -1
    expert_RK[expert_RK >= num_experts] = -1
    return expert_RK


def assert_equal(schedule: ExpertSchedule, expected: ExpertSchedule) -> None:
    num_tiles = int(expected.num_tiles)
    assert int(schedule.num_tiles) == num_tiles
    assert torch.equal(schedule.offsets_E1, expected.offsets_E1)
    assert torch.equal(schedule.order_A[: len(expected.order_A)], expected.order_A)
    assert torch.equal(schedule.tiles_N2[:num_tiles], expected.tiles_N2)


def test_expert_schedule_triton_worked_example(triton_device: str) -> None:
    expert_RK = torch.tensor([[1, -1], [0, 1]], device=triton_device)
    counts = torch.zeros(3, dtype=torch.int64, device=triton_device)
    schedule = expert_schedule_triton(expert_RK, 2, 16, counts)
    assert schedule.order_A[:3].tolist() == [2, 0, 3]
    assert schedule.offsets_E1.tolist() == [0, 1, 3]
    assert schedule.tiles_N2[:2].tolist() == [[0, 0], [1, 1]]
    assert schedule.num_tiles.tolist() == [2]
    assert counts.tolist() == [1, 1, 2]


@pytest.mark.parametrize("num_rows", [1, 3, 300])
@pytest.mark.parametrize("num_experts", [1, 5, 16])
@pytest.mark.parametrize("absent", [0.0, 0.6, 1.0])
def test_expert_schedule_triton_matches_reference(
    num_rows: int, num_experts: int, absent: float, triton_device: str
) -> None:
    expert_RK = make_experts(num_rows, num_experts, absent).to(triton_device)
    counts = torch.arange(1 + num_experts, device=triton_device)
    expected_counts = counts.clone()
    schedule = expert_schedule_triton(expert_RK, num_experts, 16, counts)
    assert_equal(schedule, expert_schedule_reference(expert_RK, num_experts, 16, expected_counts))
    assert torch.equal(counts, expected_counts)


def test_expert_schedule_triton_holds_every_tile_when_one_expert_has_all(
    triton_device: str,
) -> None:
    expert_RK = torch.full((650, 1), 2, device=triton_device)  # 41 tiles: more than one block
    counts = torch.zeros(4, dtype=torch.int64, device=triton_device)
    schedule = expert_schedule_triton(expert_RK, 3, 16, counts)
    assert_equal(schedule, expert_schedule_reference(expert_RK, 3, 16, torch.zeros_like(counts)))
    assert int(schedule.num_tiles) <= len(schedule.tiles_N2)
