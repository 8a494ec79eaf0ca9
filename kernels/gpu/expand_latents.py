"""Keys and values of a request's positions, rebuilt from the latents in its pages.

    key[s, h] = (Wuk[h] latent[s], rope_key[s]);   value[s, h] = Wuv[h] latent[s]

One kernel gathers: latents to be multiplied, rope keys to their place in every head's key. The
products are torch's.

Shape legend: S keys, H heads, Q = N + P key width (N nope, P rope), V value width, C latent,
W of a cached row (`kernels.latent_cache`), n pages of the request.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ostro.kernels.latent_cache import row_parts, row_values
from ostro.kernels.latent_heads import LatentHeads

_ROWS_AT_ONCE = 8


def expand_latents_triton(
    cache_NSW: torch.Tensor, pages_n: torch.Tensor, first: int, stop: int, heads: LatentHeads
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of positions [first, stop) of a request.

    Args:
        cache_NSW: One layer's pages, plain or of FP8 rows, contiguous; not read beyond these
            positions.
        pages_n: int64 pages of the request.
        first: First position.
        stop: Position after the last one.
        heads: The layer's heads.

    Returns:
        key_SHQ and value_SHV in the dtype of the heads, contiguous.

    Example:
        latent [1., 2.] and rope key [7.], one head of Wuk [[1., 1.]] and Wuv [[0., 3.]]: key
        [3., 7.], value [6.].
    """
    num_heads, nope, latent = heads.w_uk_HNC.shape
    latent_NSC, rope_key_NSP = row_parts(cache_NSW, latent)
    page_size, rope = rope_key_NSP.shape[1:]
    num_keys = stop - first
    latent_SC = heads.w_uk_HNC.new_empty(num_keys, latent)
    key_SHQ = heads.w_uk_HNC.new_empty(num_keys, num_heads, nope + rope)
    _gather_kernel[(triton.cdiv(num_keys, _ROWS_AT_ONCE),)](
        latent_NSC,
        rope_key_NSP,
        latent_NSC.stride(1),
        rope_key_NSP.stride(1),
        pages_n,
        latent_SC,
        key_SHQ,
        first,
        num_keys,
        page_size,
        num_heads,
        nope,
        latent,
        rope,
        BLOCK_S=_ROWS_AT_ONCE,
        BLOCK_C=triton.next_power_of_2(latent),
        BLOCK_P=triton.next_power_of_2(rope),
        num_warps=4,
    )
    # Each head's product lands between the rope keys, where torch would otherwise copy it.
    torch.bmm(
        latent_SC.expand(num_heads, -1, -1),
        heads.w_uk_HNC.transpose(1, 2),
        out=key_SHQ[..., :nope].transpose(0, 1),
    )
    value_SX = latent_SC @ heads.w_uv_HVC.flatten(0, 1).T
    return key_SHQ, value_SX.view(num_keys, num_heads, -1)


def expand_latents_reference(
    cache_NSW: torch.Tensor, pages_n: torch.Tensor, first: int, stop: int, heads: LatentHeads
) -> tuple[torch.Tensor, torch.Tensor]:
    """Meaning of `expand_latents_triton` in float32."""
    latent = heads.w_uk_HNC.shape[2]
    places_S = torch.arange(first, stop, device=cache_NSW.device)
    page_size = cache_NSW.shape[1]
    row_SW = cache_NSW[pages_n[places_S // page_size], places_S % page_size]
    row_SW = row_values(row_SW, latent, torch.float32).float()
    nope_SHN = torch.einsum("sc,hnc->shn", row_SW[:, :latent], heads.w_uk_HNC.float())
    rope_SHP = row_SW[:, None, latent:].expand(-1, nope_SHN.shape[1], -1)
    value_SHV = torch.einsum("sc,hvc->shv", row_SW[:, :latent], heads.w_uv_HVC.float())
    key_SHQ = torch.cat((nope_SHN, rope_SHP), dim=-1)
    dtype = heads.w_uk_HNC.dtype
    return key_SHQ.to(dtype), value_SHV.to(dtype)


@triton.jit(do_not_specialize=["first", "num_keys"])
def _gather_kernel(
    cached_latents,
    cached_keys,
    latent_stride,
    key_stride,
    pages,
    latent,
    key,
    first,
    num_keys,
    page_size,
    H,
    N,
    C,
    P,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    s = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    is_key = s < num_keys
    page = tl.load(pages + (first + s) // page_size, mask=is_key, other=0)
    place = page * page_size + (first + s) % page_size  # int64, as pages are
    s = s.to(tl.int64)
    c = tl.arange(0, BLOCK_C)
    is_latent = is_key[:, None] & (c < C)[None, :]
    row = tl.load(cached_latents + place[:, None] * latent_stride + c[None, :], mask=is_latent)
    tl.store(latent + s[:, None] * C + c[None, :], row.to(latent.dtype.element_ty), mask=is_latent)
    p = tl.arange(0, BLOCK_P)
    is_rope = is_key[:, None] & (p < P)[None, :]
    row = tl.load(cached_keys + place[:, None] * key_stride + p[None, :], mask=is_rope)
    row = row.to(key.dtype.element_ty)
    for h in range(H):
        tl.store(key + (s[:, None] * H + h) * (N + P) + N + p[None, :], row, mask=is_rope)
