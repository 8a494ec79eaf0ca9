"""Grouped matrix products of bf16 rows with NVFP4 weights; see `ostro.kernels.nvfp4_experts`.

    hidden[p] = silu(gate[e] x[p]) * (up[e] x[p])
    y[pair of p] = weight[pair] * down[e] hidden[p]

As `grouped_gemm`, but that the weights' box holds codes, which become bf16 in the registers from
which Hopper's tensor cores take the left factor; on Blackwell they go through tensor memory. A code
shifted into place is worth 2^-126 of itself, a scale comes as 2^118 of itself, and the 2^8 that is
missing joins the unit at the end.

What limits few rows is the number of instructions, 15 for 8 weights, about as long as their bytes
take. So all of a block goes into one product, and everything up to the product of a code and its
scale is arithmetic on words: pairs of bf16 that one instruction multiplies.

Shape legend: A pairs, E local experts, D hidden, F expert hidden, H = 2F, B blocks, W words,
S scale words.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import triton
import triton.language as tl

from ostro.kernels.gpu.dependent_launch import await_inputs, pdl_options
from ostro.kernels.gpu.expert_schedule import ExpertSchedule
from ostro.kernels.gpu.grouped_gemm import boxes, grid
from ostro.kernels.gpu.tiles import FP4, Tile, tile
from ostro.kernels.grouped_gemm import swiglu
from ostro.kernels.nvfp4_experts import Nvfp4Experts, down_values, gate_up_values
from ostro.kernels.nvfp4_linear import BLOCK_INPUTS, SCALE_WORDS, WORDS


def gate_up_nvfp4_triton(
    x_AD: torch.Tensor, experts: Nvfp4Experts, schedule: ExpertSchedule, cut: Tile | None = None
) -> torch.Tensor:
    """SwiGLU of each sorted row with its expert's gate and up matrices.

    Args:
        x_AD: bf16 rows in the order of `schedule`.
        experts: Of this shard and layer.
        schedule: Of the rows.
        cut: How to launch; None takes what is known to be fastest.

    Returns:
        hidden_AF in bf16; positions without a pair are not written.

    Raises:
        ValueError: D does not fill 16-byte steps.

    Example:
        x [[1.]], gate 1 and up 2 give silu(1) * 2 = 1.4621.
    """
    stack = experts.gate_up
    inner = stack.num_outputs() // 2
    if cut is None:
        cut = tile("gate_up", FP4, schedule.block_rows, x_AD.device)
    out_AF = x_AD.new_empty(len(x_AD), inner)
    _gate_up_nvfp4_kernel[grid(cut, schedule, inner, x_AD.device)](
        boxes(x_AD, cut.block_rows, cut.block_in),
        word_boxes(stack.words_EBOW, cut),
        stack.scales_EBOS,
        experts.gate_unit_E,
        experts.up_unit_E,
        out_AF,
        schedule.offsets_E1,
        schedule.tiles_N2,
        schedule.num_tiles,
        inner,
        stack.num_inputs,
        BLOCK_F=cut.block_out,
        **nvfp4_options(cut, x_AD.device),
    )
    return out_AF


def down_nvfp4_triton(
    hidden_AF: torch.Tensor,
    experts: Nvfp4Experts,
    weight_RK: torch.Tensor,
    schedule: ExpertSchedule,
    out_dtype: torch.dtype,
    cut: Tile | None = None,
) -> torch.Tensor:
    """Each sorted row times its expert's down matrix and its gate weight, back at its pair.

    Args:
        hidden_AF: bf16 rows in the order of `schedule`.
        experts: Of this shard and layer.
        weight_RK: float32 gate weights.
        schedule: Of the rows.
        out_dtype: Dtype of the result.
        cut: How to launch; None takes what is known to be fastest.

    Returns:
        y_AD: row r * K + k is the k-th expert's of row r; pairs without a local expert are not
        written.

    Raises:
        ValueError: F does not fill 16-byte steps.

    Example:
        hidden [[2.]], down 3, weight 0.5 give [[3.]].
    """
    stack = experts.down
    hidden = stack.num_outputs()
    if cut is None:
        cut = tile("down", FP4, schedule.block_rows, hidden_AF.device)
    out_AD = hidden_AF.new_empty(len(hidden_AF), hidden, dtype=out_dtype)
    _down_nvfp4_kernel[grid(cut, schedule, hidden, hidden_AF.device)](
        boxes(hidden_AF, cut.block_rows, cut.block_in),
        word_boxes(stack.words_EBOW, cut),
        stack.scales_EBOS,
        experts.down_unit_E,
        weight_RK.contiguous(),
        out_AD,
        schedule.order_A,
        schedule.offsets_E1,
        schedule.tiles_N2,
        schedule.num_tiles,
        hidden,
        stack.num_inputs,
        BLOCK_D=cut.block_out,
        **nvfp4_options(cut, hidden_AF.device),
    )
    return out_AD


def gate_up_nvfp4_reference(
    x_AD: torch.Tensor, experts: Nvfp4Experts, schedule: ExpertSchedule
) -> torch.Tensor:
    """Meaning of `gate_up_nvfp4_triton`, only the positions that mean something."""
    offsets = schedule.offsets_E1.tolist()
    inner = experts.gate_up.num_outputs() // 2
    out_AF = torch.zeros(offsets[-1], inner, device=x_AD.device)
    for e, (start, stop) in enumerate(itertools.pairwise(offsets)):
        if stop > start:  # an expert's float32 values are 64 MB
            out_AF[start:stop] = swiglu(x_AD[start:stop].float() @ gate_up_values(experts, e).T)
    return out_AF.to(x_AD.dtype)


def down_nvfp4_reference(
    hidden_AF: torch.Tensor,
    experts: Nvfp4Experts,
    weight_RK: torch.Tensor,
    schedule: ExpertSchedule,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """Meaning of `down_nvfp4_triton`; zeros for pairs without a local expert."""
    offsets = schedule.offsets_E1.tolist()
    out_AD = torch.zeros(weight_RK.numel(), experts.down.num_outputs(), device=hidden_AF.device)
    for e, (start, stop) in enumerate(itertools.pairwise(offsets)):
        if stop > start:
            pairs = schedule.order_A[start:stop].long()
            y = hidden_AF[start:stop].float() @ down_values(experts, e).T
            out_AD[pairs] = y * weight_RK.flatten()[pairs][:, None]
    return out_AD.to(out_dtype)


def word_boxes(words: torch.Tensor, cut: Tile) -> Any:
    """Codes as kernels load them: a block of some outputs is one run of memory."""
    return boxes(words.view(-1, WORDS), cut.block_out, WORDS)


def nvfp4_options(cut: Tile, device: torch.device) -> dict[str, int]:
    """What all launches of NVFP4 products have in common."""
    return {
        "BLOCK_ROWS": cut.block_rows,
        "BLOCK_IN": cut.block_in,
        "BLOCK": BLOCK_INPUTS,
        "S": SCALE_WORDS,
        "STAGES": cut.num_stages,
        "num_warps": cut.num_warps,
        **pdl_options(device),
        "num_stages": cut.num_stages,
    }


@triton.jit
def _gate_up_nvfp4_kernel(
    x,
    words,
    scales,
    gate_unit,
    up_unit,
    out,
    offsets,
    tiles,
    num_tiles,
    F,
    D,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK: tl.constexpr,
    S: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr = False,
):
    await_inputs(PDL)
    num_slices = tl.cdiv(F, BLOCK_F)
    num_blocks = tl.cdiv(D, BLOCK)
    total = tl.load(num_tiles) * num_slices
    for work in range(tl.program_id(0), total, tl.num_programs(0)):
        e = tl.load(tiles + work // num_slices * 2)
        first = tl.load(tiles + work // num_slices * 2 + 1)
        start_f = work % num_slices * BLOCK_F
        f = start_f + tl.arange(0, BLOCK_F)
        gate = tl.zeros((BLOCK_F, BLOCK_ROWS), tl.float32)
        up = tl.zeros((BLOCK_F, BLOCK_ROWS), tl.float32)
        for b in tl.range(0, num_blocks, num_stages=STAGES):
            row = (e * num_blocks + b) * 2 * F + start_f
            gate_words = words.load([row, 0])
            up_words = words.load([row + F, 0])
            gate_scales = _load_scales(scales, row, f < F, BLOCK_F, S)
            up_scales = _load_scales(scales, row + F, f < F, BLOCK_F, S)
            for part in tl.static_range(BLOCK // BLOCK_IN):
                x_IR = x.load([first, b * BLOCK + part * BLOCK_IN]).T
                w = _values(gate_words, gate_scales, part, BLOCK_IN)
                gate = tl.dot(w, x_IR, gate)
                w = _values(up_words, up_scales, part, BLOCK_IN)
                up = tl.dot(w, x_IR, up)
        gate = gate * (tl.load(gate_unit + e) * 256.0)
        up = up * (tl.load(up_unit + e) * 256.0)
        hidden = gate * tl.sigmoid(gate) * up
        p = first + tl.arange(0, BLOCK_ROWS)
        is_out = (p < tl.load(offsets + e + 1))[:, None] & (f < F)[None, :]
        place = p.to(tl.int64)[:, None] * F + f[None, :]
        tl.store(out + place, tl.trans(hidden).to(out.dtype.element_ty), mask=is_out)


@triton.jit
def _down_nvfp4_kernel(
    hidden,
    words,
    scales,
    unit,
    weight,
    out,
    order,
    offsets,
    tiles,
    num_tiles,
    D,
    F,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK: tl.constexpr,
    S: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr = False,
):
    await_inputs(PDL)
    num_slices = tl.cdiv(D, BLOCK_D)
    num_blocks = tl.cdiv(F, BLOCK)
    total = tl.load(num_tiles) * num_slices
    for work in range(tl.program_id(0), total, tl.num_programs(0)):
        e = tl.load(tiles + work // num_slices * 2)
        first = tl.load(tiles + work // num_slices * 2 + 1)
        start_d = work % num_slices * BLOCK_D
        sum_DR = product_nvfp4(
            hidden,
            words,
            scales,
            first,
            e * num_blocks,
            num_blocks,
            start_d,
            D,
            BLOCK_ROWS,
            BLOCK_D,
            BLOCK_IN,
            BLOCK,
            S,
            STAGES,
        )
        sum_DR = sum_DR * (tl.load(unit + e) * 256.0)
        d = start_d + tl.arange(0, BLOCK_D)
        p = first + tl.arange(0, BLOCK_ROWS)
        is_pair = p < tl.load(offsets + e + 1)
        pair = tl.load(order + p, mask=is_pair, other=0)
        y = tl.trans(sum_DR) * tl.load(weight + pair, mask=is_pair, other=0.0)[:, None]
        place = pair.to(tl.int64)[:, None] * D + d[None, :]
        is_out = is_pair[:, None] & (d < D)[None, :]
        tl.store(out + place, y.to(out.dtype.element_ty), mask=is_out)


@triton.jit
def product_nvfp4(  # noqa: ANN201 - not Python
    x,
    words,
    scales,
    first,
    first_block,
    num_blocks,
    start,
    num_out,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK: tl.constexpr,
    S: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Outputs from `start` of rows from `first` over 256 and the unit: [BLOCK_OUT, BLOCK_ROWS].

    The matrix is the blocks from `first_block` of `words` and `scales`.
    """
    o = start + tl.arange(0, BLOCK_OUT)
    sum_OR = tl.zeros((BLOCK_OUT, BLOCK_ROWS), tl.float32)
    for b in tl.range(0, num_blocks, num_stages=STAGES):
        row = (first_block + b) * num_out + start
        block_words = words.load([row, 0])
        block_scales = _load_scales(scales, row, o < num_out, BLOCK_OUT, S)
        for part in tl.static_range(BLOCK // BLOCK_IN):
            x_IR = x.load([first, b * BLOCK + part * BLOCK_IN]).T
            w = _values(block_words, block_scales, part, BLOCK_IN)
            sum_OR = tl.dot(w, x_IR, sum_OR)
    return sum_OR


@triton.jit
def _load_scales(scales, row, is_in, N: tl.constexpr, S: tl.constexpr):
    """Scale words of N outputs, [N, S]."""
    n = row.to(tl.int64) + tl.arange(0, N)
    s = tl.arange(0, S)
    return tl.load(scales + n[:, None] * S + s[None, :], mask=is_in[:, None], other=0)


@triton.jit
def _values(words, scales, part: tl.constexpr, BLOCK_IN: tl.constexpr):
    """Some of a block's weights as bf16, times 2^-8: [N, BLOCK_IN]."""
    N: tl.constexpr = words.shape[0]
    if BLOCK_IN == 128:
        first = tl.join(_field(words, scales, 0), _field(words, scales, 1))
        last = tl.join(_field(words, scales, 2), _field(words, scales, 3))
        values = tl.join(first, last).permute(0, 3, 2, 1).reshape(N, 128)
    else:
        first = tl.join(_field(words, scales, 2 * part), _field(words, scales, 2 * part + 1))
        values = first.permute(0, 2, 1).reshape(N, 64)
    return values


@triton.jit
def _field(words, scales, FIELD: tl.constexpr):
    """The weights of one field of every word, [N, 32]."""
    N: tl.constexpr = words.shape[0]
    W: tl.constexpr = words.shape[1]
    S: tl.constexpr = scales.shape[1]
    words = words.to(tl.uint32, bitcast=True)
    if FIELD < 3:
        code = (words << (3 * FIELD)) & 0x81C081C0
    else:
        code = (words << 1) & 0x80008000
        code = code | ((words >> 3) & 0x01800180) | ((words >> 7) & 0x00400040)
    # One scale in both halves of a word: four bits up, and 235 more in the exponent.
    byte = (scales.to(tl.uint32, bitcast=True) >> (8 * FIELD)) & 0xFF
    scale = byte * 0x00100010 + 0x75807580
    scale = tl.broadcast_to(scale[:, :, None], (N, S, W // S)).reshape(N, W)
    low = _low_half(code) * _low_half(scale)
    high = _low_half(code >> 16) * _low_half(scale >> 16)
    return tl.join(low, high).reshape(N, 2 * W)


@triton.jit
def _low_half(word):
    return (word & 0xFFFF).to(tl.uint16).to(tl.bfloat16, bitcast=True)
