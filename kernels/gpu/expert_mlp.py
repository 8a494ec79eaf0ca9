"""The expert MLP on a GPU, in five launches and without waiting for a count.

Schedule, permute, gate and up with SwiGLU, down with the gate weights, sum of each row's experts.
Few pairs do without the first two (`few_experts`), and who adds more to a row does without the sum:
`expert_pairs_*` leave it out.

Shape legend: R rows, K experts per row, A = R * K pairs, D hidden, F expert hidden, H = 2F,
E local experts.
"""

from __future__ import annotations

from typing import Any

import torch

from ostro.kernels.fp8_experts import Fp8Experts
from ostro.kernels.gpu.expert_schedule import expert_schedule_triton
from ostro.kernels.gpu.few_experts import down_few_triton, gate_up_few_triton, takes_pairs
from ostro.kernels.gpu.grouped_gemm import down_triton, gate_up_triton
from ostro.kernels.gpu.nvfp4_gemm import down_nvfp4_triton, gate_up_nvfp4_triton
from ostro.kernels.gpu.permute import permute_triton
from ostro.kernels.gpu.sum_pairs import sum_pairs_triton
from ostro.kernels.gpu.tiles import block_rows
from ostro.kernels.nvfp4_experts import Nvfp4Experts


def expert_mlp_triton(
    rows_RD: torch.Tensor,
    expert_RK: torch.Tensor,
    weight_RK: torch.Tensor,
    gate_up_EHD: torch.Tensor,
    down_EDF: torch.Tensor,
    counts: torch.Tensor,
) -> torch.Tensor:
    """`ostro.kernels.grouped_gemm.expert_mlp` by Triton.

    Raises:
        ValueError: D or F does not fill 16-byte steps.
    """
    if not len(rows_RD):
        return torch.empty_like(rows_RD)
    y_AD = expert_pairs_triton(rows_RD, expert_RK, weight_RK, gate_up_EHD, down_EDF, counts)
    return sum_pairs_triton(y_AD, expert_RK)


def expert_pairs_triton(
    rows_RD: torch.Tensor,
    expert_RK: torch.Tensor,
    weight_RK: torch.Tensor,
    gate_up_EHD: torch.Tensor,
    down_EDF: torch.Tensor,
    counts: torch.Tensor,
) -> torch.Tensor:
    """Weighted rows of each pair, y_AD, not written where an expert is not here; one row at least.

    Raises:
        ValueError: D or F does not fill 16-byte steps.
    """
    if takes_pairs(expert_RK.numel(), rows_RD.device):
        hidden_AF = gate_up_few_triton(rows_RD, expert_RK, gate_up_EHD, counts)
        return down_few_triton(hidden_AF, expert_RK, weight_RK, down_EDF, rows_RD.dtype)
    num_experts = len(gate_up_EHD)
    rows = block_rows(expert_RK.numel(), num_experts)
    schedule = expert_schedule_triton(expert_RK, num_experts, rows, counts)
    x_AD = permute_triton(rows_RD, expert_RK, schedule)
    hidden_AF = gate_up_triton(x_AD, gate_up_EHD, schedule)
    return down_triton(hidden_AF, down_EDF, weight_RK, schedule, rows_RD.dtype)


def expert_mlp_fp8_triton(
    rows_RD: torch.Tensor,
    expert_RK: torch.Tensor,
    weight_RK: torch.Tensor,
    experts: Fp8Experts,
    counts: torch.Tensor,
) -> torch.Tensor:
    """`ostro.kernels.fp8_experts.expert_mlp_fp8` by Triton.

    Raises:
        ValueError: D or F does not fill 16-byte steps.
    """
    if not len(rows_RD):
        return torch.empty_like(rows_RD)
    y_AD = expert_pairs_fp8_triton(rows_RD, expert_RK, weight_RK, experts, counts)
    return sum_pairs_triton(y_AD, expert_RK)


def expert_pairs_fp8_triton(
    rows_RD: torch.Tensor,
    expert_RK: torch.Tensor,
    weight_RK: torch.Tensor,
    experts: Fp8Experts,
    counts: torch.Tensor,
) -> torch.Tensor:
    """Weighted rows of each pair, y_AD, not written where an expert is not here; one row at least.

    Raises:
        ValueError: D or F does not fill 16-byte steps.
    """
    of_gate_up: dict[str, Any] = {
        "scale_E": experts.gate_up_scale_E,
        "input_scale_E": experts.gate_up_input_scale_E,
        "next_input_scale_E": experts.down_input_scale_E,
    }
    of_down: dict[str, Any] = {
        "scale_E": experts.down_scale_E,
        "input_scale_E": experts.down_input_scale_E,
    }
    gate_up_EHD, down_EDF, dtype = experts.gate_up_EHD, experts.down_EDF, rows_RD.dtype
    if takes_pairs(expert_RK.numel(), rows_RD.device):
        hidden_AF = gate_up_few_triton(rows_RD, expert_RK, gate_up_EHD, counts, **of_gate_up)
        return down_few_triton(hidden_AF, expert_RK, weight_RK, down_EDF, dtype, **of_down)
    num_experts = len(gate_up_EHD)
    rows = block_rows(expert_RK.numel(), num_experts)
    schedule = expert_schedule_triton(expert_RK, num_experts, rows, counts)
    x_AD = permute_triton(rows_RD, expert_RK, schedule, experts.gate_up_input_scale_E)
    hidden_AF = gate_up_triton(x_AD, gate_up_EHD, schedule, **of_gate_up)
    return down_triton(hidden_AF, down_EDF, weight_RK, schedule, dtype, **of_down)


def expert_mlp_nvfp4_triton(
    rows_RD: torch.Tensor,
    expert_RK: torch.Tensor,
    weight_RK: torch.Tensor,
    experts: Nvfp4Experts,
    counts: torch.Tensor,
) -> torch.Tensor:
    """`ostro.kernels.nvfp4_experts.expert_mlp_nvfp4` by Triton; rows are multiplied in bf16.

    Raises:
        ValueError: D or F does not fill 16-byte steps.
    """
    if not len(rows_RD):
        return torch.empty_like(rows_RD)
    y_AD = expert_pairs_nvfp4_triton(rows_RD, expert_RK, weight_RK, experts, counts)
    return sum_pairs_triton(y_AD, expert_RK)


def expert_pairs_nvfp4_triton(
    rows_RD: torch.Tensor,
    expert_RK: torch.Tensor,
    weight_RK: torch.Tensor,
    experts: Nvfp4Experts,
    counts: torch.Tensor,
) -> torch.Tensor:
    """Weighted rows of each pair, y_AD, not written where an expert is not here; one row at least.

    Raises:
        ValueError: D or F does not fill 16-byte steps.
    """
    num_experts = len(experts.down_unit_E)
    rows = block_rows(expert_RK.numel(), num_experts)
    schedule = expert_schedule_triton(expert_RK, num_experts, rows, counts)
    x_AD = permute_triton(rows_RD.to(torch.bfloat16), expert_RK, schedule)
    hidden_AF = gate_up_nvfp4_triton(x_AD, experts, schedule)
    return down_nvfp4_triton(hidden_AF, experts, weight_RK, schedule, rows_RD.dtype)
