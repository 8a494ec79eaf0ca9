"""A query's chunks joined and taken to values in one launch, for few queries of few chunks.

    latent[h] = sum over chunks of share[x, h] * part[x, h];   out[h] = latent[h] Wuv[h]^T

A program takes some values of one head, and joins that head's chunks for itself. So much is read
again that many queries, or long contexts, are faster in two launches (`mla_decode`,
`latent_heads`).

Shape legend: T queries, H heads, C latent, V value width, X chunks.
"""

from __future__ import annotations

import itertools

import torch
import triton
import triton.language as tl

from ostro.kernels.gpu.decode_chunks import DecodeChunks
from ostro.kernels.gpu.dependent_launch import await_previous, let_next_start, pdl_options
from ostro.kernels.gpu.mla_decode import FEW_CHUNKS, AttendedChunks, joined

_MAX_TOKENS = 4
_MAX_CHUNKS_OF_TOKEN = 32
_BLOCK_VALUES = 32  # so that 32 heads of 128 values are a program for each multiprocessor
_BLOCK_CHUNKS = 16


def joins_values(chunks: DecodeChunks) -> bool:
    """Whether one launch takes less than two."""
    num_tokens, num_chunks = len(chunks.first_T1) - 1, len(chunks.chunk_X4)
    return num_tokens <= _MAX_TOKENS and num_chunks <= num_tokens * _MAX_CHUNKS_OF_TOKEN


def join_values_triton(
    parts: AttendedChunks, first_T1: torch.Tensor, w_uv_HVC: torch.Tensor
) -> torch.Tensor:
    """Weighted values: [T, H, V], zeros for a query without keys.

    Args:
        parts: From `attend_chunks`.
        first_T1: int32, where each query's chunks begin.
        w_uv_HVC: Of the layer's heads.

    Example:
        one chunk's latent [2., 1.] and Wuv [[3., 4.]] give [10.].
    """
    num_tokens, num_heads, latent = parts.out_THC.shape
    value = w_uv_HVC.shape[1]
    out_THV = parts.out_THC.new_empty(num_tokens, num_heads, value)
    if num_tokens:
        block = min(_BLOCK_VALUES, triton.next_power_of_2(value))
        _join_values_kernel[(triton.cdiv(value, block), num_heads, num_tokens)](
            parts.part_XHC,
            parts.lse_XH,
            parts.out_THC,
            first_T1,
            w_uv_HVC,
            out_THV,
            num_heads,
            value,
            C=latent,
            BLOCK_V=block,
            FEW_X=FEW_CHUNKS,
            BLOCK_X=_BLOCK_CHUNKS,
            num_warps=4,
            **pdl_options(out_THV.device),
        )
    return out_THV


def join_values_reference(
    parts: AttendedChunks, first_T1: torch.Tensor, w_uv_HVC: torch.Tensor
) -> torch.Tensor:
    """Meaning of `join_values_triton`, query by query."""
    latent_THC = torch.zeros(parts.out_THC.shape, device=w_uv_HVC.device)
    first = first_T1.tolist()
    for t, (begin, stop) in enumerate(itertools.pairwise(first)):
        if stop - begin == 1:
            latent_THC[t] = parts.out_THC[t].float()
        elif stop > begin:
            share_XH = torch.softmax(parts.lse_XH[begin:stop] * 0.6931471805599453, dim=0)
            latent_THC[t] = (share_XH[:, :, None] * parts.part_XHC[begin:stop]).sum(0)
    latent_THC = latent_THC.to(parts.out_THC.dtype).float()
    out_THV = torch.einsum("thc,hvc->thv", latent_THC, w_uv_HVC.float())
    return out_THV.to(parts.out_THC.dtype)


@triton.jit
def _join_values_kernel(
    part,
    lse,
    whole,
    first,
    w_uv,
    out,
    H,
    V,
    C: tl.constexpr,
    BLOCK_V: tl.constexpr,
    FEW_X: tl.constexpr,
    BLOCK_X: tl.constexpr,
    PDL: tl.constexpr = False,
):
    let_next_start(PDL)
    h, t = tl.program_id(1), tl.program_id(2).to(tl.int64)
    c = tl.arange(0, C)
    v = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    w = tl.load(w_uv + (h * V + v)[:, None] * C + c[None, :], mask=(v < V)[:, None], other=0.0)
    await_previous(PDL)
    begin, stop = tl.load(first + t), tl.load(first + t + 1)
    if stop - begin == 1:
        latent = tl.load(whole + (t * H + h) * C + c).to(tl.float32)
    else:
        largest = float("-inf")
        total = 0.0
        latent = tl.zeros((C,), tl.float32)
        if stop - begin <= FEW_X:
            if stop > begin:
                largest, total, latent = joined(
                    part, lse, begin, stop, c, h, H, largest, total, latent, C, FEW_X
                )
        else:
            for start in range(begin, stop, BLOCK_X):
                largest, total, latent = joined(
                    part, lse, start, stop, c, h, H, largest, total, latent, C, BLOCK_X
                )
        latent = latent / tl.where(total > 0, total, 1.0)
    latent = latent.to(out.dtype.element_ty).to(tl.float32)  # as two launches would round it
    value = tl.sum(w.to(tl.float32) * latent[None, :], 1)
    tl.store(out + (t * H + h) * V + v, value.to(out.dtype.element_ty), mask=v < V)
