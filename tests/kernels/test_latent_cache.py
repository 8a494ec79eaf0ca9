"""Latent cache: rows land in their slots and nowhere else."""

from __future__ import annotations

import pytest
import torch

from ostro.kernels.latent_cache import write_latents, write_latents_reference


def test_write_latents_worked_example() -> None:
    cache_NSW = torch.zeros(2, 2, 3)
    write_latents(cache_NSW, torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0]]), torch.tensor([3]))
    assert cache_NSW[1, 1].tolist() == [1.0, 2.0, 3.0]
    assert cache_NSW.count_nonzero() == 3


@pytest.mark.parametrize("num_tokens", [0, 1, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_write_latents_matches_reference(num_tokens: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    cache_NSW = torch.randn(4, 3, 6, generator=generator).to(dtype)
    expected_NSW = cache_NSW.clone()
    rows_TW = torch.randn(num_tokens, 6, generator=generator).to(dtype)
    slots_T = torch.randperm(12, generator=generator)[:num_tokens]
    write_latents(cache_NSW, rows_TW[:, :4], rows_TW[:, 4:], slots_T)
    write_latents_reference(expected_NSW, rows_TW[:, :4], rows_TW[:, 4:], slots_T)
    assert torch.equal(cache_NSW, expected_NSW)
