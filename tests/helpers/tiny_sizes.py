"""A model whose kernels run in the interpreter in milliseconds, no two of its widths confused."""

from __future__ import annotations

from ostro.kernels.bench.sizes import Sizes


def tiny_sizes(device: str) -> Sizes:
    """Sizes that tensor cores, boxes and FP8 products take."""
    return Sizes(
        hidden=64,
        num_experts=8,
        inner=48,
        num_chosen=2,
        num_heads=2,
        compressed=80,
        latent=32,
        nope=16,
        rope=16,
        value=16,
        vocabulary=1000,
        page_size=16,
        device=device,
    )
