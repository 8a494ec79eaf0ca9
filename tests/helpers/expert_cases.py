"""Rows, their experts and the experts' weights, for tests of the expert MLP; FP8 weights."""

from __future__ import annotations

import torch

from ostro.kernels.fp8_experts import Fp8Experts
from ostro.kernels.fp8_linear import Fp8Weight

Routed = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def make_routed(
    num_rows: int, num_experts: int, hidden: int, absent: float, dtype: torch.dtype
) -> Routed:
    """rows_RD, expert_RK (four, about a share of `absent` -1), weight_RK; NaN where none is."""
    generator = torch.Generator().manual_seed(num_rows)
    scores = torch.rand(num_rows, max(num_experts, 4), generator=generator)
    expert_RK = scores.argsort(dim=1)[:, :4]
    expert_RK[torch.rand(num_rows, 4, generator=generator) < absent] = -1
    expert_RK[expert_RK >= num_experts] = -1
    rows_RD = torch.randn(num_rows, hidden, generator=generator).to(dtype)
    weight_RK = torch.rand(num_rows, 4, generator=generator)
    weight_RK[expert_RK < 0] = torch.nan
    return rows_RD, expert_RK, weight_RK


def make_weights(
    num_experts: int, hidden: int, inner: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """gate_up_EHD and down_EDF that keep rows at about unit size."""
    generator = torch.Generator().manual_seed(num_experts)
    gate_up = torch.randn(num_experts, 2 * inner, hidden, generator=generator) / hidden**0.5
    down = torch.randn(num_experts, hidden, inner, generator=generator) / inner**0.5
    return gate_up.to(dtype), down.to(dtype)


def make_fp8_experts(num_experts: int, hidden: int, inner: int, device: str = "cpu") -> Fp8Experts:
    """Experts whose four scales all differ."""
    gate_up_EHD, down_EDF = make_weights(num_experts, hidden, inner, torch.float32)
    step_E = torch.arange(num_experts) / num_experts
    gate_up_scale_E, down_scale_E = 0.01 + step_E / 100, 0.02 - step_E / 100
    return Fp8Experts(
        gate_up_EHD=_to_fp8(gate_up_EHD, gate_up_scale_E).to(device),
        gate_up_scale_E=gate_up_scale_E.to(device),
        gate_up_input_scale_E=(0.01 + step_E / 50).to(device),
        down_EDF=_to_fp8(down_EDF, down_scale_E).to(device),
        down_scale_E=down_scale_E.to(device),
        down_input_scale_E=(0.02 + step_E / 50).to(device),
    )


def make_fp8_weight(outputs: int, inputs: int, device: str = "cpu") -> Fp8Weight:
    """A weight that keeps rows at about unit size."""
    generator = torch.Generator().manual_seed(outputs)
    weight_OI = torch.randn(outputs, inputs, generator=generator) / inputs**0.5
    scale = torch.tensor(0.003)
    return Fp8Weight(
        values_OI=_to_fp8(weight_OI[None], scale[None])[0].to(device),
        scale=scale.to(device),
        input_scale=torch.tensor(0.02, device=device),
    )


def _to_fp8(weight_EOI: torch.Tensor, scale_E: torch.Tensor) -> torch.Tensor:
    return (weight_EOI / scale_E[:, None, None]).clamp(-448, 448).to(torch.float8_e4m3fn)
