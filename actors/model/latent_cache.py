"""The paged latent cache of one attention shard: memory only; the engine knows who owns a page.

Shape letters: L layers, N pages, S page size, W of a row (`kernels.latent_cache`).
"""

from __future__ import annotations

import torch

from ostro.configs.model import ModelConfig
from ostro.kernels.latent_cache import row_width


def cached_token_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes of one token over all layers, in a cache of this dtype.

    Example:
        Mistral Small 4: 23,040 in bfloat16, 13,824 in `FP8_ROWS`.
    """
    width = row_width(config.kv_lora_rank, config.qk_rope_head_dim, dtype)
    return config.num_layers * width * dtype.itemsize


def cache_page_bytes(config: ModelConfig, page_size: int, dtype: torch.dtype) -> int:
    """Bytes of one page over all layers."""
    return page_size * cached_token_bytes(config, dtype)


class LatentCache:
    """One [N, S, W] tensor per layer, in the model's dtype or of `FP8_ROWS`.

    Uninitialised: the kernels read only what was written. On CPU the memory is therefore taken page
    by page as the cache fills.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        num_pages: int,
        page_size: int,
        device: torch.device | str,
        dtype: torch.dtype,
    ) -> None:
        self.page_size = page_size
        self.num_pages = num_pages
        self.dtype = dtype
        width = row_width(config.kv_lora_rank, config.qk_rope_head_dim, dtype)
        shape = (num_pages, page_size, width)
        self.layers = tuple(
            torch.empty(shape, device=device, dtype=dtype) for _ in range(config.num_layers)
        )
