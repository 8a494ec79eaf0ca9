"""RMS norm by Triton, one program per row.

Shape legend: T tokens, D width of the normalised rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ostro.kernels.gpu.dependent_launch import await_inputs, pdl_options

_WARPS_OF_WIDE_ROWS, _WIDE = 8, 2048


def rms_norm_triton(x_TD: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
    """`ostro.kernels.rms_norm.rms_norm` by Triton; any number of leading dimensions."""
    out_TD = torch.empty_like(x_TD, memory_format=torch.contiguous_format)
    width = x_TD.shape[-1]
    rows_TD = x_TD if x_TD.dim() == 2 else x_TD.reshape(-1, width)
    if rows_TD.stride(1) != 1:
        rows_TD = rows_TD.contiguous()
    if len(rows_TD):
        _rms_norm_kernel[(len(rows_TD),)](
            rows_TD,
            weight_D,
            out_TD,
            rows_TD.stride(0),
            eps,
            width,
            BLOCK_D=triton.next_power_of_2(width),
            num_warps=_WARPS_OF_WIDE_ROWS if width > _WIDE else 4,
            **pdl_options(x_TD.device),
        )
    return out_TD


@triton.jit
def _rms_norm_kernel(
    x, weight, out, stride, eps, D, BLOCK_D: tl.constexpr, PDL: tl.constexpr = False
):
    await_inputs(PDL)
    t = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    is_in = d < D
    wide = tl.load(x + t * stride + d, mask=is_in, other=0.0).to(tl.float32)
    scaled = wide * tl.rsqrt(tl.sum(wide * wide, 0) / D + eps)
    rounded = scaled.to(out.dtype.element_ty).to(tl.float32)
    factor = tl.load(weight + d, mask=is_in, other=0.0).to(tl.float32)
    tl.store(out + t * D + d, (rounded * factor).to(out.dtype.element_ty), mask=is_in)
