"""The expert MLP over sorted rows."""

from __future__ import annotations

import math

import pytest
import torch

from ostro.kernels.grouped_gemm import expert_mlp, expert_mlp_reference

Case = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def make_case(num_rows: int, num_experts: int, dtype: torch.dtype, absent: float) -> Case:
    generator = torch.Generator().manual_seed(num_rows)
    hidden, inner = 12, 20
    scores = torch.rand(num_rows, max(num_experts, 4), generator=generator)
    expert_RK = scores.argsort(dim=1)[:, :4]
    expert_RK[torch.rand(num_rows, 4, generator=generator) < absent] = -1
    expert_RK[expert_RK >= num_experts] = -1
    return (
        torch.randn(num_rows, hidden, generator=generator).to(dtype),
        expert_RK,
        torch.rand(num_rows, 4, generator=generator),
        torch.randn(num_experts, 2 * inner, hidden, generator=generator).to(dtype),
        torch.randn(num_experts, hidden, inner, generator=generator).to(dtype),
    )


def test_expert_mlp_worked_example() -> None:
    out = expert_mlp(
        torch.tensor([[1.0]]),
        torch.tensor([[0]]),
        torch.tensor([[0.5]]),
        torch.tensor([[[1.0], [2.0]]]),
        torch.tensor([[[3.0]]]),
    )
    assert out.item() == pytest.approx(0.5 * 3 * 2 / (1 + math.exp(-1)))


@pytest.mark.parametrize("num_rows", [0, 1, 3, 40])
@pytest.mark.parametrize("num_experts", [1, 5, 16])
@pytest.mark.parametrize("absent", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_expert_mlp_matches_reference(
    num_rows: int, num_experts: int, absent: float, dtype: torch.dtype
) -> None:
    case = make_case(num_rows, num_experts, dtype, absent)
    out_RD = expert_mlp(*case)
    assert out_RD.dtype == dtype
    tolerance = {"rtol": 1e-4, "atol": 1e-3}
    if dtype == torch.bfloat16:
        tolerance = {"rtol": 2e-2, "atol": 0.5}
    torch.testing.assert_close(out_RD, expert_mlp_reference(*case), **tolerance)


def test_expert_mlp_does_not_depend_on_the_order_of_a_rows_experts() -> None:
    rows, expert_RK, weight_RK, gate_up, down = make_case(6, 8, torch.float32, 0.3)
    order = torch.tensor([2, 0, 3, 1])
    shuffled = expert_mlp(rows, expert_RK[:, order], weight_RK[:, order], gate_up, down)
    assert torch.equal(expert_mlp(rows, expert_RK, weight_RK, gate_up, down), shuffled)


def test_expert_mlp_keeps_a_broken_row_to_itself() -> None:
    rows, expert_RK, weight_RK, gate_up, down = make_case(9, 8, torch.float32, 0.3)
    clean_RD = expert_mlp(rows, expert_RK, weight_RK, gate_up, down)
    rows[4] = torch.nan
    out_RD = expert_mlp(rows, expert_RK, weight_RK, gate_up, down)
    others = torch.arange(9) != 4
    assert torch.equal(out_RD[others], clean_RD[others])
