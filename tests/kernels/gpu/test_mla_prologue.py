"""Norms, rotary and the cache write in one launch."""

from __future__ import annotations

import pytest
import torch

from ostro.kernels.fp8_linear import quantize_fp8_reference
from ostro.kernels.gpu.mla_prologue import mla_prologue_triton
from ostro.kernels.latent_cache import FP8_ROWS, row_values, row_width
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_mla_prologue_triton_fills_fp8_rows(dtype: torch.dtype, triton_device: str) -> None:
    parts, turn_TJ, slots_T = arguments(7, dtype, triton_device)
    slots_T[0] = -1
    shape = (5, PAGE, row_width(LATENT, ROPE, FP8_ROWS))
    caches = [torch.full(shape, 0x30, dtype=FP8_ROWS, device=triton_device) for _ in "ab"]
    mla_prologue_triton(*parts, turn_TJ, slots_T, caches[0])
    mla_prologue_reference(*parts, turn_TJ, slots_T, caches[1])
    found, expected = (row_values(cache, LATENT, torch.float32) for cache in caches)
    # One ulp where the value before differs by its last bit.
    torch.testing.assert_close(found, expected, rtol=2**-3, atol=2**-9)
    differs = (found - expected).abs() > 1e-2 * expected.abs() + 1e-3
    assert differs.sum() <= differs.numel() // 100


def test_mla_prologue_triton_keeps_to_what_fp8_rows_hold(triton_device: str) -> None:
    (query_TL, row_TW, norms), turn_TJ, slots_T = arguments(2, torch.float32, triton_device)
    row_TW = row_TW.clone()
    row_TW[0, LATENT:] = 1e6
    row_TW[1] = torch.nan
    norms = PrologueNorms(norms.query_L, norms.latent_C * 0 + 1e6, 1e-6)
    shape = (5, PAGE, row_width(LATENT, ROPE, FP8_ROWS))
    cache_NSW = torch.zeros(shape, dtype=FP8_ROWS, device=triton_device)
    mla_prologue_triton(query_TL, row_TW, norms, turn_TJ * 0 + 1, slots_T, cache_NSW)
    rows_TW = row_values(cache_NSW.view(-1, shape[2])[slots_T], LATENT, torch.float32)
    assert (rows_TW[0, :LATENT].abs() == 448).all()
    assert (rows_TW[0, LATENT:] == 65504).all()
    assert rows_TW[1].isnan().all()


def test_mla_prologue_triton_rounds_queries_as_the_next_product_would(triton_device: str) -> None:
    parts, turn_TJ, slots_T = arguments(5, torch.bfloat16, triton_device)
    cache_NSW = torch.zeros(5, PAGE, LATENT + ROPE, dtype=torch.bfloat16, device=triton_device)
    scale = torch.tensor(0.03, device=triton_device)
    wide_TL = mla_prologue_triton(*parts, turn_TJ, slots_T, cache_NSW)
    found_TL = mla_prologue_triton(*parts, turn_TJ, slots_T, cache_NSW, scale)
    assert found_TL.dtype == torch.float8_e4m3fn
    assert torch.equal(found_TL.float(), quantize_fp8_reference(wide_TL, scale).float())
