"""What comes between the down projections and attention: norms, rotary, and the cache.

    compressed = norm(query);   cache[slot] = norm(latent), rotary(rope key)

Shape legend: T tokens, L compressed query width, N pages, S page size, C latent, P rope dim,
J = P / 2 rotary pairs, W = C + P.
"""

from __future__ import annotations

import torch

from ostro.kernels.latent_cache import write_latents_reference, write_rows
from ostro.kernels.rms_norm import rms_norm, rms_norm_reference
from ostro.kernels.rotary import rotary_reference


def mla_prologue(
    query_TL: torch.Tensor,
    row_TW: torch.Tensor,
    query_norm_L: torch.Tensor,
    latent_norm_C: torch.Tensor,
    eps: float,
    turn_TJ: torch.Tensor,
    slots_T: torch.Tensor,
    cache_NSW: torch.Tensor,
) -> torch.Tensor:
    """Norm the compressed queries; norm, turn and store the tokens' latents and rope keys.

    Args:
        query_TL: As projected; rows may be strided.
        row_TW: Latents as projected, then rope keys; likewise.
        query_norm_L: Weight of the queries' RMS norm.
        latent_norm_C: Of the latents'.
        eps: Of both.
        turn_TJ: Rotations of the tokens' positions, complex64.
        slots_T: int64, all different; on a GPU -1 stores nothing.
        cache_NSW: One layer's cache, contiguous; written in place.

    Returns:
        compressed_TL.

    Example:
        query [[3., 4.]] with norm [1., 1.] and eps 0 gives [[0.8485, 1.1314]].
    """
    if query_TL.is_cuda:
        from ostro.kernels.gpu.mla_prologue import mla_prologue_triton

        return mla_prologue_triton(
            query_TL, row_TW, query_norm_L, latent_norm_C, eps, turn_TJ, slots_T, cache_NSW
        )
    write_rows(cache_NSW, row_TW, latent_norm_C, eps, turn_TJ, slots_T)
    return rms_norm(query_TL, query_norm_L, eps)


def mla_prologue_reference(
    query_TL: torch.Tensor,
    row_TW: torch.Tensor,
    query_norm_L: torch.Tensor,
    latent_norm_C: torch.Tensor,
    eps: float,
    turn_TJ: torch.Tensor,
    slots_T: torch.Tensor,
    cache_NSW: torch.Tensor,
) -> torch.Tensor:
    """Plain-torch meaning of `mla_prologue`; skips slots of -1."""
    latent = latent_norm_C.shape[0]
    is_stored = slots_T >= 0
    latent_TC = rms_norm_reference(row_TW[:, :latent], latent_norm_C, eps)
    key_TP = rotary_reference(row_TW[:, None, latent:], turn_TJ)[:, 0]
    write_latents_reference(cache_NSW, latent_TC[is_stored], key_TP[is_stored], slots_T[is_stored])
    return rms_norm_reference(query_TL, query_norm_L, eps)
