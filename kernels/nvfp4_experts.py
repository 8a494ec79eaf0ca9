"""The expert MLP with NVFP4 weights and activations of the model's dtype.

    W[o, i] = code[o, i] * scale[o, i / 16] * unit;   y = x W^T

A matrix of an expert is what `nvfp4_linear` says, but that its unit is held once for a matrix.

Shape legend: R rows, K experts per row, D hidden, F expert hidden, E local experts, O outputs,
B blocks of inputs, W words of codes, S words of scales.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ostro.kernels.grouped_gemm import swiglu
from ostro.kernels.nvfp4_linear import (
    BLOCK_INPUTS,
    SCALE_WORDS,
    WORDS,
    num_blocks,
    unpack_nvfp4,
)

_BYTES_AROUND_ONE = 0x48, 0x58  # of scales from 0.5 to below 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Nvfp4Stack:
    """A matrix of each local expert, as `pack_nvfp4` orders it.

    Attributes:
        words_EBOW: int32 codes.
        scales_EBOS: int32 scales.
        num_inputs: I, which need not fill the last block.
    """

    words_EBOW: torch.Tensor
    scales_EBOS: torch.Tensor
    num_inputs: int

    def num_outputs(self) -> int:
        """O."""
        return self.words_EBOW.shape[2]


@dataclass(frozen=True, slots=True, kw_only=True)
class Nvfp4Experts:
    """The experts of one layer in NVFP4.

    Attributes:
        gate_up: Gate rows [0, F), up rows [F, 2F) of each expert.
        gate_unit_E: float32 unit of the gate rows.
        up_unit_E: Likewise of the up rows.
        down: Second matrix of each expert.
        down_unit_E: Its unit.
    """

    gate_up: Nvfp4Stack
    gate_unit_E: torch.Tensor
    up_unit_E: torch.Tensor
    down: Nvfp4Stack
    down_unit_E: torch.Tensor


def new_nvfp4_stack(
    num_experts: int, num_outputs: int, num_inputs: int, device: torch.device | str
) -> Nvfp4Stack:
    """Memory for a stack, not filled."""
    shape = num_experts, num_blocks(num_inputs), num_outputs
    return Nvfp4Stack(
        words_EBOW=torch.empty(*shape, WORDS, dtype=torch.int32, device=device),
        scales_EBOS=torch.empty(*shape, SCALE_WORDS, dtype=torch.int32, device=device),
        num_inputs=num_inputs,
    )


def random_nvfp4_stack(
    num_experts: int, num_outputs: int, num_inputs: int, device: torch.device | str
) -> tuple[Nvfp4Stack, float]:
    """A stack of random codes and of scales around 1, for benchmarks, and how large its values are.

    That is their root mean square; inputs fill blocks.
    """
    stack = new_nvfp4_stack(num_experts, num_outputs, num_inputs, device)
    stack.words_EBOW.random_(-(2**31), 2**31)
    stack.scales_EBOS.view(torch.uint8).random_(*_BYTES_AROUND_ONE)
    sample = unpack_nvfp4(stack.words_EBOW[0, :1], stack.scales_EBOS[0, :1], BLOCK_INPUTS)
    return stack, float(sample.square().mean().sqrt())


def expert_mlp_nvfp4(
    rows_RD: torch.Tensor,
    expert_RK: torch.Tensor,
    weight_RK: torch.Tensor,
    experts: Nvfp4Experts,
    *,
    counts: torch.Tensor | None = None,
) -> torch.Tensor:
    """Run every row through its local experts and add up the weighted results.

    Args:
        rows_RD: Hidden states; on a GPU they are multiplied in bf16.
        expert_RK: int64 local expert ids, different ones in a row, -1 where the k-th is not here.
        weight_RK: float32 gate weights.
        experts: Of this shard and layer.
        counts: int64 [1 + E] on the same device, to which is added how many pairs have no local
            expert, then how many each expert has.

    Returns:
        out_RD in the dtype of `rows_RD`; zeros for a row without a local expert.

    Raises:
        ValueError: On a GPU, D or F does not fill 16-byte steps of bf16.

    Example:
        as `expert_mlp` of the values that codes, scales and units multiply to.
    """
    if counts is None:
        counts = expert_RK.new_zeros(1 + len(experts.down_unit_E))
    if rows_RD.is_cuda:
        from ostro.kernels.gpu.expert_mlp import expert_mlp_nvfp4_triton

        return expert_mlp_nvfp4_triton(rows_RD, expert_RK, weight_RK, experts, counts)
    counts += torch.bincount(expert_RK.flatten() + 1, minlength=len(counts))
    return expert_mlp_nvfp4_reference(rows_RD, expert_RK, weight_RK, experts)


def expert_mlp_nvfp4_reference(
    rows_RD: torch.Tensor, expert_RK: torch.Tensor, weight_RK: torch.Tensor, experts: Nvfp4Experts
) -> torch.Tensor:
    """Meaning of `expert_mlp_nvfp4`, expert by expert; sums in float32."""
    out_RD = torch.zeros(rows_RD.shape, device=rows_RD.device)
    for e in expert_RK[expert_RK >= 0].unique().tolist():
        row, k = (expert_RK == e).nonzero(as_tuple=True)
        hidden = swiglu(rows_RD[row].float() @ gate_up_values(experts, e).T)
        y = hidden @ down_values(experts, e).T
        out_RD[row] += weight_RK[row, k][:, None] * y
    return out_RD.to(rows_RD.dtype)


def gate_up_values(experts: Nvfp4Experts, expert: int) -> torch.Tensor:
    """Gate and up rows of one expert in float32, [2F, D]."""
    gate, up = _values(experts.gate_up, expert).chunk(2)
    return torch.cat((gate * experts.gate_unit_E[expert], up * experts.up_unit_E[expert]))


def down_values(experts: Nvfp4Experts, expert: int) -> torch.Tensor:
    """The second matrix of one expert in float32, [D, F]."""
    return _values(experts.down, expert) * experts.down_unit_E[expert]


def _values(stack: Nvfp4Stack, expert: int) -> torch.Tensor:
    return unpack_nvfp4(stack.words_EBOW[expert], stack.scales_EBOS[expert], stack.num_inputs)
