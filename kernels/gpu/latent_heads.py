"""Queries into latent space, and weighted latents to values, on a GPU.

A program takes one head and 16 tokens, so a head's matrix is read once for them.

Shape legend: T tokens, H heads, Q = N + P query width (N nope, P rope), J = P / 2 rotary pairs,
V value width, C latent, W = C + P.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ostro.kernels.gpu.dependent_launch import await_previous, let_next_start, pdl_options
from ostro.kernels.rotary import rotary_reference

_BLOCK_TOKENS = 16


def latent_queries_triton(
    q_THQ: torch.Tensor,
    w_uk_HNC: torch.Tensor,
    turn_TJ: torch.Tensor | None,
    scale_T: torch.Tensor | None,
) -> torch.Tensor:
    """Turn, scale and absorb queries: [T, H, C + P].

    Args:
        q_THQ: As projected; tokens and heads may be strided.
        w_uk_HNC: Of the layer's heads.
        turn_TJ: Rotations of the tokens' positions, complex64; None leaves the rope part.
        scale_T: float32 llama-4 scale of each token; None is 1.
    """
    num_tokens, num_heads, width = q_THQ.shape
    nope, latent = w_uk_HNC.shape[1:]
    rope = width - nope
    q_THW = q_THQ.new_empty(num_tokens, num_heads, latent + rope)
    _latent_queries_kernel[(num_heads, triton.cdiv(num_tokens, _BLOCK_TOKENS))](
        q_THQ,
        w_uk_HNC,
        None if turn_TJ is None else torch.view_as_real(turn_TJ),
        scale_T,
        q_THW,
        num_tokens,
        q_THQ.stride(0),
        q_THQ.stride(1),
        num_heads,
        N=nope,
        P=rope,
        C=latent,
        BLOCK_T=_BLOCK_TOKENS,
        num_warps=4,
        **pdl_options(q_THQ.device),
    )
    return q_THW


def latent_queries_reference(
    q_THQ: torch.Tensor,
    w_uk_HNC: torch.Tensor,
    turn_TJ: torch.Tensor | None,
    scale_T: torch.Tensor | None,
) -> torch.Tensor:
    """Meaning of `latent_queries_triton`, in float32."""
    q_THQ_wide = q_THQ.float()
    nope_THN, rope_THP = q_THQ_wide.tensor_split([w_uk_HNC.shape[1]], dim=2)
    if turn_TJ is not None:
        rope_THP = rotary_reference(rope_THP, turn_TJ)
    latent_THC = torch.einsum("thn,hnc->thc", nope_THN, w_uk_HNC.float())
    q_THW = torch.cat((latent_THC, rope_THP), dim=2)
    if scale_T is not None:
        q_THW = q_THW * scale_T.float()[:, None, None]
    return q_THW.to(q_THQ.dtype)


def expand_values_triton(out_THC: torch.Tensor, w_uv_HVC: torch.Tensor) -> torch.Tensor:
    """`ostro.kernels.latent_heads.expand_values` by Triton; contiguous."""
    num_tokens, num_heads, latent = out_THC.shape
    value = w_uv_HVC.shape[1]
    out_THV = out_THC.new_empty(num_tokens, num_heads, value)
    _expand_values_kernel[(num_heads, triton.cdiv(num_tokens, _BLOCK_TOKENS))](
        out_THC,
        w_uv_HVC,
        out_THV,
        num_tokens,
        num_heads,
        value,
        C=latent,
        BLOCK_V=max(16, triton.next_power_of_2(value)),
        BLOCK_T=_BLOCK_TOKENS,
        num_warps=4,
        **pdl_options(out_THC.device),
    )
    return out_THV


@triton.jit
def _latent_queries_kernel(
    q,
    w_uk,
    turn,
    scale,
    out,
    T,
    stride_t,
    stride_h,
    H,
    N: tl.constexpr,
    P: tl.constexpr,
    C: tl.constexpr,
    BLOCK_T: tl.constexpr,
    PDL: tl.constexpr = False,
):
    let_next_start(PDL)
    h = tl.program_id(0)
    t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    is_token = t < T
    n, c, j = tl.arange(0, N), tl.arange(0, C), tl.arange(0, P // 2)
    w = tl.load(w_uk + h * N * C + n[:, None] * C + c[None, :])
    await_previous(PDL)
    row = q + t.to(tl.int64) * stride_t + h * stride_h
    nope = tl.load(row[:, None] + n[None, :], mask=is_token[:, None], other=0.0)
    latent = tl.dot(nope, w, input_precision="ieee")
    pair = row[:, None] + N + 2 * j[None, :]
    even = tl.load(pair, mask=is_token[:, None], other=0.0).to(tl.float32)
    odd = tl.load(pair + 1, mask=is_token[:, None], other=0.0).to(tl.float32)
    if turn is not None:
        angle = turn + t[:, None] * P + 2 * j[None, :]
        cos = tl.load(angle, mask=is_token[:, None], other=0.0)
        sin = tl.load(angle + 1, mask=is_token[:, None], other=0.0)
        even, odd = even * cos - odd * sin, odd * cos + even * sin
    if scale is not None:
        factor = tl.load(scale + t, mask=is_token, other=0.0).to(tl.float32)[:, None]
        latent, even, odd = latent * factor, even * factor, odd * factor
    place = out + (t.to(tl.int64) * H + h)[:, None] * (C + P)
    kind = out.dtype.element_ty
    tl.store(place + c[None, :], latent.to(kind), mask=is_token[:, None])
    tl.store(place + C + 2 * j[None, :], even.to(kind), mask=is_token[:, None])
    tl.store(place + C + 2 * j[None, :] + 1, odd.to(kind), mask=is_token[:, None])


@triton.jit
def _expand_values_kernel(
    latents,
    w_uv,
    out,
    T,
    H,
    V,
    C: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_T: tl.constexpr,
    PDL: tl.constexpr = False,
):
    let_next_start(PDL)
    h = tl.program_id(0)
    t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    c, v = tl.arange(0, C), tl.arange(0, BLOCK_V)
    row = t.to(tl.int64) * H + h
    w = tl.load(w_uv + (h * V + v)[:, None] * C + c[None, :], mask=(v < V)[:, None], other=0.0)
    await_previous(PDL)
    x = tl.load(latents + row[:, None] * C + c[None, :], mask=(t < T)[:, None], other=0.0)
    value = tl.dot(x, w.T, input_precision="ieee")
    is_out = (t < T)[:, None] & (v < V)[None, :]
    tl.store(out + row[:, None] * V + v[None, :], value.to(out.dtype.element_ty), mask=is_out)
