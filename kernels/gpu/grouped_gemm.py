"""Grouped matrix products over rows sorted by expert: gate and up with SwiGLU, and down.

    hidden[p] = silu(gate[e] x[p]) * (up[e] x[p])
    y[pair of p] = weight[pair] * down[e] hidden[p]

The weight is the left factor, sum[outputs, rows] = W x^T: tensor cores want 64 there, and the side
of the rows takes 8 or 16. Otherwise FP8 with 16 rows compiles to conversions and half-precision
products. Programs are persistent; the outputs of one tile of rows run side by side, so that they
find those rows in the cache. Both factors come as boxes (TMA), which need rows of 16-byte steps.

FP8: weights and rows are e4m3 with one scale per expert, sums float32, and the hidden rows leave as
e4m3 in units of the down projection's scale.

Shape legend: A pairs, E local experts, D hidden, F expert hidden, H = 2F.
"""

from __future__ import annotations

import itertools

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from ostro.kernels.gpu.dependent_launch import await_inputs, pdl_options
from ostro.kernels.gpu.expert_schedule import ExpertSchedule
from ostro.kernels.gpu.fp8_linear import within_fp8
from ostro.kernels.gpu.tiles import Tile, num_programs, tile

_FP8 = torch.float8_e4m3fn
# FP8 products on Hopper sum in about 14 bits; every so many inputs they move to float32.
_MAX_NARROW_SUM = 128


def gate_up_triton(
    x_AD: torch.Tensor,
    gate_up_EHD: torch.Tensor,
    schedule: ExpertSchedule,
    *,
    scale_E: torch.Tensor | None = None,
    input_scale_E: torch.Tensor | None = None,
    next_input_scale_E: torch.Tensor | None = None,
    cut: Tile | None = None,
) -> torch.Tensor:
    """SwiGLU of each sorted row with its expert's gate and up matrices.

    Args:
        x_AD: Rows in the order of `schedule`.
        gate_up_EHD: Gate rows [0, F), up rows [F, 2F) of each expert, in the dtype of `x_AD`.
        schedule: Of the rows.
        scale_E: FP8 only: float32 value of one unit of the weight.
        input_scale_E: FP8 only: likewise of `x_AD`.
        next_input_scale_E: FP8 only: likewise of the result.
        cut: How to launch; None takes what is known to be fastest.

    Returns:
        hidden_AF in the dtype of `x_AD`; positions without a pair are not written.

    Raises:
        ValueError: D does not fill 16-byte steps.

    Example:
        x [[1.]], gate 1 and up 2 give silu(1) * 2 = 1.4621.
    """
    _num_experts, num_rows_of_weight, hidden = gate_up_EHD.shape
    inner = num_rows_of_weight // 2
    if cut is None:
        cut = tile("gate_up", gate_up_EHD.dtype, schedule.block_rows, x_AD.device)
    out_AF = x_AD.new_empty(len(x_AD), inner)
    _gate_up_kernel[grid(cut, schedule, inner, x_AD.device)](
        boxes(x_AD, cut.block_rows, cut.block_in),
        boxes(gate_up_EHD.view(-1, hidden), cut.block_out, cut.block_in),
        scale_E,
        input_scale_E,
        next_input_scale_E,
        out_AF,
        schedule.offsets_E1,
        schedule.tiles_N2,
        schedule.num_tiles,
        inner,
        hidden,
        BLOCK_ROWS=cut.block_rows,
        BLOCK_F=cut.block_out,
        BLOCK_D=cut.block_in,
        **launch_options(cut, x_AD.dtype, x_AD.device),
    )
    return out_AF


