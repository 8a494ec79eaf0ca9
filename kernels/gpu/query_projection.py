"""From the down projection of very few tokens to their queries and cached latents, in one launch.

    queries = norm(query) Wqb^T;   cache[slot] = norm(latent), rotary(rope key)

As `mla_prologue` and `fp8_linear`, one after the other, but each program of the product norms and
rounds the compressed queries for itself: 2 KB of them, against a launch more.

Shape legend: T tokens, L compressed query width, O outputs, N pages, S page size, C latent, P rope
dim, J = P / 2 rotary pairs, W of a cached row (`kernels.latent_cache`).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ostro.kernels.fp8_linear import Fp8Weight
from ostro.kernels.gpu.dependent_launch import await_previous, let_next_start
from ostro.kernels.gpu.fp8_linear import (
    MAX_FEW_INPUTS,
    MAX_FEW_ROWS,
    few_rows_launch,
    in_units,
    multiply_rows,
    prefetch_weight,
)
from ostro.kernels.gpu.mla_prologue import normed, store_latent
from ostro.kernels.latent_cache import row_parts
from ostro.kernels.mla_prologue import PrologueNorms


def projects_queries(query_TL: torch.Tensor) -> bool:
    """Whether one launch takes these rows."""
    num_tokens, width = query_TL.shape
    return 0 < num_tokens <= MAX_FEW_ROWS and width <= MAX_FEW_INPUTS


def project_queries_triton(
    query_TL: torch.Tensor,
    row_TW: torch.Tensor,
    norms: PrologueNorms,
    turn_TJ: torch.Tensor,
    slots_T: torch.Tensor,
    cache_NSW: torch.Tensor,
    weight: Fp8Weight,
) -> torch.Tensor:
    """`ostro.kernels.mla_prologue.project_queries` by Triton; see `projects_queries`."""
    num_tokens, query_width = query_TL.shape
    latent = norms.latent_C.shape[0]
    rope = row_TW.shape[1] - latent
    num_out = len(weight.values_OI)
    out_TO = query_TL.new_empty(num_tokens, num_out)
    latent_NSC, rope_key_NSP = row_parts(cache_NSW, latent)
    num_programs, options = few_rows_launch(weight, query_TL.device)
    _project_queries_kernel[(num_tokens + num_programs,)](
        query_TL,
        row_TW,
        norms.query_L,
        norms.latent_C,
        torch.view_as_real(turn_TJ),
        slots_T,
        weight.values_OI,
        weight.scale,
        weight.input_scale,
        out_TO,
        latent_NSC,
        rope_key_NSP,
        query_TL.stride(0),
        row_TW.stride(0),
        latent_NSC.stride(1),
        rope_key_NSP.stride(1),
        norms.eps,
        num_out,
        query_width,
        latent,
        rope,
        T=num_tokens,
        BLOCK_C=triton.next_power_of_2(latent),
        BLOCK_J=triton.next_power_of_2(rope // 2),
        **options,
    )
    return out_TO


@triton.jit
def _project_queries_kernel(
    query,
    row,
    query_norm,
    latent_norm,
    turn,
    slots,
    values,
    scale,
    input_scale,
    out,
    cached_latents,
    cached_keys,
    query_stride,
    row_stride,
    latent_stride,
    key_stride,
    eps,
    num_out,
    L,
    C,
    P,
    T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    STAGES: tl.constexpr,
    LINES: tl.constexpr,
    LINE: tl.constexpr,
    PDL: tl.constexpr = False,
):
    # The first programs store latents, one token each.
    let_next_start(PDL)
    first_block, step = tl.maximum(tl.program_id(0) - T, 0), tl.num_programs(0) - T
    prefetch_weight(values, first_block, step, num_out, L, BLOCK_O, STAGES, LINES, LINE, PDL)
    await_previous(PDL)
    if tl.program_id(0) < T:
        store_latent(
            tl.program_id(0).to(tl.int64),
            row,
            latent_norm,
            turn,
            slots,
            cached_latents,
            cached_keys,
            row_stride,
            latent_stride,
            key_stride,
            eps,
            C,
            P,
            BLOCK_C,
            BLOCK_J,
        )
    else:
        unit = tl.load(input_scale)
        factor = tl.load(scale) * unit
        first = normed(query, query_norm, eps, L, BLOCK_I).to(query.dtype.element_ty)
        first = in_units(first.to(tl.float32), unit).to(values.dtype.element_ty).to(tl.float32)
        last = normed(query + (T - 1) * query_stride, query_norm, eps, L, BLOCK_I)
        last = in_units(last.to(query.dtype.element_ty).to(tl.float32), unit)
        last = last.to(values.dtype.element_ty).to(tl.float32)
        multiply_rows(
            first,
            last,
            values,
            factor,
            out,
            first_block,
            step,
            num_out,
            L,
            T,
            BLOCK_O,
            BLOCK_I,
            STAGES,
        )
