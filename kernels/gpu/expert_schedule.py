"""The schedule of a grouped matrix product: pairs sorted by expert, and the tiles to compute.

Made on the device by one launch and of fixed shapes, so nothing waits for a count and a CUDA graph
can hold it. The order is stable, and no sum depends on which program came first.

Shape legend: R rows, K experts per row, A = R * K pairs, E local experts, N tiles at most.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ostro.kernels.gpu.dependent_launch import await_inputs, pdl_options

_BLOCK_PAIRS = 1024
_BLOCK_TILES = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertSchedule:
    """Which pairs each expert computes, and in which tiles.

    Attributes:
        order_A: int32 pair (row * K + k) at each sorted position. Only the first `offsets_E1[E]`
            mean something: pairs without a local expert have no position.
        offsets_E1: int32 [E + 1]; expert e has positions [offsets[e], offsets[e + 1]).
        tiles_N2: int32 (expert, first position) of each tile, experts ascending.
        num_tiles: int32 [1], how many of the tiles mean something.
        block_rows: Positions per tile.
    """

    order_A: torch.Tensor
    offsets_E1: torch.Tensor
    tiles_N2: torch.Tensor
    num_tiles: torch.Tensor
    block_rows: int


def expert_schedule_triton(
    expert_RK: torch.Tensor, num_experts: int, block_rows: int, counts: torch.Tensor
) -> ExpertSchedule:
    """Sort pairs by expert and cut each expert's pairs into tiles.

    Args:
        expert_RK: int64 local expert ids, -1 where the k-th expert is not here; at least one row.
        num_experts: E.
        block_rows: Positions per tile.
        counts: int64 [1 + E], to which is added how many pairs have no local expert, then how many
            each expert has.

    Example:
        experts [[1, -1], [0, 1]], E 2, 16 rows a tile give order [2, 0, 3, any], offsets [0, 1, 3],
        tiles [[0, 0], [1, 1]] and counts [1, 1, 2].
    """
    num_pairs = expert_RK.numel()
    max_tiles = min(num_pairs, num_experts) + num_pairs // block_rows
    order_A = expert_RK.new_empty(num_pairs, dtype=torch.int32)
    offsets_E1 = expert_RK.new_empty(num_experts + 1, dtype=torch.int32)
    tiles_N2 = expert_RK.new_empty(max_tiles, 2, dtype=torch.int32)
    num_tiles = expert_RK.new_empty(1, dtype=torch.int32)
    _expert_schedule_kernel[(num_experts,)](
        expert_RK.contiguous(),
        counts,
        order_A,
        offsets_E1,
        tiles_N2,
        num_tiles,
        num_pairs,
        num_experts,
        BLOCK_ROWS=block_rows,
        BINS=triton.next_power_of_2(num_experts + 2),
        BLOCK_A=min(_BLOCK_PAIRS, max(32, triton.next_power_of_2(num_pairs))),
        BLOCK_N=_BLOCK_TILES,
        num_warps=4,
        **pdl_options(expert_RK.device),
    )
    return ExpertSchedule(
        order_A=order_A,
        offsets_E1=offsets_E1,
        tiles_N2=tiles_N2,
        num_tiles=num_tiles,
        block_rows=block_rows,
    )


def expert_schedule_reference(
    expert_RK: torch.Tensor, num_experts: int, block_rows: int, counts: torch.Tensor
) -> ExpertSchedule:
    """Meaning of `expert_schedule_triton`; its tensors hold only what means something."""
    found = torch.bincount(expert_RK.flatten() + 1, minlength=1 + num_experts)
    counts += found
    num_absent, *num_pairs_E = found.tolist()
    offsets = [0]
    tiles: list[tuple[int, int]] = []
    for expert, num_pairs in enumerate(num_pairs_E):
        tiles += [(expert, offsets[-1] + start) for start in range(0, num_pairs, block_rows)]
        offsets.append(offsets[-1] + num_pairs)
    order_A = torch.argsort(expert_RK.flatten(), stable=True)[num_absent:]
    device = expert_RK.device
    return ExpertSchedule(
        order_A=order_A.int(),
        offsets_E1=torch.tensor(offsets, dtype=torch.int32, device=device),
        tiles_N2=torch.tensor(tiles, dtype=torch.int32, device=device).view(-1, 2),
        num_tiles=torch.tensor([len(tiles)], dtype=torch.int32, device=device),
        block_rows=block_rows,
    )


@triton.jit
def _expert_schedule_kernel(
    expert,
    counts,
    order,
    offsets,
    tiles,
    num_tiles,
    A,
    E,
    BLOCK_ROWS: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PDL: tl.constexpr = False,
):
    await_inputs(PDL)
    # One program per expert, and each counts every expert's pairs for itself: 128 programs that
    # read 1,024 ids are faster than a second launch.
    e = tl.program_id(0)
    bin_ = tl.arange(0, BINS)  # 0 absent, 1 + e expert e, the last one lanes past the end
    found = tl.zeros((BINS,), tl.int32)
    for start in range(0, A, BLOCK_A):
        i = start + tl.arange(0, BLOCK_A)
        id_ = tl.load(expert + i, mask=i < A, other=BINS - 2).to(tl.int32)
        found += tl.histogram(id_ + 1, BINS)
    pairs = tl.where((bin_ > 0) & (bin_ <= E), found, 0)
    num_blocks = (pairs + BLOCK_ROWS - 1) // BLOCK_ROWS
    first = tl.sum(tl.where(bin_ <= e, pairs, 0), 0)
    first_tile = tl.sum(tl.where(bin_ <= e, num_blocks, 0), 0)
    mine = tl.sum(tl.where(bin_ == e + 1, pairs, 0), 0)
    tl.store(offsets + e, first)
    tl.store(counts + 1 + e, tl.load(counts + 1 + e) + mine)
    if e == 0:
        tl.store(offsets + E, tl.sum(pairs, 0))
        tl.store(num_tiles, tl.sum(num_blocks, 0))
        tl.store(counts, tl.load(counts) + tl.sum(tl.where(bin_ == 0, found, 0), 0))
    for start in range(0, tl.cdiv(mine, BLOCK_ROWS), BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        is_tile = n * BLOCK_ROWS < mine
        tl.store(tiles + (first_tile + n) * 2, tl.zeros((BLOCK_N,), tl.int32) + e, mask=is_tile)
        tl.store(tiles + (first_tile + n) * 2 + 1, first + n * BLOCK_ROWS, mask=is_tile)
    if mine > 0:
        position = first
        for start in range(0, A, BLOCK_A):
            i = start + tl.arange(0, BLOCK_A)
            is_mine = tl.load(expert + i, mask=i < A, other=-1) == e
            rank = tl.cumsum(is_mine.to(tl.int32), 0)
            tl.store(order + position + rank - 1, i, mask=is_mine)
            position += tl.sum(is_mine.to(tl.int32), 0)
