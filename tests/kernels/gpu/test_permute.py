"""Permute: rows in the order of experts, rounded to FP8 by each expert's scale."""

from __future__ import annotations

import pytest
import torch

from ostro.kernels.gpu.expert_schedule import expert_schedule_reference
from ostro.kernels.gpu.permute import permute_reference, permute_triton

EXPERTS = [[0, -1, 2, 1], [-1, -1, -1, -1], [2, 0, 4, 1]]


def test_permute_triton_worked_example(triton_device: str) -> None:
    rows_RD = torch.tensor([[1.0], [2.0]], device=triton_device)
    expert_RK = torch.tensor([[1], [0]], device=triton_device)
    counts = torch.zeros(3, dtype=torch.int64, device=triton_device)
    schedule = expert_schedule_reference(expert_RK, 2, 16, counts)
    scale_E = torch.tensor([0.5, 1.0], device=triton_device)
    out_AD = permute_triton(rows_RD, expert_RK, schedule, scale_E)
    assert out_AD.dtype == torch.float8_e4m3fn
    assert out_AD.float().tolist() == [[4.0], [1.0]]


@pytest.mark.parametrize("hidden", [1, 100, 1500])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("is_fp8", [False, True])
def test_permute_triton_matches_reference(
    hidden: int, dtype: torch.dtype, is_fp8: bool, triton_device: str
) -> None:
    generator = torch.Generator().manual_seed(0)
    rows_RD = torch.randn(3, hidden, generator=generator).to(dtype).to(triton_device)
    rows_RD[1] = torch.nan  # no expert takes it
    expert_RK = torch.tensor(EXPERTS, device=triton_device)
    counts = torch.zeros(6, dtype=torch.int64, device=triton_device)
    schedule = expert_schedule_reference(expert_RK, 5, 16, counts)
    scale_E = torch.tensor([0.01, 0.02, 1e-4, 1.0, 0.5], device=triton_device) if is_fp8 else None
    expected = permute_reference(rows_RD, expert_RK, schedule, scale_E)
    out_AD = permute_triton(rows_RD, expert_RK, schedule, scale_E)[: len(expected)]
    assert out_AD.dtype == expected.dtype
    assert torch.equal(out_AD.float(), expected.float())
