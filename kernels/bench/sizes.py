"""Sizes that the cases are made of, and the device they run on."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ostro.kernels.latent_cache import FP8_ROWS, row_parts, row_width

_PAGES_AT_ONCE = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """A model as kernels see it; the defaults are Mistral Small 4's.

    Attributes:
        hidden: Width of the residual stream.
        num_experts: Routed experts of a layer.
        inner: Hidden width of an expert.
        num_chosen: Experts per token.
        num_heads: Attention heads.
        compressed: Width of the compressed query.
        latent: Width of the cached latent.
        nope: Part of a head's key that comes from the latent.
        rope: Part that all heads share and that turns by position.
        value: Width of a head's value.
        vocabulary: Tokens.
        page_size: Places of a cache page.
        cache_dtype: Of cached rows: bfloat16 or `FP8_ROWS`.
        device: Where tensors go; "cpu" in Triton's interpreter.
    """

    hidden: int = 4096
    num_experts: int = 128
    inner: int = 2048
    num_chosen: int = 4
    num_heads: int = 32
    compressed: int = 1024
    latent: int = 256
    nope: int = 64
    rope: int = 64
    value: int = 128
    vocabulary: int = 131_072
    page_size: int = 64
    cache_dtype: torch.dtype = torch.bfloat16
    device: str = "cuda"

    def randn(self, *shape: int, scale: float = 1.0) -> torch.Tensor:
        """Normal numbers in bfloat16."""
        return torch.randn(*shape, device=self.device, dtype=torch.bfloat16) * scale

    def randn_fp8(self, *shape: int, scale: float) -> torch.Tensor:
        """Normal numbers in FP8, made matrix by matrix: a stack in bfloat16 might not fit."""
        stack = torch.empty(*shape, dtype=torch.float8_e4m3fn, device=self.device)
        for matrix in stack.view(-1, *shape[-2:]):
            matrix.copy_(self.randn(*shape[-2:], scale=scale))
        return stack

    def row_bytes(self) -> int:
        """Of a cached row."""
        return row_width(self.latent, self.rope, self.cache_dtype) * self.cache_dtype.itemsize

    def randn_cache(self, num_pages: int) -> torch.Tensor:
        """Pages of normal numbers, [N, S, W]."""
        shape = (num_pages, self.page_size, row_width(self.latent, self.rope, self.cache_dtype))
        cache_NSW = torch.empty(shape, dtype=self.cache_dtype, device=self.device)
        fill_cache(cache_NSW, self.latent)
        return cache_NSW

    def not_written(self) -> float:
        """What makes a row NaN in every value."""
        return 0xFF if self.cache_dtype == FP8_ROWS else torch.nan

    def of_cache(self, operation: str) -> str:
        """An operation's name, with the cache's dtype where that is not bfloat16."""
        return f"{operation} fp8" if self.cache_dtype == FP8_ROWS else operation


def fill_cache(cache_NSW: torch.Tensor, latent: int) -> None:
    """Normal numbers in every row, some pages at a time: all of them might not fit twice."""
    for pages_NSW in cache_NSW.split(_PAGES_AT_ONCE):
        for part in row_parts(pages_NSW, latent):
            part.copy_(torch.randn(part.shape, dtype=torch.bfloat16, device=part.device))
