"""The paged latent cache of one attention shard: memory only; the engine knows who owns a page.

Shape letters: L layers, N pages, S page size, W = C + P values per token and layer.
"""

from __future__ import annotations

import torch

from ostro.configs.model import ModelConfig


def cache_page_bytes(config: ModelConfig, page_size: int, dtype: torch.dtype) -> int:
    """Bytes of one page over all layers."""
    return config.num_layers * page_size * config.latent_width() * dtype.itemsize


class LatentCache:
    """One [N, S, W] tensor per layer, uninitialised: the kernels read only what was written.

    On CPU the memory is therefore taken page by page as the cache fills.
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
        shape = (num_pages, page_size, config.latent_width())
        self.layers = tuple(
            torch.empty(shape, device=device, dtype=dtype) for _ in range(config.num_layers)
        )