def down_triton(
    hidden_AF: torch.Tensor,
    down_EDF: torch.Tensor,
    weight_RK: torch.Tensor,
    schedule: ExpertSchedule,
    out_dtype: torch.dtype,
    *,
    scale_E: torch.Tensor | None = None,
    input_scale_E: torch.Tensor | None = None,
    cut: Tile | None = None,
) -> torch.Tensor:
    """Each sorted row times its expert's down matrix and its gate weight, back at its pair.

    Args:
        hidden_AF: Rows in the order of `schedule`.
        down_EDF: In the dtype of `hidden_AF`.
        weight_RK: float32 gate weights.
        schedule: Of the rows.
        out_dtype: Dtype of the result.
        scale_E: FP8 only: float32 value of one unit of the weight.
        input_scale_E: FP8 only: likewise of `hidden_AF`.
        cut: How to launch; None takes what is known to be fastest.

    Returns:
        y_AD: row r * K + k is the k-th expert's of row r; pairs without a local expert are not
        written.

    Raises:
        ValueError: F does not fill 16-byte steps.

    Example:
        hidden [[2.]], down 3, weight 0.5 give [[3.]].
    """
    _num_experts, hidden, inner = down_EDF.shape
    if cut is None:
        cut = tile("down", down_EDF.dtype, schedule.block_rows, hidden_AF.device)
    out_AD = hidden_AF.new_empty(len(hidden_AF), hidden, dtype=out_dtype)
    _down_kernel[grid(cut, schedule, hidden, hidden_AF.device)](
        boxes(hidden_AF, cut.block_rows, cut.block_in),
        boxes(down_EDF.view(-1, inner), cut.block_out, cut.block_in),
        scale_E,
        input_scale_E,
        weight_RK.contiguous(),
        out_AD,
        schedule.order_A,
        schedule.offsets_E1,
        schedule.tiles_N2,
        schedule.num_tiles,
        hidden,
        inner,
        BLOCK_ROWS=cut.block_rows,
        BLOCK_D=cut.block_out,
        BLOCK_F=cut.block_in,
        **launch_options(cut, hidden_AF.dtype, hidden_AF.device),
    )
    return out_AD


