"""Combine on a GPU: pairs or parts, shared expert, residual and the next norm in one launch.

One program per token. Each value is added in the order in which it stands in `_combine_kernel`, in
float32, so that fused and single steps give the same bits.

Shape legend: T tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from ostro.kernels.combine import PairRows
from ostro.kernels.gpu.dependent_launch import await_inputs, pdl_options
from ostro.kernels.gpu.sum_pairs import added_pairs

_WARPS_OF_WIDE_ROWS, _WIDE = 8, 2048


def combine_triton(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """`ostro.kernels.combine.combine` by Triton."""
    out_TD = torch.empty_like(parts[0], dtype=torch.float32)
    _launch(parts, out_TD)
    return out_TD


def add_residual_triton(
    sum_TD: torch.Tensor | PairRows, shared_TD: torch.Tensor | None, residual_TD: torch.Tensor
) -> torch.Tensor:
    """`ostro.kernels.combine.add_residual` by Triton; changes none of its arguments."""
    out_TD = torch.empty_like(residual_TD)
    _launch((sum_TD, *_present(shared_TD), residual_TD), out_TD)
    return out_TD


def combine_norm_triton(
    parts: Sequence[torch.Tensor | PairRows],
    shared_TD: torch.Tensor | None,
    residual_TD: torch.Tensor,
    norm_D: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`ostro.kernels.combine.combine_norm` by Triton."""
    out_TD = torch.empty_like(residual_TD)
    normed_TD = torch.empty_like(residual_TD)
    _launch((*parts, *_present(shared_TD), residual_TD), out_TD, (normed_TD, norm_D, eps))
    return out_TD, normed_TD


def _present(shared_TD: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    return () if shared_TD is None else (shared_TD,)


def _launch(
    parts: Sequence[torch.Tensor | PairRows],
    out_TD: torch.Tensor,
    norm: tuple[torch.Tensor, torch.Tensor, float] | None = None,
) -> None:
    num_tokens, hidden = out_TD.shape
    if not num_tokens:
        return
    normed_TD, norm_D, eps = norm if norm is not None else (None, None, 0.0)
    pairs_AD = expert_TK = None
    num_chosen = 0
    if isinstance(parts[0], PairRows):
        pairs_AD, expert_TK = parts[0].rows_AD, parts[0].expert_TK.contiguous()
        num_chosen, parts = expert_TK.shape[1], parts[1:]
    _combine_kernel[(num_tokens,)](
        pairs_AD,
        expert_TK,
        tuple(part.contiguous() for part in parts if isinstance(part, torch.Tensor)),
        out_TD,
        norm_D,
        normed_TD,
        eps,
        hidden,
        K=num_chosen,
        BLOCK_K=triton.next_power_of_2(max(1, num_chosen)),
        BLOCK_D=triton.next_power_of_2(hidden),
        num_warps=_WARPS_OF_WIDE_ROWS if hidden > _WIDE else 4,
        **pdl_options(out_TD.device),
    )


@triton.jit
def _combine_kernel(
    pairs,
    expert,
    parts,
    out,
    norm,
    normed,
    eps,
    D,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr = False,
):
    await_inputs(PDL)
    t = tl.program_id(0).to(tl.int64)
    row = t * D
    d = tl.arange(0, BLOCK_D)
    is_in = d < D
    total = tl.zeros((BLOCK_D,), tl.float32)
    if pairs is not None:
        total = added_pairs(pairs + row * K, expert + t * K, d, D, K, BLOCK_K)
        total = total.to(pairs.dtype.element_ty).to(tl.float32)  # as a launch of its own rounds it
    for i in tl.static_range(len(parts)):
        total += tl.load(parts[i] + row + d, mask=is_in, other=0.0).to(tl.float32)
    hidden = total.to(out.dtype.element_ty)
    tl.store(out + row + d, hidden, mask=is_in)
    if norm is not None:
        wide = hidden.to(tl.float32)  # as rounded: what a norm of its own would read
        scaled = wide * tl.rsqrt(tl.sum(wide * wide, 0) / D + eps)
        rounded = scaled.to(normed.dtype.element_ty).to(tl.float32)
        weight = tl.load(norm + d, mask=is_in, other=0.0).to(tl.float32)
        tl.store(normed + row + d, (rounded * weight).to(normed.dtype.element_ty), mask=is_in)
