"""Products of rows with one NVFP4 matrix: the loop of `nvfp4_gemm` without its groups.

The weight is the left factor there too, so that 16 rows fill a tensor core, and inputs are summed
up in the same order whatever the tile.

Shape legend: T rows, I inputs, O outputs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ostro.kernels.gpu.dependent_launch import await_inputs
from ostro.kernels.gpu.grouped_gemm import boxes
from ostro.kernels.gpu.nvfp4_gemm import nvfp4_options, product_nvfp4, word_boxes
from ostro.kernels.gpu.tiles import FP4, Tile, num_processors, num_programs, tile
from ostro.kernels.nvfp4_linear import Nvfp4Weight

_STEP_BYTES = 16  # to which boxes want a matrix and its rows aligned
_LEAST_ROWS, _FEW_ROWS, _MANY_ROWS = 16, 64, 128


def nvfp4_linear_triton(
    x_TI: torch.Tensor, weight: Nvfp4Weight, cut: Tile | None = None
) -> torch.Tensor:
    """`ostro.kernels.nvfp4_linear.nvfp4_linear` by Triton; `cut` None takes the usual launch."""
    num_rows, num_out = len(x_TI), len(weight.unit_O)
    out_TO = x_TI.new_empty(num_rows, num_out)
    if not num_rows:
        return out_TO
    device = x_TI.device
    if cut is None:
        cut = tile("linear", FP4, linear_rows(num_rows, num_out, device), device)
    num_tiles = triton.cdiv(num_rows, cut.block_rows) * triton.cdiv(num_out, cut.block_out)
    _nvfp4_linear_kernel[(min(num_programs(cut, device), num_tiles),)](
        boxes(_aligned(x_TI.to(torch.bfloat16)), cut.block_rows, cut.block_in),
        word_boxes(weight.words_BOW, cut),
        weight.scales_BOS,
        weight.unit_O,
        out_TO,
        num_rows,
        num_out,
        weight.num_inputs,
        BLOCK_O=cut.block_out,
        **nvfp4_options(cut, device),
    )
    return out_TO


def linear_rows(num_rows: int, num_outputs: int, device: torch.device) -> int:
    """Rows of a tile: the largest ones only where they give every multiprocessor one.

    Example:
        for 4096 outputs on an H200, 3 rows give 16, 200 give 64, 2048 give 128.
    """
    num_large = triton.cdiv(num_rows, _MANY_ROWS) * triton.cdiv(num_outputs, _MANY_ROWS)
    if num_rows > _FEW_ROWS and num_large >= num_processors(device):
        return _MANY_ROWS
    return min(max(_LEAST_ROWS, 1 << (num_rows - 1).bit_length()), _FEW_ROWS)


def _aligned(x_TI: torch.Tensor) -> torch.Tensor:
    """The rows where boxes can be cut out of them."""
    steps = (x_TI.data_ptr(), x_TI.stride(0) * x_TI.element_size())
    if x_TI.stride(1) == 1 and not any(step % _STEP_BYTES for step in steps):
        return x_TI
    # Not `contiguous`, which leaves one row as it is, whatever its stride.
    return x_TI.clone(memory_format=torch.contiguous_format)


@triton.jit(do_not_specialize=["num_rows"])
def _nvfp4_linear_kernel(
    x,
    words,
    scales,
    unit,
    out,
    num_rows,
    num_out,
    num_in,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK: tl.constexpr,
    S: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr = False,
):
    await_inputs(PDL)
    num_slices = tl.cdiv(num_out, BLOCK_O)
    total = tl.cdiv(num_rows, BLOCK_ROWS) * num_slices
    for work in range(tl.program_id(0), total, tl.num_programs(0)):
        first = work // num_slices * BLOCK_ROWS
        start_o = work % num_slices * BLOCK_O
        sum_OT = product_nvfp4(
            x,
            words,
            scales,
            first,
            0,
            tl.cdiv(num_in, BLOCK),
            start_o,
            num_out,
            BLOCK_ROWS,
            BLOCK_O,
            BLOCK_IN,
            BLOCK,
            S,
            STAGES,
        )
        o = start_o + tl.arange(0, BLOCK_O)
        sum_OT = sum_OT * (tl.load(unit + o, mask=o < num_out, other=0.0) * 256.0)[:, None]
        t = first + tl.arange(0, BLOCK_ROWS)
        place = t.to(tl.int64)[:, None] * num_out + o[None, :]
        is_out = (t < num_rows)[:, None] & (o < num_out)[None, :]
        tl.store(out + place, tl.trans(sum_OT).to(out.dtype.element_ty), mask=is_out)
