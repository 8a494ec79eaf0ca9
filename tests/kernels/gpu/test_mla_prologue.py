"""Norms, rotary and the cache write in one launch."""

from __future__ import annotations

import pytest
import torch

from ostro.kernels.fp8_linear import quantize_fp8_reference
from ostro.kernels.gpu.mla_prologue import mla_prologue_triton
from ostro.kernels.mla_prologue import PrologueNorms, mla_prologue_reference
from ostro.kernels.rotary import rotations

QUERY, LATENT, ROPE, PAGE = 24, 12, 8, 4


def arguments(
    num_tokens: int, dtype: torch.dtype, device: str
) -> tuple[tuple[torch.Tensor, torch.Tensor, PrologueNorms], torch.Tensor, torch.Tensor]:
    """(queries, rows, norms) cut from one product, rotations, slots."""
    generator = torch.Generator().manual_seed(num_tokens)
    wide = torch.randn(num_tokens, QUERY + LATENT + ROPE, generator=generator).to(dtype).to(device)
    norms = torch.rand(QUERY + LATENT, generator=generator).to(dtype).to(device)
    turn_TJ = rotations(torch.arange(num_tokens) * 31, torch.logspace(0, -3, ROPE // 2))
    slots_T = torch.randperm(5 * PAGE, generator=generator)[:num_tokens]
    parts = (
        wide[:, :QUERY],
        wide[:, QUERY:],
        PrologueNorms(norms[:QUERY], norms[QUERY:], 1e-6),
    )
    return parts, turn_TJ.to(device), slots_T.to(device)


@pytest.mark.parametrize("num_tokens", [0, 1, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_mla_prologue_triton_matches_reference(
    num_tokens: int, dtype: torch.dtype, triton_device: str
) -> None:
    parts, turn_TJ, slots_T = arguments(num_tokens, dtype, triton_device)
    if num_tokens:
        slots_T[0] = -1
    caches = [torch.full((5, PAGE, LATENT + ROPE), 7.0).to(dtype).to(triton_device) for _ in "ab"]
    out_TL = mla_prologue_triton(*parts, turn_TJ, slots_T, caches[0])
    expected_TL = mla_prologue_reference(*parts, turn_TJ, slots_T, caches[1])
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(out_TL, expected_TL, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(caches[0], caches[1], rtol=tolerance, atol=tolerance)


def test_mla_prologue_triton_rounds_queries_as_the_next_product_would(triton_device: str) -> None:
    parts, turn_TJ, slots_T = arguments(5, torch.bfloat16, triton_device)
    cache_NSW = torch.zeros(5, PAGE, LATENT + ROPE, dtype=torch.bfloat16, device=triton_device)
    scale = torch.tensor(0.03, device=triton_device)
    wide_TL = mla_prologue_triton(*parts, turn_TJ, slots_T, cache_NSW)
    found_TL = mla_prologue_triton(*parts, turn_TJ, slots_T, cache_NSW, scale)
    assert found_TL.dtype == torch.float8_e4m3fn
    assert torch.equal(found_TL.float(), quantize_fp8_reference(wide_TL, scale).float())
