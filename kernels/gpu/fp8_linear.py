"""Round rows to FP8 e4m3 by one fixed scale, in one pass.

    out[t] = clamp(x[t] / scale)

Shape legend: T rows, I inputs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK_I = 2048  # of bfloat16: 32 bytes for each of 128 threads


def quantize_fp8_triton(x_TI: torch.Tensor, input_scale: torch.Tensor) -> torch.Tensor:
    """`ostro.kernels.fp8_linear.quantize_fp8` by Triton."""
    num_rows, width = x_TI.shape
    out_TI = torch.empty(num_rows, width, dtype=torch.float8_e4m3fn, device=x_TI.device)
    if x_TI.stride(1) != 1:
        x_TI = x_TI.contiguous()
    if num_rows:
        block = min(_BLOCK_I, triton.next_power_of_2(width))
        _quantize_fp8_kernel[(num_rows, triton.cdiv(width, block))](
            x_TI, input_scale, out_TI, x_TI.stride(0), width, BLOCK_I=block, num_warps=4
        )
    return out_TI


@triton.jit
def _quantize_fp8_kernel(x, scale, out, stride, width, BLOCK_I: tl.constexpr):
    t = tl.program_id(0).to(tl.int64)  # int64: t * stride passes 2**31 at 512K rows
    i = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    value = tl.load(x + t * stride + i, mask=i < width, other=0.0).to(tl.float32)
    value = in_units(value, tl.load(scale))
    tl.store(out + t * width + i, value.to(out.dtype.element_ty), mask=i < width)


@triton.jit
def in_units(value, scale):  # noqa: ANN201 - not Python
    """Values over a scale, within what e4m3 holds."""
    value = tl.div_rn(value, scale)  # `/` is off by two ulp, which turns ties
    # 448 is the largest e4m3. A NaN stays one, so that a broken row shows.
    value = tl.maximum(value, -448.0, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(value, 448.0, propagate_nan=tl.PropagateNan.ALL)
