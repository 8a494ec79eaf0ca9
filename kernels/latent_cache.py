"""Write tokens' latents and rope keys into the paged cache.

A cached row is one token of one layer: the normed latent [0, C), then the turned rope key
[C, C + P).
Slot s is place s % S of page s // S.

Shape legend: T tokens, N pages, S page size, C latent, P rope dim, W = C + P.
"""

from __future__ import annotations

import torch

from ostro.kernels.cpu import library
from ostro.kernels.rms_norm import rms_norm
from ostro.kernels.rotary import rotary


def write_latents(
    cache_NSW: torch.Tensor,
    latent_TC: torch.Tensor,
    rope_key_TP: torch.Tensor,
    slots_T: torch.Tensor,
) -> None:
    """Store one row per token, in place.

    Args:
        cache_NSW: One layer's cache, contiguous.
        latent_TC: Normed latents, dtype of the cache.
        rope_key_TP: Turned rope keys, dtype of the cache.
        slots_T: int64, all different.

    Example:
        page size 2: slot 3 is row [1, 1] of the cache.
    """
    rows_TW = torch.cat((latent_TC, rope_key_TP), dim=-1)
    cache_NSW.view(-1, cache_NSW.shape[-1]).index_copy_(0, slots_T, rows_TW)


def write_rows(
    cache_NSW: torch.Tensor,
    row_TW: torch.Tensor,
    norm_C: torch.Tensor,
    eps: float,
    turn_TJ: torch.Tensor,
    slots_T: torch.Tensor,
) -> None:
    """Norm the latents and turn the rope keys of the tokens' kv_a rows, and store them, in place.

    Args:
        cache_NSW: One layer's cache, contiguous.
        row_TW: Latents as projected, then rope keys; dtype of the cache.
        norm_C: Weight of the latents' RMS norm.
        eps: Of that norm.
        turn_TJ: Rotations of the tokens' positions, complex64.
        slots_T: int64, all different.
    """
    latent_width = norm_C.shape[0]
    rope_width = row_TW.shape[1] - latent_width
    if library.serves(row_TW) and not latent_width % 16 and not rope_width % 16:
        library.required().ostro_write_latents(
            row_TW.data_ptr(),
            row_TW.stride(0),
            norm_C.data_ptr(),
            eps,
            turn_TJ.data_ptr(),
            row_TW.shape[0],
            latent_width,
            rope_width,
            slots_T.data_ptr(),
            cache_NSW.data_ptr(),
            torch.get_num_threads(),
        )
        return
    latent_TC = rms_norm(row_TW[:, :latent_width], norm_C, eps)
    key_TP = rotary(row_TW[:, None, latent_width:], turn_TJ)[:, 0]
    write_latents(cache_NSW, latent_TC, key_TP, slots_T)


def write_latents_reference(
    cache_NSW: torch.Tensor,
    latent_TC: torch.Tensor,
    rope_key_TP: torch.Tensor,
    slots_T: torch.Tensor,
) -> None:
    """Meaning of `write_latents`, token by token."""
    page_size = cache_NSW.shape[1]
    latent_width = latent_TC.shape[1]
    for t, slot in enumerate(slots_T.tolist()):
        row_W = cache_NSW[slot // page_size, slot % page_size]
        row_W[:latent_width] = latent_TC[t]
        row_W[latent_width:] = rope_key_TP[t]
