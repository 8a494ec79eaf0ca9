"""Sum of a row's experts, in float32 and by ascending expert id.

    out[r] = sum over k with a local expert of y[r * K + k]

Shape legend: R rows, K experts per row, A = R * K pairs, D hidden.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ostro.kernels.gpu.dependent_launch import await_inputs, pdl_options

_BLOCK_D = 1024
_ABSENT = tl.constexpr(1 << 40)


def sum_pairs_triton(y_AD: torch.Tensor, expert_RK: torch.Tensor) -> torch.Tensor:
    """Add up the weighted results of each row's experts.

    Args:
        y_AD: Row r * K + k is the k-th expert's; not read where that is not here.
        expert_RK: int64 local expert ids, -1 where the k-th expert is not here; at least one row.

    Returns:
        out_RD in the dtype of `y_AD`, as `ostro.kernels.combine.sum_pairs_reference`; zeros for a
        row without a local expert.

    Example:
        y [[1.], [2.], [nan], [4.]], experts [[3, 0], [-1, 1]] give [[3.], [4.]].
    """
    (num_rows, num_chosen), hidden = expert_RK.shape, y_AD.shape[1]
    out_RD = y_AD.new_empty(num_rows, hidden)
    _sum_pairs_kernel[(num_rows, triton.cdiv(hidden, _BLOCK_D))](
        y_AD,
        expert_RK.contiguous(),
        out_RD,
        hidden,
        K=num_chosen,
        BLOCK_K=triton.next_power_of_2(num_chosen),
        BLOCK_D=min(_BLOCK_D, triton.next_power_of_2(hidden)),
        num_warps=4,
        **pdl_options(y_AD.device),
    )
    return out_RD


@triton.jit
def _sum_pairs_kernel(
    y,
    expert,
    out,
    D,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr = False,
):
    await_inputs(PDL)
    r = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = added_pairs(y + r * K * D, expert + r * K, d, D, K, BLOCK_K)
    tl.store(out + r * D + d, total.to(out.dtype.element_ty), mask=d < D)


@triton.jit
def added_pairs(  # noqa: ANN201 - not Python
    rows, expert, d, D, K: tl.constexpr, BLOCK_K: tl.constexpr
):
    """One token's sum in float32, of the values at `d`; its experts' rows and ids begin there."""
    k = tl.arange(0, BLOCK_K)
    id_ = tl.load(expert + k, mask=k < K, other=-1)
    key = tl.where(id_ >= 0, id_ * BLOCK_K + k, _ABSENT)
    total = tl.zeros(d.shape, tl.float32)
    for _ in tl.static_range(K):
        lowest = tl.min(key, 0)
        key = tl.where(key == lowest, _ABSENT, key)
        # No branch, so that all loads go out at once.
        width = tl.where(lowest < _ABSENT, D, 0)
        value = tl.load(rows + lowest % BLOCK_K * D + d, mask=d < width, other=0.0)
        total += value.to(tl.float32)
    return total
