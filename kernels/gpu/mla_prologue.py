"""What comes between the down projections and attention, in one launch.

A token's compressed query is normed by one program; its latent is normed, its rope key turned, and
both written to the cache by another.

Shape legend: T tokens, L compressed query width, C latent, P rope dim, J = P / 2 rotary pairs,
W of a cached row (`kernels.latent_cache`).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ostro.kernels.gpu.dependent_launch import await_inputs, pdl_options
from ostro.kernels.gpu.fp8_linear import in_units
from ostro.kernels.latent_cache import row_parts
from ostro.kernels.mla_prologue import PrologueNorms


def mla_prologue_triton(
    query_TL: torch.Tensor,
    row_TW: torch.Tensor,
    norms: PrologueNorms,
    turn_TJ: torch.Tensor,
    slots_T: torch.Tensor,
    cache_NSW: torch.Tensor,
    input_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """`ostro.kernels.mla_prologue.mla_prologue` by Triton; a slot of -1 is not written.

    With `input_scale`, the compressed queries come in units of it, as FP8 e4m3.
    """
    num_tokens, query_width = query_TL.shape
    latent = norms.latent_C.shape[0]
    rope = row_TW.shape[1] - latent
    dtype = query_TL.dtype if input_scale is None else torch.float8_e4m3fn
    out_TL = query_TL.new_empty(num_tokens, query_width, dtype=dtype)
    if not num_tokens:
        return out_TL
    latent_NSC, rope_key_NSP = row_parts(cache_NSW, latent)
    _mla_prologue_kernel[(num_tokens, 2)](
        query_TL,
        row_TW,
        norms.query_L,
        norms.latent_C,
        torch.view_as_real(turn_TJ),
        slots_T,
        input_scale,
        out_TL,
        latent_NSC,
        rope_key_NSP,
        query_TL.stride(0),
        row_TW.stride(0),
        latent_NSC.stride(1),
        rope_key_NSP.stride(1),
        norms.eps,
        query_width,
        latent,
        rope,
        BLOCK_L=triton.next_power_of_2(query_width),
        BLOCK_C=triton.next_power_of_2(latent),
        BLOCK_J=triton.next_power_of_2(rope // 2),
        num_warps=4,
        **pdl_options(query_TL.device),
    )
    return out_TL


@triton.jit
def normed(row, weight, eps, width, BLOCK: tl.constexpr):  # noqa: ANN201 - not Python
    """The RMS norm of a row, in float32 with the values of the weight's dtype before it."""
    i = tl.arange(0, BLOCK)
    is_in = i < width
    wide = tl.load(row + i, mask=is_in, other=0.0).to(tl.float32)
    scaled = wide * tl.rsqrt(tl.sum(wide * wide, 0) / width + eps)
    factor = tl.load(weight + i, mask=is_in, other=0.0)
    return scaled.to(factor.dtype).to(tl.float32) * factor.to(tl.float32)


@triton.jit
def _stored(value, part):
    """In the dtype of a cached row's part; what float16 does not hold as its largest value.

    The conversion to e4m3 does so by itself.
    """
    kind: tl.constexpr = part.dtype.element_ty
    if kind == tl.float16:
        value = tl.maximum(value, -65504.0, propagate_nan=tl.PropagateNan.ALL)
        value = tl.minimum(value, 65504.0, propagate_nan=tl.PropagateNan.ALL)
    return value.to(kind)


@triton.jit
def _mla_prologue_kernel(
    query,
    row,
    query_norm,
    latent_norm,
    turn,
    slots,
    input_scale,
    out,
    cached_latents,
    cached_keys,
    query_stride,
    row_stride,
    latent_stride,
    key_stride,
    eps,
    L,
    C,
    P,
    BLOCK_L: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_J: tl.constexpr,
    PDL: tl.constexpr = False,
):
    await_inputs(PDL)
    t = tl.program_id(0).to(tl.int64)
    if tl.program_id(1) == 0:
        i = tl.arange(0, BLOCK_L)
        value = normed(query + t * query_stride, query_norm, eps, L, BLOCK_L)
        if input_scale is not None:
            value = in_units(value.to(query.dtype.element_ty).to(tl.float32), tl.load(input_scale))
        tl.store(out + t * L + i, value.to(out.dtype.element_ty), mask=i < L)
    else:
        store_latent(
            t,
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


@triton.jit
def store_latent(
    t,
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
    BLOCK_C: tl.constexpr,
    BLOCK_J: tl.constexpr,
) -> None:
    """One token's latent, normed, and its rope key, turned, to their slot of the cache."""
    slot = tl.load(slots + t).to(tl.int64)
    if slot >= 0:
        i = tl.arange(0, BLOCK_C)
        value = normed(row + t * row_stride, latent_norm, eps, C, BLOCK_C)
        value = _stored(value.to(latent_norm.dtype.element_ty), cached_latents)
        tl.store(cached_latents + slot * latent_stride + i, value, mask=i < C)
        j = tl.arange(0, BLOCK_J)
        is_pair = j < P // 2
        pair = row + t * row_stride + C + 2 * j
        even = tl.load(pair, mask=is_pair, other=0.0).to(tl.float32)
        odd = tl.load(pair + 1, mask=is_pair, other=0.0).to(tl.float32)
        cos = tl.load(turn + t * P + 2 * j, mask=is_pair, other=0.0)
        sin = tl.load(turn + t * P + 2 * j + 1, mask=is_pair, other=0.0)
        pair = cached_keys + slot * key_stride + 2 * j
        tl.store(pair, _stored(even * cos - odd * sin, cached_keys), mask=is_pair)
        tl.store(pair + 1, _stored(odd * cos + even * sin, cached_keys), mask=is_pair)
