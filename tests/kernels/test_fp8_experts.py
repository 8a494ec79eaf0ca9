"""The expert MLP in FP8: meaning of scales, rounding and counts."""

from __future__ import annotations

import pytest
import torch
from expert_cases import make_fp8_experts, make_routed

from ostro.kernels.fp8_experts import Fp8Experts, expert_mlp_fp8, expert_mlp_fp8_reference
from ostro.kernels.grouped_gemm import expert_mlp_reference


def _fp8(value: float, *shape: int) -> torch.Tensor:
    return torch.full(shape, value).to(torch.float8_e4m3fn)


def test_expert_mlp_fp8_worked_example() -> None:
    experts = Fp8Experts(
        gate_up_EHD=torch.cat((_fp8(8.0, 1, 1, 1), _fp8(4.0, 1, 1, 1)), dim=1),
        gate_up_scale_E=torch.tensor([0.5]),  # gate 4, up 2
        gate_up_input_scale_E=torch.tensor([1.0]),
        down_EDF=_fp8(2.0, 1, 1, 1),
        down_scale_E=torch.tensor([1.5]),  # down 3
        down_input_scale_E=torch.tensor([0.5]),
    )
    out = expert_mlp_fp8(torch.tensor([[1.1]]), torch.tensor([[0]]), torch.tensor([[0.5]]), experts)
    # The row enters as 1.125: silu(4.5) * 2.25 = 10.01, in halves rounded to 20: 10; 0.5 * 3 * 10.
    assert out.item() == pytest.approx(15.0)


def test_expert_mlp_fp8_is_near_the_wide_mlp_of_the_same_weights() -> None:
    rows_RD, expert_RK, weight_RK = make_routed(12, 5, 48, 0.3, torch.float32)
    experts = make_fp8_experts(5, 48, 80)
    counts = torch.zeros(6, dtype=torch.int64)
    out_RD = expert_mlp_fp8(rows_RD, expert_RK, weight_RK, experts, counts=counts)
    gate_up = experts.gate_up_EHD.float() * experts.gate_up_scale_E[:, None, None]
    down = experts.down_EDF.float() * experts.down_scale_E[:, None, None]
    wide_RD = expert_mlp_reference(rows_RD, expert_RK, weight_RK, gate_up, down)
    assert float((out_RD - wide_RD).norm() / wide_RD.norm()) < 0.06
    assert torch.equal(out_RD, expert_mlp_fp8_reference(rows_RD, expert_RK, weight_RK, experts))
    assert counts.tolist() == torch.bincount(expert_RK.flatten() + 1, minlength=6).tolist()
