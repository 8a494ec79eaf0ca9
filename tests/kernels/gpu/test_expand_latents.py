"""Keys and values from latents in pages, with poison in every place beyond the context."""

from __future__ import annotations

import pytest
import torch
from fp8_rows import as_fp8_rows

from ostro.kernels.gpu.expand_latents import expand_latents_reference, expand_latents_triton
from ostro.kernels.latent_heads import LatentHeads

PAGE_SIZE, LATENT, ROPE = 4, 36, 4
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def make_case(
    length: int, dtype: torch.dtype, device: str
) -> tuple[torch.Tensor, torch.Tensor, LatentHeads]:
    """A cache full of NaN but for the context, its pages, three heads."""
    generator = torch.Generator().manual_seed(0)
    num_pages = -(-length // PAGE_SIZE)
    pages_n = torch.randperm(num_pages + 1, generator=generator)[:num_pages]
    cache_NSW = torch.full((num_pages + 1, PAGE_SIZE, LATENT + ROPE), torch.nan)
    positions = torch.arange(length)
    context_LW = torch.randn(length, LATENT + ROPE, generator=generator)
    cache_NSW[pages_n[positions // PAGE_SIZE], positions % PAGE_SIZE] = context_LW
    w_uk_HNC = torch.randn(3, 20, LATENT, generator=generator) / LATENT**0.5
    w_uv_HVC = torch.randn(3, 24, LATENT, generator=generator) / LATENT**0.5
    heads = LatentHeads(w_uk_HNC.to(dtype).to(device), w_uv_HVC.to(dtype).to(device), 1.0)
    return cache_NSW.to(dtype).to(device), pages_n.to(device), heads


def test_expand_latents_triton_worked_example(triton_device: str) -> None:
    cache_NSW = torch.tensor([[[1.0, 2.0, 7.0]]], device=triton_device)
    heads = LatentHeads(
        torch.tensor([[[1.0, 1.0]]], device=triton_device),
        torch.tensor([[[0.0, 3.0]]], device=triton_device),
        1.0,
    )
    pages_n = torch.zeros(1, dtype=torch.int64, device=triton_device)
    key_SHQ, value_SHV = expand_latents_triton(cache_NSW, pages_n, 0, 1, heads)
    assert key_SHQ.tolist() == [[[3.0, 7.0]]]
    assert value_SHV.tolist() == [[[6.0]]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("first", "stop"), [(0, 1), (0, 27), (5, 26), (26, 27)])
def test_expand_latents_triton_matches_reference(
    first: int, stop: int, dtype: torch.dtype, triton_device: str
) -> None:
    cache_NSW, pages_n, heads = make_case(27, dtype, triton_device)
    found = expand_latents_triton(cache_NSW, pages_n, first, stop, heads)
    expected = expand_latents_reference(cache_NSW, pages_n, first, stop, heads)
    for one, other in zip(found, expected, strict=True):
        assert one.is_contiguous()
        tolerance = TOLERANCE[dtype]
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_expand_latents_triton_reads_fp8_rows(dtype: torch.dtype, triton_device: str) -> None:
    cache_NSW, pages_n, heads = make_case(27, dtype, triton_device)
    cache_NSW = as_fp8_rows(cache_NSW, LATENT)
    found = expand_latents_triton(cache_NSW, pages_n, 5, 26, heads)
    expected = expand_latents_reference(cache_NSW, pages_n, 5, 26, heads)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == dtype
        torch.testing.assert_close(one, other, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
