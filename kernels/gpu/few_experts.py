"""Grouped products of few pairs on a GPU: nothing is sorted or copied before them.

    hidden[pair] = silu(gate[e] x) * (up[e] x)
    y[pair] = weight[pair] * down[e] hidden[pair]

As `grouped_gemm`, to the same bits. But where all pairs fit one tile, every expert's tile can hold
every row, rounded as that expert wants it, and what is not its own is left out at the end: nothing
needs to be sorted. Two launches less, which is what a step of one or two requests is bound by.

Shape legend: R rows, K experts per row, A = R * K pairs, E local experts, D hidden, F expert
hidden, H = 2F.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ostro.kernels.fp8_linear import quantize_fp8_reference
from ostro.kernels.gpu.dependent_launch import await_inputs
from ostro.kernels.gpu.fp8_linear import in_units
from ostro.kernels.gpu.grouped_gemm import activated, boxes, launch_options
from ostro.kernels.gpu.tiles import BLACKWELL, Tile, architecture, num_programs, tile

MAX_FEW_PAIRS = 16  # rows of the smallest tile


def takes_pairs(num_pairs: int, device: torch.device) -> bool:
    """Whether so many pairs are few, and this Triton has kernels of them for this GPU.

    The pipeliner of Triton 3.6 gives up on `_gate_up_few_kernel` for Blackwell.
    """
    if num_pairs > MAX_FEW_PAIRS:
        return False
    return not triton.__version__.startswith("3.6.") or architecture(device) < BLACKWELL


def gate_up_few_triton(
    rows_RD: torch.Tensor,
    expert_RK: torch.Tensor,
    gate_up_EHD: torch.Tensor,
    counts: torch.Tensor,
    *,
    scale_E: torch.Tensor | None = None,
    input_scale_E: torch.Tensor | None = None,
    next_input_scale_E: torch.Tensor | None = None,
    cut: Tile | None = None,
) -> torch.Tensor:
    """SwiGLU of each row with the gate and up matrices of its experts.

    Args:
        rows_RD: Hidden states, at least one row.
        expert_RK: int64 local expert ids, all different in a row, -1 where the k-th expert is not
            here; at most `MAX_FEW_PAIRS`.
        gate_up_EHD: Gate rows [0, F), up rows [F, 2F) of each expert.
        counts: int64 [1 + E], to which is added how many pairs have no local expert, then how many
            each expert has.
        scale_E: FP8 only: float32 value of one unit of the weight.
        input_scale_E: FP8 only: what rows are rounded by.
        next_input_scale_E: FP8 only: likewise of the result.
        cut: How to launch; None takes what is known to be fastest.

    Returns:
        hidden_AF in the weight's dtype: row r * K + k is the k-th expert's of row r; pairs without
        a local expert are not written.

    Raises:
        ValueError: D does not fill 16-byte steps.

    Example:
        x [[1.]], gate 1 and up 2 give silu(1) * 2 = 1.4621.
    """
    (num_rows, num_chosen), hidden = expert_RK.shape, rows_RD.shape[1]
    num_pairs, inner = num_rows * num_chosen, gate_up_EHD.shape[1] // 2
    cut = cut or tile("gate_up", gate_up_EHD.dtype, MAX_FEW_PAIRS, rows_RD.device)
    out_AF = torch.empty(num_pairs, inner, dtype=gate_up_EHD.dtype, device=rows_RD.device)
    _gate_up_few_kernel[_grid(cut, num_pairs, inner, rows_RD.device)](
        rows_RD.contiguous(),
        boxes(gate_up_EHD.view(-1, hidden), cut.block_out, cut.block_in),
        scale_E,
        input_scale_E,
        next_input_scale_E,
        out_AF,
        expert_RK.contiguous(),
        counts,
        num_rows,
        num_chosen,
        inner,
        hidden,
        BLOCK_A=MAX_FEW_PAIRS,
        BLOCK_R=triton.next_power_of_2(num_rows),
        BLOCK_F=cut.block_out,
        BLOCK_D=cut.block_in,
        **launch_options(cut, gate_up_EHD.dtype, rows_RD.device),
    )
    return out_AF


def down_few_triton(
    hidden_AF: torch.Tensor,
    expert_RK: torch.Tensor,
    weight_RK: torch.Tensor,
    down_EDF: torch.Tensor,
    out_dtype: torch.dtype,
    *,
    scale_E: torch.Tensor | None = None,
    input_scale_E: torch.Tensor | None = None,
    cut: Tile | None = None,
) -> torch.Tensor:
    """Each pair's hidden row times its expert's down matrix and its gate weight.

    Args:
        hidden_AF: From `gate_up_few_triton`.
        expert_RK: int64 local expert ids, of which that was made.
        weight_RK: float32 gate weights; not read where there is no expert.
        down_EDF: In the dtype of `hidden_AF`.
        out_dtype: Dtype of the result.
        scale_E: FP8 only: float32 value of one unit of the weight.
        input_scale_E: FP8 only: likewise of `hidden_AF`.
        cut: How to launch; None takes what is known to be fastest.

    Returns:
        y_AD, likewise.

    Raises:
        ValueError: F does not fill 16-byte steps.

    Example:
        hidden [[2.]], down 3, weight 0.5 give [[3.]].
    """
    num_pairs, (_, hidden, inner) = expert_RK.numel(), down_EDF.shape
    cut = cut or tile("down", down_EDF.dtype, MAX_FEW_PAIRS, hidden_AF.device)
    out_AD = hidden_AF.new_empty(num_pairs, hidden, dtype=out_dtype)
    _down_few_kernel[_grid(cut, num_pairs, hidden, hidden_AF.device)](
        boxes(hidden_AF, MAX_FEW_PAIRS, cut.block_in),
        boxes(down_EDF.view(-1, inner), cut.block_out, cut.block_in),
        scale_E,
        input_scale_E,
        weight_RK.contiguous(),
        out_AD,
        expert_RK.contiguous(),
        num_pairs,
        hidden,
        inner,
        BLOCK_A=MAX_FEW_PAIRS,
        BLOCK_D=cut.block_out,
        BLOCK_F=cut.block_in,
        **launch_options(cut, hidden_AF.dtype, hidden_AF.device),
    )
    return out_AD


def gate_up_few_reference(
    rows_RD: torch.Tensor,
    expert_RK: torch.Tensor,
    gate_up_EHD: torch.Tensor,
    counts: torch.Tensor,
    *,
    scale_E: torch.Tensor | None = None,
    input_scale_E: torch.Tensor | None = None,
    next_input_scale_E: torch.Tensor | None = None,
) -> torch.Tensor:
    """Meaning of `gate_up_few_triton`; zeros for pairs without a local expert."""
    counts += torch.bincount(expert_RK.flatten() + 1, minlength=len(counts))
    out_AF = torch.zeros(expert_RK.numel(), gate_up_EHD.shape[1] // 2, device=rows_RD.device)
    for pair, e in enumerate(expert_RK.flatten().tolist()):
        if e < 0:
            continue
        x_D, unit = rows_RD[pair // expert_RK.shape[1]].float(), 1.0
        if scale_E is not None and input_scale_E is not None:
            x_D = quantize_fp8_reference(x_D, input_scale_E[e]).float()
            unit = float(scale_E[e] * input_scale_E[e])
        gate_F, up_F = ((gate_up_EHD[e].float() @ x_D) * unit).chunk(2)
        hidden_F = torch.nn.functional.silu(gate_F) * up_F
        if next_input_scale_E is not None:
            hidden_F = (hidden_F / next_input_scale_E[e]).clamp(-448.0, 448.0)
        out_AF[pair] = hidden_F
    return out_AF.to(gate_up_EHD.dtype)


def down_few_reference(
    hidden_AF: torch.Tensor,
    expert_RK: torch.Tensor,
    weight_RK: torch.Tensor,
    down_EDF: torch.Tensor,
    out_dtype: torch.dtype,
    *,
    scale_E: torch.Tensor | None = None,
    input_scale_E: torch.Tensor | None = None,
) -> torch.Tensor:
    """Meaning of `down_few_triton`; zeros for pairs without a local expert."""
    out_AD = torch.zeros(expert_RK.numel(), down_EDF.shape[1], device=hidden_AF.device)
    for pair, e in enumerate(expert_RK.flatten().tolist()):
        if e < 0:
            continue
        y_D = down_EDF[e].float() @ hidden_AF[pair].float()
        if scale_E is not None and input_scale_E is not None:
            y_D = y_D * (scale_E[e] * input_scale_E[e])
        out_AD[pair] = y_D * weight_RK.flatten()[pair]
    return out_AD.to(out_dtype)


def _grid(cut: Tile, num_pairs: int, num_outputs: int, device: torch.device) -> tuple[int]:
    """Persistent programs: what the device holds, or all tiles if fewer."""
    max_tiles = num_pairs * triton.cdiv(num_outputs, cut.block_out)
    return (min(num_programs(cut, device), max_tiles),)


@triton.jit
def _chosen(expert, A, BLOCK_A: tl.constexpr):
    """Each pair's expert, -1 past the end too; the number of different ones, and which is first."""
    a = tl.arange(0, BLOCK_A)
    id_ = tl.load(expert + a, mask=a < A, other=-1).to(tl.int32)
    is_repeat = (id_[None, :] == id_[:, None]) & (a[None, :] < a[:, None])
    is_first = (id_ >= 0) & (tl.sum(is_repeat.to(tl.int32), 1) == 0)
    return id_, tl.sum(is_first.to(tl.int32), 0), is_first.to(tl.int32)


