"""FP8 linear layers on a GPU: rounding rows by one fixed scale, and products of very few rows.

    out[t] = clamp(x[t] / scale)

One token's product is bound by the weight's bytes, and a tensor core has nothing to do: each
program sums up whole rows of the weight, all of which it has asked for at once.

Shape legend: T rows, I inputs, O outputs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ostro.kernels.fp8_linear import Fp8Rows, Fp8Weight

MAX_FEW_ROWS = 2
_FEW_OUTPUTS = 4
_FEW_INPUTS = 4096  # at once; 16 KB of weight for each program
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


def fp8_linear_triton(x_TI: torch.Tensor | Fp8Rows, weight: Fp8Weight) -> torch.Tensor:
    """`ostro.kernels.fp8_linear.fp8_linear` of at most `MAX_FEW_ROWS` rows by Triton.

    Rows that are not rounded yet are rounded by every program for itself, which takes less than a
    launch more.
    """
    rows_TI = x_TI.values_TI if isinstance(x_TI, Fp8Rows) else x_TI
    (num_rows, num_in), num_out = rows_TI.shape, len(weight.values_OI)
    out_TO = torch.empty(num_rows, num_out, dtype=x_TI.dtype, device=rows_TI.device)
    if rows_TI.stride(1) != 1:
        rows_TI = rows_TI.contiguous()
    if num_rows:
        _fp8_linear_kernel[(triton.cdiv(num_out, _FEW_OUTPUTS),)](
            rows_TI,
            weight.values_OI,
            weight.scale,
            weight.input_scale,
            out_TO,
            rows_TI.stride(0),
            num_out,
            num_in,
            T=num_rows,
            IS_ROUNDED=isinstance(x_TI, Fp8Rows),
            BLOCK_T=triton.next_power_of_2(num_rows),
            BLOCK_O=_FEW_OUTPUTS,
            BLOCK_I=min(_FEW_INPUTS, triton.next_power_of_2(num_in)),
            num_warps=8,
        )
    return out_TO


@triton.jit
def _fp8_linear_kernel(
    x,
    values,
    scale,
    input_scale,
    out,
    stride,
    num_out,
    num_in,
    T: tl.constexpr,
    IS_ROUNDED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    unit = tl.load(input_scale)
    factor = tl.load(scale) * unit
    t = tl.arange(0, BLOCK_T)
    sums = tl.zeros((BLOCK_O, BLOCK_T), tl.float32)
    for start in range(0, num_in, BLOCK_I):
        i = start + tl.arange(0, BLOCK_I)
        is_in = (o < num_out)[:, None] & (i < num_in)[None, :]
        place = o.to(tl.int64)[:, None] * num_in + i[None, :]
        w = tl.load(values + place, mask=is_in, other=0.0).to(tl.float32)
        for row in tl.static_range(T):
            value = tl.load(x + row * stride + i, mask=i < num_in, other=0.0)
            if not IS_ROUNDED:
                value = in_units(value.to(tl.float32), unit).to(values.dtype.element_ty)
            total = tl.sum(w * value.to(tl.float32)[None, :], 1)
            sums += tl.where((t == row)[None, :], total[:, None], 0.0)
    place = t[None, :] * num_out + o[:, None]
    is_out = (o < num_out)[:, None] & (t < T)[None, :]
    tl.store(out + place, (sums * factor).to(out.dtype.element_ty), mask=is_out)


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
