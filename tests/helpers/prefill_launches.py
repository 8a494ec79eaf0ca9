"""Launches of chunked prefill in Mistral Small 4's sizes, for the compile gate.

`later` takes up what an earlier block of keys gave.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from ostro.kernels.gpu.expand_latents import expand_latents_triton
from ostro.kernels.gpu.mla_prefill import attend_triton
from ostro.kernels.latent_cache import FP8_ROWS, row_width
from ostro.kernels.latent_heads import LatentHeads

_HEADS, _NOPE, _ROPE, _VALUE, _LATENT = 32, 64, 64, 128, 256
_PAGE_SIZE = 64


def _meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def _expand_latents(cache_dtype: torch.dtype) -> None:
    heads = LatentHeads(_meta(_HEADS, _NOPE, _LATENT), _meta(_HEADS, _VALUE, _LATENT), 1.0)
    cache = _meta(8, _PAGE_SIZE, row_width(_LATENT, _ROPE, cache_dtype), dtype=cache_dtype)
    expand_latents_triton(cache, _meta(8, dtype=torch.int64), 0, 8 * _PAGE_SIZE, heads)


def _attend(num_queries: int, is_later: bool) -> None:
    earlier = None
    if is_later:
        out_THV = _meta(num_queries, _HEADS, _VALUE, dtype=torch.float32)
        earlier = (out_THV, _meta(_HEADS, num_queries, dtype=torch.float32))
    attend_triton(
        _meta(num_queries, _HEADS, _NOPE + _ROPE),
        _meta(8192, _HEADS, _NOPE + _ROPE),
        _meta(8192, _HEADS, _VALUE),
        0,
        0.1,
        earlier=earlier,
    )


LAUNCHES: dict[str, Callable[[], None]] = {
    "expand_latents": functools.partial(_expand_latents, torch.bfloat16),
    "expand_latents_fp8": functools.partial(_expand_latents, FP8_ROWS),
}
for _num_queries in (256, 8192):
    LAUNCHES[f"attend_{_num_queries}"] = functools.partial(_attend, _num_queries, False)
    LAUNCHES[f"attend_{_num_queries}_later"] = functools.partial(_attend, _num_queries, True)
