"""Sum of a row's experts: order, absent pairs."""

from __future__ import annotations

import pytest
import torch

from ostro.kernels.combine import PairRows, sum_pairs_reference
from ostro.kernels.gpu.sum_pairs import sum_pairs_triton


def test_sum_pairs_triton_worked_example(triton_device: str) -> None:
    y_AD = torch.tensor([[1.0], [2.0], [torch.nan], [4.0]], device=triton_device)
    expert_RK = torch.tensor([[3, 0], [-1, 1]], device=triton_device)
    assert sum_pairs_triton(y_AD, expert_RK).tolist() == [[3.0], [4.0]]


@pytest.mark.parametrize("num_chosen", [1, 3, 4])
@pytest.mark.parametrize("hidden", [1, 100, 1500])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sum_pairs_triton_matches_reference(
    num_chosen: int, hidden: int, dtype: torch.dtype, triton_device: str
) -> None:
    generator = torch.Generator().manual_seed(num_chosen)
    expert_RK = torch.rand(5, 9, generator=generator).argsort(dim=1)[:, :num_chosen] - 3
    expert_RK[expert_RK < 0] = -1
    y_AD = torch.randn(5 * num_chosen, hidden, generator=generator).to(dtype)
    y_AD[expert_RK.flatten() < 0] = torch.nan
    y_AD, expert_RK = y_AD.to(triton_device), expert_RK.to(triton_device)
    out_RD = sum_pairs_triton(y_AD, expert_RK)
    assert out_RD.dtype == dtype
    assert torch.equal(out_RD, sum_pairs_reference(PairRows(y_AD, expert_RK)))


def test_sum_pairs_triton_does_not_depend_on_the_order_of_a_rows_experts(
    triton_device: str,
) -> None:
    y_AD = torch.randn(4, 64, generator=torch.Generator().manual_seed(1)).to(triton_device)
    expert_RK = torch.tensor([[5, 2, 7, 0]], device=triton_device)
    order = [2, 0, 3, 1]
    shuffled = sum_pairs_triton(y_AD[order], expert_RK[:, order])
    assert torch.equal(sum_pairs_triton(y_AD, expert_RK), shuffled)
