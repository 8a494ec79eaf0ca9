"""Sizes that the cases are made of, and the device they run on."""

from __future__ import annotations

from dataclasses import dataclass

import torch


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
