"""Caches of FP8 rows made from plain ones, and the values that are left of them."""

from __future__ import annotations

import torch

from ostro.kernels.latent_cache import FP8_ROWS, row_values, row_width, write_latents


def as_fp8_rows(rows_XW: torch.Tensor, latent: int) -> torch.Tensor:
    """The same rows as FP8 ones; NaN stays NaN."""
    *leading, width = rows_XW.shape
    shape = (*leading, row_width(latent, width - latent, FP8_ROWS))
    stored_XW = torch.empty(shape, dtype=FP8_ROWS, device=rows_XW.device)
    plain_TW = rows_XW.reshape(-1, width)
    slots_T = torch.arange(len(plain_TW), device=rows_XW.device)
    pages_NSW = stored_XW.view(1, -1, shape[-1])
    write_latents(pages_NSW, plain_TW[:, :latent], plain_TW[:, latent:], slots_T)
    return stored_XW


def rounded_rows(rows_XW: torch.Tensor, latent: int) -> torch.Tensor:
    """What FP8 rows keep of these, in float32."""
    return row_values(as_fp8_rows(rows_XW, latent), latent, torch.float32)