def gate_up_reference(
    x_AD: torch.Tensor,
    gate_up_EHD: torch.Tensor,
    schedule: ExpertSchedule,
    *,
    scale_E: torch.Tensor | None = None,
    input_scale_E: torch.Tensor | None = None,
    next_input_scale_E: torch.Tensor | None = None,
) -> torch.Tensor:
    """Meaning of `gate_up_triton`, only the positions that mean something."""
    offsets = schedule.offsets_E1.tolist()
    out_AF = torch.zeros(offsets[-1], gate_up_EHD.shape[1] // 2, device=x_AD.device)
    for e, (start, stop) in enumerate(itertools.pairwise(offsets)):
        both = x_AD[start:stop].float() @ gate_up_EHD[e].float().T
        if scale_E is not None and input_scale_E is not None:
            both = both * (scale_E[e] * input_scale_E[e])
        gate, up = both.chunk(2, dim=1)
        out_AF[start:stop] = torch.nn.functional.silu(gate) * up
        if next_input_scale_E is not None:
            out_AF[start:stop] /= next_input_scale_E[e]
    return out_AF.clamp(-448.0, 448.0).to(_FP8) if x_AD.dtype == _FP8 else out_AF.to(x_AD.dtype)


def down_reference(
    hidden_AF: torch.Tensor,
    down_EDF: torch.Tensor,
    weight_RK: torch.Tensor,
    schedule: ExpertSchedule,
    out_dtype: torch.dtype,
    *,
    scale_E: torch.Tensor | None = None,
    input_scale_E: torch.Tensor | None = None,
) -> torch.Tensor:
    """Meaning of `down_triton`; zeros for pairs without a local expert."""
    offsets = schedule.offsets_E1.tolist()
    out_AD = torch.zeros(weight_RK.numel(), down_EDF.shape[1], device=hidden_AF.device)
    for e, (start, stop) in enumerate(itertools.pairwise(offsets)):
        pairs = schedule.order_A[start:stop].long()
        y = hidden_AF[start:stop].float() @ down_EDF[e].float().T
        if scale_E is not None and input_scale_E is not None:
            y = y * (scale_E[e] * input_scale_E[e])
        out_AD[pairs] = y * weight_RK.flatten()[pairs][:, None]
    return out_AD.to(out_dtype)


def boxes(matrix: torch.Tensor, rows: int, columns: int) -> TensorDescriptor:
    """A matrix as kernels load it, so many rows and columns at a time.

    Raises:
        ValueError: Its rows do not fill 16-byte steps.
    """
    step_bytes = matrix.stride(0) * matrix.element_size()
    if step_bytes % 16:
        raise ValueError(
            f"rows of {matrix.shape[1]} x {matrix.element_size()} bytes do not fill 16-byte steps; "
            f"pad them to a multiple of {16 // matrix.element_size()}"
        )
    return TensorDescriptor.from_tensor(matrix, [rows, columns])


def grid(cut: Tile, schedule: ExpertSchedule, num_outputs: int, device: torch.device) -> tuple[int]:
    """Persistent programs of a grouped product: what the device holds, or all tiles if fewer."""
    max_tiles = len(schedule.tiles_N2) * triton.cdiv(num_outputs, cut.block_out)
    return (min(num_programs(cut, device), max_tiles),)


def launch_options(cut: Tile, dtype: torch.dtype, device: torch.device) -> dict[str, int]:
    """Of a product of weights of this dtype."""
    return {
        "NARROW_SUM": min(_MAX_NARROW_SUM, cut.block_in) if dtype == _FP8 else 0,
        "STAGES": cut.num_stages,
        "num_warps": cut.num_warps,
        "num_stages": cut.num_stages,
        **pdl_options(device),
    }


@triton.jit
def _gate_up_kernel(
    x,
    gate_up,
    scale,
    input_scale,
    next_input_scale,
    out,
    offsets,
    tiles,
    num_tiles,
    F,
    D,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NARROW_SUM: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr = False,
):
    await_inputs(PDL)
    num_slices = tl.cdiv(F, BLOCK_F)
    total = tl.load(num_tiles) * num_slices
    for work in range(tl.program_id(0), total, tl.num_programs(0)):
        e = tl.load(tiles + work // num_slices * 2)
        first = tl.load(tiles + work // num_slices * 2 + 1)
        start_f = work % num_slices * BLOCK_F
        gate_row = e * 2 * F + start_f
        gate = tl.zeros((BLOCK_F, BLOCK_ROWS), tl.float32)
        up = tl.zeros((BLOCK_F, BLOCK_ROWS), tl.float32)
        for d in tl.range(0, D, BLOCK_D, num_stages=STAGES):
            x_DR = x.load([first, d]).T
            w = gate_up.load([gate_row, d])
            gate = tl.dot(w, x_DR, gate, input_precision="ieee", max_num_imprecise_acc=NARROW_SUM)
            w = gate_up.load([gate_row + F, d])
            up = tl.dot(w, x_DR, up, input_precision="ieee", max_num_imprecise_acc=NARROW_SUM)
        hidden = activated(gate, up, scale, input_scale, next_input_scale, e)
        p = first + tl.arange(0, BLOCK_ROWS)
        f = start_f + tl.arange(0, BLOCK_F)
        is_out = (p < tl.load(offsets + e + 1))[:, None] & (f < F)[None, :]
        place = p.to(tl.int64)[:, None] * F + f[None, :]
        tl.store(out + place, tl.trans(hidden).to(out.dtype.element_ty), mask=is_out)


@triton.jit
def activated(gate, up, scale, input_scale, next_input_scale, e):  # noqa: ANN201 - not Python
    """SwiGLU of an expert's sums, in units of what follows; without FP8 scales are None."""
    if scale is not None:
        unit = tl.load(scale + e) * tl.load(input_scale + e)
        gate = gate * unit
        up = up * unit
    hidden = gate * tl.sigmoid(gate) * up
    if next_input_scale is not None:
        hidden = within_fp8(hidden / tl.load(next_input_scale + e))
    return hidden


@triton.jit
def _down_kernel(
    hidden,
    down,
    scale,
    input_scale,
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
    BLOCK_F: tl.constexpr,
    NARROW_SUM: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr = False,
):
    await_inputs(PDL)
    num_slices = tl.cdiv(D, BLOCK_D)
    total = tl.load(num_tiles) * num_slices
    for work in range(tl.program_id(0), total, tl.num_programs(0)):
        e = tl.load(tiles + work // num_slices * 2)
        first = tl.load(tiles + work // num_slices * 2 + 1)
        start_d = work % num_slices * BLOCK_D
        sum_DR = tl.zeros((BLOCK_D, BLOCK_ROWS), tl.float32)
        for f in tl.range(0, F, BLOCK_F, num_stages=STAGES):
            sum_DR = tl.dot(
                down.load([e * D + start_d, f]),
                hidden.load([first, f]).T,
                sum_DR,
                input_precision="ieee",
                max_num_imprecise_acc=NARROW_SUM,
            )
        if scale is not None:
            sum_DR = sum_DR * (tl.load(scale + e) * tl.load(input_scale + e))
        p = first + tl.arange(0, BLOCK_ROWS)
        is_pair = p < tl.load(offsets + e + 1)
        pair = tl.load(order + p, mask=is_pair, other=0)
        y = tl.trans(sum_DR) * tl.load(weight + pair, mask=is_pair, other=0.0)[:, None]
        d = start_d + tl.arange(0, BLOCK_D)
        place = pair.to(tl.int64)[:, None] * D + d[None, :]
        is_out = is_pair[:, None] & (d < D)[None, :]
        tl.store(out + place, y.to(out.dtype.element_ty), mask=is_out)
