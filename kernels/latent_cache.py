"""Write tokens' latents and rope keys into the paged cache, and read them back.

A cached row is one token of one layer: the normed latent, then the turned rope key. It is plain, of
C + P values in the model's dtype, or FP8, of C + 2P bytes: the latent in e4m3, the rope key in
float16. A cache of `FP8_ROWS` holds these: in Mistral Small 4 384 bytes for the 640 of bfloat16.
Slot s is place s % S of page s // S.

FP8 latents have no scale. The caller gives them unit size, by an RMS norm without its weight (which
the heads take up, see `Attention`): then none exceeds sqrt(C) of e4m3's 448, and only what is below
1/64 loses precision, whatever the checkpoint. Attention's results in the embedded model are off by
1.9% that way, by 1.7% with a scale per token; without either, norm weights of 1/256 would make it
9.8%. Rope keys have no norm that bounds them, and positions want precision: in e4m3 with a scale
per token they alone would cost 4.2%, in bfloat16 0.3%, in float16 nothing.

Shape legend: T tokens, N pages, S page size, C latent, P rope dim, W row: C + P or, FP8, C + 2P.
"""

from __future__ import annotations

import torch

from ostro.kernels.cpu import library
from ostro.kernels.rms_norm import rms_norm
from ostro.kernels.rotary import rotary

# The dtype of a cache of FP8 rows: bytes.
FP8_ROWS = torch.uint8
FP8_ROW_LATENTS = 2  # C must be a multiple of so many: float16 values stand behind them
_LATENT, _ROPE_KEY = torch.float8_e4m3fn, torch.float16


def row_width(latent: int, rope: int, cache_dtype: torch.dtype) -> int:
    """W of a cache.

    Example:
        latents of 256 and rope keys of 64 give 320 in bfloat16 and 384 in FP8 rows.
    """
    if cache_dtype != FP8_ROWS:
        return latent + rope
    return latent * _LATENT.itemsize + rope * _ROPE_KEY.itemsize


def row_parts(rows_XW: torch.Tensor, latent: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents and rope keys of cached rows, in the dtypes they are stored in.

    Args:
        rows_XW: Of any leading dimensions, such as a cache.
        latent: C; even if the rows are FP8.

    Returns:
        latent_XC and rope_key_XP, views.
    """
    latent_XC, rope_key_XP = rows_XW[..., :latent], rows_XW[..., latent:]
    if rows_XW.dtype != FP8_ROWS:
        return latent_XC, rope_key_XP
    return latent_XC.view(_LATENT), rope_key_XP.view(_ROPE_KEY)


def row_values(rows_XW: torch.Tensor, latent: int, dtype: torch.dtype) -> torch.Tensor:
    """Cached rows as C + P values: plain ones as they are, FP8 ones in `dtype`."""
    if rows_XW.dtype != FP8_ROWS:
        return rows_XW
    return torch.cat([part.to(dtype) for part in row_parts(rows_XW, latent)], dim=-1)


def write_latents(
    cache_NSW: torch.Tensor,
    latent_TC: torch.Tensor,
    rope_key_TP: torch.Tensor,
    slots_T: torch.Tensor,
) -> None:
    """Store one row per token, in place.

    Args:
        cache_NSW: One layer's cache, contiguous.
        latent_TC: Normed latents; of the cache's dtype, or any for FP8 rows.
        rope_key_TP: Turned rope keys, likewise.
        slots_T: int64, all different.

    Example:
        page size 2: slot 3 is row [1, 1] of the cache.
    """
    if cache_NSW.dtype == FP8_ROWS:
        latent_TC = _saturated(latent_TC, _LATENT).view(FP8_ROWS)
        rope_key_TP = _saturated(rope_key_TP, _ROPE_KEY).view(FP8_ROWS)
    rows_TW = torch.cat((latent_TC, rope_key_TP), dim=-1)
    cache_NSW.view(-1, cache_NSW.shape[-1]).index_copy_(0, slots_T, rows_TW)


def _saturated(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """In a dtype, what it does not hold as its largest value; NaN stays NaN."""
    if values.dtype == dtype:
        return values
    largest = torch.finfo(dtype).max
    return values.clamp(-largest, largest).to(dtype)


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
        row_TW: Latents as projected, then rope keys; of the cache's dtype, or any for FP8 rows.
        norm_C: Weight of the latents' RMS norm.
        eps: Of that norm.
        turn_TJ: Rotations of the tokens' positions, complex64.
        slots_T: int64, all different.
    """
    latent_width = norm_C.shape[0]
    rope_width = row_TW.shape[1] - latent_width
    is_served = library.serves(row_TW) and cache_NSW.dtype == row_TW.dtype
    if is_served and not latent_width % 16 and not rope_width % 16:
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
    latent_NSC, rope_key_NSP = row_parts(cache_NSW, latent_TC.shape[1])
    for t, slot in enumerate(slots_T.tolist()):
        place = slot // page_size, slot % page_size
        latent_NSC[place] = _saturated(latent_TC[t], latent_NSC.dtype)
        rope_key_NSP[place] = _saturated(rope_key_TP[t], rope_key_NSP.dtype)
