"""Queries into latent space and latents to values, by Triton."""

from __future__ import annotations

import pytest
import torch

from ostro.kernels.gpu.latent_heads import (
    expand_values_triton,
    latent_queries_reference,
    latent_queries_triton,
)
from ostro.kernels.latent_heads import expand_values_reference
from ostro.kernels.rotary import rotations

HEADS, NOPE, ROPE, VALUE, LATENT = 3, 16, 16, 24, 32
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
each_size = pytest.mark.parametrize("num_tokens", [1, 16, 19])


def assert_close(out: torch.Tensor, expected: torch.Tensor) -> None:
    assert out.dtype == expected.dtype
    tolerance = TOLERANCE[out.dtype]
    size = float(expected.float().abs().max())
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance * size)


def randn(*shape: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator).to(dtype).to(device)


@each_size
@each_dtype
def test_latent_queries_triton_turns_scales_and_absorbs(
    num_tokens: int, dtype: torch.dtype, triton_device: str
) -> None:
    q_THQ = randn(num_tokens, HEADS, NOPE + ROPE, dtype=dtype, device=triton_device)
    w_uk_HNC = randn(HEADS, NOPE, LATENT, dtype=dtype, device=triton_device)
    turn_TJ = rotations(torch.arange(num_tokens) * 977, torch.logspace(0, -4, ROPE // 2))
    scale_T = torch.linspace(1.0, 1.5, num_tokens).to(triton_device)
    arguments = (q_THQ, w_uk_HNC, turn_TJ.to(triton_device), scale_T)
    assert_close(latent_queries_triton(*arguments), latent_queries_reference(*arguments))


def test_latent_queries_triton_takes_strided_queries_as_they_are(triton_device: str) -> None:
    wide = randn(5, HEADS + 2, NOPE + ROPE, dtype=torch.float32, device=triton_device)
    w_uk_HNC = randn(HEADS, NOPE, LATENT, dtype=torch.float32, device=triton_device)
    arguments = (wide[:, 1:-1], w_uk_HNC, None, None)
    assert_close(latent_queries_triton(*arguments), latent_queries_reference(*arguments))


@each_size
@each_dtype
def test_expand_values_triton_matches_reference(
    num_tokens: int, dtype: torch.dtype, triton_device: str
) -> None:
    latents = randn(num_tokens, HEADS, LATENT, dtype=dtype, device=triton_device)
    w_uv_HVC = randn(HEADS, VALUE, LATENT, dtype=dtype, device=triton_device)
    out_THV = expand_values_triton(latents, w_uv_HVC)
    assert_close(out_THV, expand_values_reference(latents, w_uv_HVC))