@triton.jit
def _expert_of(id_, is_first, tile):
    """The expert of a tile."""
    is_of_tile = (is_first > 0) & (tl.cumsum(is_first, 0) - 1 == tile)
    return tl.sum(tl.where(is_of_tile, id_, 0), 0)


@triton.jit
def _gate_up_few_kernel(
    rows,
    gate_up,
    scale,
    input_scale,
    next_input_scale,
    out,
    expert,
    counts,
    R,
    K,
    F,
    D,
    BLOCK_A: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NARROW_SUM: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr = False,
):
    await_inputs(PDL)
    id_, num_tiles, is_first = _chosen(expert, R * K, BLOCK_A)
    a, column = tl.arange(0, BLOCK_A), tl.arange(0, BLOCK_A)
    if tl.program_id(0) == 0:
        tl.atomic_add(counts + 1 + id_, tl.full((BLOCK_A,), 1, tl.int64), mask=a < R * K)
    r = tl.arange(0, BLOCK_R)
    row = rows + r * D
    num_slices = tl.cdiv(F, BLOCK_F)
    for work in range(tl.program_id(0), num_tiles * num_slices, tl.num_programs(0)):
        e = _expert_of(id_, is_first, work // num_slices)
        start_f = work % num_slices * BLOCK_F
        gate_row = e * 2 * F + start_f
        input_unit = 1.0
        if scale is not None:
            input_unit = tl.load(input_scale + e)
        gate = tl.zeros((BLOCK_F, BLOCK_A), tl.float32)
        up = tl.zeros((BLOCK_F, BLOCK_A), tl.float32)
        for start_d in tl.range(0, D, BLOCK_D, num_stages=STAGES):
            d = start_d + tl.arange(0, BLOCK_D)
            is_x = (r < R)[:, None] & (d < D)[None, :]
            x = tl.load(row[:, None] + d[None, :], mask=is_x, other=0.0)
            if scale is not None:
                x = in_units(x.to(tl.float32), input_unit)
            x = x.to(out.dtype.element_ty)
            # Columns behind the last row's repeat the rows: tensor cores take no fewer.
            x = tl.broadcast_to(x[None, :, :], (BLOCK_A // BLOCK_R, BLOCK_R, BLOCK_D))
            x_DA = tl.reshape(x, (BLOCK_A, BLOCK_D)).T
            w = gate_up.load([gate_row, start_d])
            gate = tl.dot(w, x_DA, gate, input_precision="ieee", max_num_imprecise_acc=NARROW_SUM)
            w = gate_up.load([gate_row + F, start_d])
            up = tl.dot(w, x_DA, up, input_precision="ieee", max_num_imprecise_acc=NARROW_SUM)
        hidden = activated(gate, up, scale, input_scale, next_input_scale, e)
        is_pair = (id_ == e)[None, :] & (a[None, :] // K == column[:, None])
        pair = tl.max(tl.where(is_pair, a[None, :], -1), 1)
        f = start_f + tl.arange(0, BLOCK_F)
        at = out + pair[:, None] * F + f[None, :]
        is_out = (pair >= 0)[:, None] & (f < F)[None, :]
        tl.store(at, tl.trans(hidden).to(out.dtype.element_ty), mask=is_out)


@triton.jit
def _down_few_kernel(
    hidden,
    down,
    scale,
    input_scale,
    weight,
    out,
    expert,
    A,
    D,
    F,
    BLOCK_A: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_F: tl.constexpr,
    NARROW_SUM: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr = False,
):
    await_inputs(PDL)
    id_, num_tiles, is_first = _chosen(expert, A, BLOCK_A)
    pair = tl.arange(0, BLOCK_A)
    factor = tl.load(weight + pair, mask=id_ >= 0, other=0.0)
    num_slices = tl.cdiv(D, BLOCK_D)
    for work in range(tl.program_id(0), num_tiles * num_slices, tl.num_programs(0)):
        e = _expert_of(id_, is_first, work // num_slices)
        start_d = work % num_slices * BLOCK_D
        sum_DA = tl.zeros((BLOCK_D, BLOCK_A), tl.float32)
        for f in tl.range(0, F, BLOCK_F, num_stages=STAGES):
            sum_DA = tl.dot(
                down.load([e * D + start_d, f]),
                hidden.load([0, f]).T,
                sum_DA,
                input_precision="ieee",
                max_num_imprecise_acc=NARROW_SUM,
            )
        if scale is not None:
            sum_DA = sum_DA * (tl.load(scale + e) * tl.load(input_scale + e))
        y = tl.trans(sum_DA) * factor[:, None]
        d = start_d + tl.arange(0, BLOCK_D)
        at = out + pair[:, None] * D + d[None, :]
        is_out = (id_ == e)[:, None] & (d < D)[None, :]
        tl.store(at, y.to(out.dtype.element_ty), mask=is_out)
