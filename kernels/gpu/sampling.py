"""Sampling on a GPU: a batch's next tokens in two to six launches, whatever each row asks for.

    1. of each slice of the vocabulary the largest logit
    2. in three launches the cutoff of top-k and top-p (`sampling_cutoff`), if some row asks for it
    3. of each slice the mass of the tokens that are kept, if some row draws
    4. the slice in which the row's uniform number falls, and the token within

Masses are integers, so sums are exact: a row's token depends on nothing but the row, and what is
found in the sums of slices is found again within the slice.

Shape legend: B rows, V vocabulary, S slices of the vocabulary, W words of 32 tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from ostro.kernels.gpu.sampling_cutoff import (
    NUM_SETTINGS,
    TEMPERATURE,
    UNIFORM,
    load_largest,
    load_logits,
    mass_of,
    min_p_key,
    sampling_cutoff_triton,
    slice_size,
    weight_keys,
)

if TYPE_CHECKING:
    from ostro.kernels.batch_sampling import Draws


def sample_rows_triton(
    logits_BV: torch.Tensor, draws: Draws, allowed_BW: torch.Tensor | None = None
) -> torch.Tensor:
    """`ostro.kernels.batch_sampling.sample_rows` by Triton; the same shapes and dtypes.

    What is launched depends on shapes and on the flags of `draws` alone, and nothing waits.
    """
    num_rows, vocabulary = logits_BV.shape
    ids_B = logits_BV.new_empty(num_rows, dtype=torch.int64)
    if not num_rows:
        return ids_B
    logits_BV = logits_BV.contiguous()
    block = slice_size(vocabulary)
    num_slices = triton.cdiv(vocabulary, block)
    block_slices = triton.next_power_of_2(num_slices)
    largest_BS = logits_BV.new_empty(num_rows, num_slices, dtype=torch.float32)
    first_BS = logits_BV.new_empty(num_rows, num_slices, dtype=torch.int32)
    _largest_kernel[(num_rows, num_slices)](
        logits_BV,
        allowed_BW,
        largest_BS,
        first_BS,
        vocabulary,
        num_slices,
        BLOCK_V=block,
        num_warps=8,
    )
    cutoff_B = mass_BS = None
    if draws.is_filtered:
        cutoff_B = sampling_cutoff_triton(logits_BV, draws.settings_B5, largest_BS, allowed_BW)
    if not draws.is_greedy:
        mass_BS = logits_BV.new_empty(num_rows, num_slices, dtype=torch.int64)
        _mass_kernel[(num_rows, num_slices)](
            logits_BV,
            allowed_BW,
            draws.settings_B5,
            largest_BS,
            cutoff_B,
            mass_BS,
            vocabulary,
            num_slices,
            BLOCK_S=block_slices,
            BLOCK_V=block,
            num_warps=8,
        )
    _draw_kernel[(num_rows,)](
        logits_BV,
        allowed_BW,
        draws.settings_B5,
        largest_BS,
        first_BS,
        cutoff_B,
        mass_BS,
        ids_B,
        vocabulary,
        num_slices,
        BLOCK_S=block_slices,
        BLOCK_V=block,
        num_warps=8,
    )
    return ids_B


@triton.jit
def _largest_kernel(logits, allowed, largest, first, V, S, BLOCK_V: tl.constexpr):
    b = tl.program_id(0).to(tl.int64)  # int64: b * V passes 2**31 at 16,384 rows
    s = tl.program_id(1)
    v = s * BLOCK_V + tl.arange(0, BLOCK_V)
    x = load_logits(logits, allowed, b, v, V)
    top = tl.max(x, 0)
    tl.store(largest + b * S + s, top)
    tl.store(first + b * S + s, tl.min(tl.where(x == top, v, V - 1), 0))


@triton.jit
def _kept_mass(logits, allowed, setting, top, cutoff, b, v, V):
    key = weight_keys(load_logits(logits, allowed, b, v, V), top, tl.load(setting + TEMPERATURE))
    lightest = min_p_key(setting) if cutoff is None else tl.load(cutoff + b)
    return tl.where(key >= lightest, mass_of(key), 0)


@triton.jit
def _mass_kernel(
    logits,
    allowed,
    settings,
    largest,
    cutoff,
    mass,
    V,
    S,
    BLOCK_S: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    s = tl.program_id(1)
    setting = settings + b * NUM_SETTINGS
    if tl.load(setting + TEMPERATURE) > 0.0:
        top = load_largest(largest, b, S, BLOCK_S)
        v = s * BLOCK_V + tl.arange(0, BLOCK_V)
        kept_V = _kept_mass(logits, allowed, setting, top, cutoff, b, v, V)
        tl.store(mass + b * S + s, tl.sum(kept_V, 0))
    else:
        tl.store(mass + b * S + s, 0)  # a greedy row draws nothing


@triton.jit
def _draw_kernel(
    logits,
    allowed,
    settings,
    largest,
    first,
    cutoff,
    mass,
    ids,
    V,
    S,
    BLOCK_S: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    setting = settings + b * NUM_SETTINGS
    s = tl.arange(0, BLOCK_S)
    largest_S = tl.load(largest + b * S + s, mask=s < S, other=float("-inf"))
    first_S = tl.load(first + b * S + s, mask=s < S, other=0)
    top = tl.max(largest_S, 0)
    # The token of a greedy row, and of one in which nothing can be drawn.
    token = tl.min(tl.where((largest_S == top) & (s < S), first_S, V - 1), 0)
    if mass is not None:
        mass_S = tl.load(mass + b * S + s, mask=s < S, other=0)
        total = tl.sum(mass_S, 0)
        if total > 0:
            target = (tl.load(setting + UNIFORM) * total.to(tl.float64)).to(tl.int64)
            target = tl.minimum(target, total - 1)
            chosen = tl.sum((tl.cumsum(mass_S, 0) <= target).to(tl.int32), 0)
            target -= tl.sum(tl.where(s < chosen, mass_S, 0), 0)
            v = chosen * BLOCK_V + tl.arange(0, BLOCK_V)
            kept_V = _kept_mass(logits, allowed, setting, top, cutoff, b, v, V)
            below = tl.sum((tl.cumsum(kept_V, 0) <= target).to(tl.int32), 0)
            token = chosen * BLOCK_V + below
    tl.store(ids + b, token.to(tl.int64))
