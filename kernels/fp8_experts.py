"""The expert MLP with FP8 weights and activations, scales fixed beforehand.

    W = value * scale;   x -> clamp(x / input_scale), rounded to e4m3;   y = (x W^T) * both scales

One scale per expert and matrix for the weight, one for its input, as the official FP8 checkpoint
has them: nothing looks for a maximum while serving.

Shape legend: R rows, K experts per row, D hidden, F expert hidden, H = 2F, E local experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ostro.kernels.fp8_linear import quantize_fp8_reference
from ostro.kernels.grouped_gemm import swiglu


@dataclass(frozen=True, slots=True, kw_only=True)
class Fp8Experts:
    """The experts of one layer in FP8 e4m3.

    Attributes:
        gate_up_EHD: Gate rows [0, F), up rows [F, 2F) of each expert.
        gate_up_scale_E: float32 value of one unit of `gate_up_EHD`.
        gate_up_input_scale_E: Likewise of the rows that it multiplies.
        down_EDF: Second matrix of each expert.
        down_scale_E: Its scale.
        down_input_scale_E: Likewise of the hidden rows that it multiplies.
    """

    gate_up_EHD: torch.Tensor
    gate_up_scale_E: torch.Tensor
    gate_up_input_scale_E: torch.Tensor
    down_EDF: torch.Tensor
    down_scale_E: torch.Tensor
    down_input_scale_E: torch.Tensor


def expert_mlp_fp8(
    rows_RD: torch.Tensor,
    expert_RK: torch.Tensor,
    weight_RK: torch.Tensor,
    experts: Fp8Experts,
    *,
    counts: torch.Tensor | None = None,
) -> torch.Tensor:
    """Run every row through its local experts and add up the weighted results.

    Args:
        rows_RD: Hidden states.
        expert_RK: int64 local expert ids, -1 where the k-th expert is not here.
        weight_RK: float32 gate weights.
        experts: Of this shard and layer.
        counts: int64 [1 + E] on the same device, to which is added how many pairs have no local
            expert, then how many each expert has.

    Returns:
        out_RD in the dtype of `rows_RD`; zeros for a row without a local expert.

    Example:
        as `expert_mlp` of the values times their scales, up to the rounding of inputs: row [1.1]
        with input scale 1 enters as 1.125.
    """
    if counts is None:
        counts = expert_RK.new_zeros(1 + len(experts.gate_up_EHD))
    if rows_RD.is_cuda:
        from ostro.kernels.gpu.expert_mlp import expert_mlp_fp8_triton

        return expert_mlp_fp8_triton(rows_RD, expert_RK, weight_RK, experts, counts)
    counts += torch.bincount(expert_RK.flatten() + 1, minlength=len(counts))
    return expert_mlp_fp8_reference(rows_RD, expert_RK, weight_RK, experts)


def expert_mlp_fp8_reference(
    rows_RD: torch.Tensor, expert_RK: torch.Tensor, weight_RK: torch.Tensor, experts: Fp8Experts
) -> torch.Tensor:
    """Meaning of `expert_mlp_fp8`, pair by pair; sums in float32."""
    out_RD = torch.zeros(rows_RD.shape, device=rows_RD.device)
    for r, ids in enumerate(expert_RK.tolist()):
        for e, k in sorted((e, k) for k, e in enumerate(ids) if e >= 0):
            x_D = _round_to_fp8(rows_RD[r].float(), experts.gate_up_input_scale_E[e])
            hidden_F = swiglu(_multiply(experts.gate_up_EHD[e], experts.gate_up_scale_E[e], x_D))
            hidden_F = _round_to_fp8(hidden_F, experts.down_input_scale_E[e])
            y_D = _multiply(experts.down_EDF[e], experts.down_scale_E[e], hidden_F)
            out_RD[r] += weight_RK[r, k] * y_D
    return out_RD.to(rows_RD.dtype)


def _round_to_fp8(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return quantize_fp8_reference(x, scale).float() * scale


def _multiply(weight_OI: torch.Tensor, scale: torch.Tensor, x_I: torch.Tensor) -> torch.Tensor:
    return (weight_OI.float() * scale) @ x_I
