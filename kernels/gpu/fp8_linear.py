"""FP8 linear layers on a GPU: rounding rows by one fixed scale, and products of very few rows.

    out[t] = clamp(x[t] / scale)

One token's product is bound by the weight's bytes, and a tensor core has nothing to do: each
program keeps the token and sums up whole rows of the weight, the next ones on their way.

Shape legend: T rows, I inputs, O outputs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ostro.kernels.fp8_linear import Fp8Rows, Fp8Weight
from ostro.kernels.gpu.dependent_launch import (
    await_inputs,
    await_previous,
    let_next_start,
    pdl_options,
    prefetch,
)
from ostro.kernels.gpu.tiles import num_processors

MAX_FEW_ROWS, MAX_FEW_INPUTS = 2, 16_384
_FEW_VALUES = 16_384  # of a weight at once, for each program
_FEW_STAGES = 4  # of them on their way
_FEW_PROGRAMS = 2  # of a processor
_LINE = 128  # bytes that a prefetch brings
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
            x_TI,
            input_scale,
            out_TI,
            x_TI.stride(0),
            width,
            BLOCK_I=block,
            num_warps=4,
            **pdl_options(x_TI.device),
        )
    return out_TI


def fp8_linear_triton(x_TI: torch.Tensor | Fp8Rows, weight: Fp8Weight) -> torch.Tensor:
    """`ostro.kernels.fp8_linear.fp8_linear` of at most `MAX_FEW_ROWS` rows by Triton.

    Rows that are not rounded yet are rounded by every program for itself, which takes less than a
    launch more. I is at most `MAX_FEW_INPUTS`.
    """
    rows_TI = x_TI.values_TI if isinstance(x_TI, Fp8Rows) else x_TI
    (num_rows, num_in), num_out = rows_TI.shape, len(weight.values_OI)
    out_TO = torch.empty(num_rows, num_out, dtype=x_TI.dtype, device=rows_TI.device)
    if rows_TI.stride(1) != 1:
        rows_TI = rows_TI.contiguous()
    if num_rows:
        num_programs, options = few_rows_launch(weight, rows_TI.device)
        _fp8_linear_kernel[(num_programs,)](
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
            **options,
        )
    return out_TO


def few_rows_launch(weight: Fp8Weight, device: torch.device) -> tuple[int, dict[str, int]]:
    """Programs, and what a kernel takes that multiplies very few rows by such a weight."""
    num_out, num_in = weight.values_OI.shape
    block_in = triton.next_power_of_2(num_in)
    block_out = _FEW_VALUES // block_in
    num_programs = min(triton.cdiv(num_out, block_out), _FEW_PROGRAMS * num_processors(device))
    return num_programs, {
        "BLOCK_O": block_out,
        "BLOCK_I": block_in,
        "STAGES": _FEW_STAGES,
        "LINES": _FEW_VALUES // _LINE,
        "LINE": _LINE,
        "num_warps": 8,
        **pdl_options(device),
    }


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
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    STAGES: tl.constexpr,
    LINES: tl.constexpr,
    LINE: tl.constexpr,
    PDL: tl.constexpr = False,
):
    let_next_start(PDL)
    i = tl.arange(0, BLOCK_I)
    unit = tl.load(input_scale)
    factor = tl.load(scale) * unit
    first_block, step = tl.program_id(0), tl.num_programs(0)
    prefetch_weight(values, first_block, step, num_out, num_in, BLOCK_O, STAGES, LINES, LINE, PDL)
    await_previous(PDL)
    first = tl.load(x + i, mask=i < num_in, other=0.0)
    last = tl.load(x + (T - 1) * stride + i, mask=i < num_in, other=0.0)
    if not IS_ROUNDED:
        first = in_units(first.to(tl.float32), unit).to(values.dtype.element_ty)
        last = in_units(last.to(tl.float32), unit).to(values.dtype.element_ty)
    first, last = first.to(tl.float32), last.to(tl.float32)
    multiply_rows(
        first,
        last,
        values,
        factor,
        out,
        first_block,
        step,
        num_out,
        num_in,
        T,
        BLOCK_O,
        BLOCK_I,
        STAGES,
    )


@triton.jit
def prefetch_weight(
    values,
    first_block,
    step,
    num_out,
    num_in,
    BLOCK_O: tl.constexpr,
    STAGES: tl.constexpr,
    LINES: tl.constexpr,
    LINE: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """Bring what `multiply_rows` loads first on its way, while the kernel ahead ends."""
    if PDL:
        for stage in tl.static_range(STAGES):
            block = first_block + stage * step
            line = block.to(tl.int64) * (BLOCK_O * num_in) + tl.arange(0, LINES) * LINE
            prefetch(values + tl.minimum(line, num_out.to(tl.int64) * num_in - 1), PDL)


@triton.jit
def multiply_rows(
    first,
    last,
    values,
    factor,
    out,
    first_block,
    step,
    num_out,
    num_in,
    T: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    """The rows of a weight in every `step`-th block of outputs, times the first and last token."""
    i = tl.arange(0, BLOCK_I)
    for block in tl.range(first_block, tl.cdiv(num_out, BLOCK_O), step, num_stages=STAGES):
        o = block * BLOCK_O + tl.arange(0, BLOCK_O)
        is_in = (o < num_out)[:, None] & (i < num_in)[None, :]
        place = o.to(tl.int64)[:, None] * num_in + i[None, :]
        w = tl.load(values + place, mask=is_in, other=0.0).to(tl.float32)
        total = tl.sum(w * first[None, :], 1) * factor
        tl.store(out + o, total.to(out.dtype.element_ty), mask=o < num_out)
        if T == 2:
            total = tl.sum(w * last[None, :], 1) * factor
            tl.store(out + num_out + o, total.to(out.dtype.element_ty), mask=o < num_out)


@triton.jit
def _quantize_fp8_kernel(
    x, scale, out, stride, width, BLOCK_I: tl.constexpr, PDL: tl.constexpr = False
):
    await_inputs(PDL)
    t = tl.program_id(0).to(tl.int64)  # int64: t * stride passes 2**31 at 512K rows
    i = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    value = tl.load(x + t * stride + i, mask=i < width, other=0.0).to(tl.float32)
    value = in_units(value, tl.load(scale))
    tl.store(out + t * width + i, value.to(out.dtype.element_ty), mask=i < width)


@triton.jit
def in_units(value, scale):  # noqa: ANN201 - not Python
    """Values over a scale, within what e4m3 holds."""
    return within_fp8(tl.div_rn(value, scale))  # `/` is off by two ulp, which turns ties


@triton.jit
def within_fp8(value):  # noqa: ANN201 - not Python
    """Values within +-448, the largest e4m3. A NaN stays one, so that a broken row shows."""
    value = tl.maximum(value, -448.0, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(value, 448.0, propagate_nan=tl.PropagateNan.ALL)
