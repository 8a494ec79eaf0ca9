"""Permute: copy rows into the order of their experts, rounded to FP8 where the experts take that.

    out[p] = rows[order[p] // K],   FP8: clamp(that / input_scale[expert])

Sorted rows are contiguous, so that the matrix products load them as boxes.

Shape legend: R rows, K experts per row, A = R * K pairs, D hidden, E local experts.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ostro.kernels.gpu.dependent_launch import await_inputs, pdl_options
from ostro.kernels.gpu.expert_schedule import ExpertSchedule
from ostro.kernels.gpu.fp8_linear import in_units

_BLOCK_D = 1024


def permute_triton(
    rows_RD: torch.Tensor,
    expert_RK: torch.Tensor,
    schedule: ExpertSchedule,
    input_scale_E: torch.Tensor | None = None,
) -> torch.Tensor:
    """Rows in the order of `schedule`.

    Args:
        rows_RD: Hidden states.
        expert_RK: int64 local expert ids, of which the schedule was made.
        schedule: Where each pair goes.
        input_scale_E: float32; if given, the result is FP8 e4m3, in units of its expert's scale.

    Returns:
        out_AD; positions past the last pair with a local expert are not written.

    Example:
        rows [[1.], [2.]], experts [[1], [0]], scales [0.5, 1.] give FP8 [[4.], [1.]].
    """
    num_pairs, hidden = expert_RK.numel(), rows_RD.shape[1]
    dtype = rows_RD.dtype if input_scale_E is None else torch.float8_e4m3fn
    out_AD = rows_RD.new_empty(num_pairs, hidden, dtype=dtype)
    _permute_kernel[(num_pairs, triton.cdiv(hidden, _BLOCK_D))](
        rows_RD.contiguous(),
        expert_RK.contiguous(),
        schedule.order_A,
        schedule.offsets_E1,
        input_scale_E,
        out_AD,
        hidden,
        len(schedule.offsets_E1) - 1,
        expert_RK.shape[1],
        BLOCK_D=min(_BLOCK_D, triton.next_power_of_2(hidden)),
        num_warps=4,
        **pdl_options(rows_RD.device),
    )
    return out_AD


def permute_reference(
    rows_RD: torch.Tensor,
    expert_RK: torch.Tensor,
    schedule: ExpertSchedule,
    input_scale_E: torch.Tensor | None = None,
) -> torch.Tensor:
    """Meaning of `permute_triton`, only the positions that mean something."""
    order_A = schedule.order_A[: int(schedule.offsets_E1[-1])].long()
    picked_AD = rows_RD[order_A // expert_RK.shape[1]]
    if input_scale_E is None:
        return picked_AD
    scaled_AD = picked_AD.float() / input_scale_E[expert_RK.flatten()[order_A]][:, None]
    return scaled_AD.clamp(-448.0, 448.0).to(torch.float8_e4m3fn)


@triton.jit
def _permute_kernel(
    rows,
    expert,
    order,
    offsets,
    input_scale,
    out,
    D,
    E,
    K,
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr = False,
):
    await_inputs(PDL)
    p = tl.program_id(0).to(tl.int64)  # int64: p * D passes 2**31 at 512K pairs
    if p < tl.load(offsets + E):
        pair = tl.load(order + p)
        d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        value = tl.load(rows + (pair // K).to(tl.int64) * D + d, mask=d < D, other=0.0)
        if input_scale is not None:
            value = in_units(value.to(tl.float32), tl.load(input_scale + tl.load(expert + pair)))
        tl.store(out + p * D + d, value.to(out.dtype.element_ty), mask=d < D)
