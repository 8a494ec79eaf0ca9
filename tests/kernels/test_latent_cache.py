"""Latent cache: rows land in their slots and nowhere else."""

from __future__ import annotations

import pytest
import torch

from ostro.kernels.latent_cache import (
    FP8_ROWS,
    row_parts,
    row_values,
    row_width,
    write_latents,
    write_latents_reference,
    write_rows,
)
from ostro.kernels.rotary import rotations


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


def test_an_fp8_row_takes_six_tenths_of_bfloat16() -> None:
    assert row_width(256, 64, FP8_ROWS) * FP8_ROWS.itemsize == 384
    assert row_width(256, 64, torch.bfloat16) * torch.bfloat16.itemsize == 640


def test_fp8_rows_hold_latents_to_e4m3_and_rope_keys_to_float16() -> None:
    generator = torch.Generator().manual_seed(0)
    cache_NSW = torch.full((2, 3, row_width(4, 2, FP8_ROWS)), 0xFF, dtype=FP8_ROWS)
    expected_NSW = cache_NSW.clone()
    rows_TW = torch.randn(2, 6, generator=generator)
    slots_T = torch.tensor([4, 1])
    for write, cache in ((write_latents, cache_NSW), (write_latents_reference, expected_NSW)):
        write(cache, rows_TW[:, :4], rows_TW[:, 4:], slots_T)
    assert torch.equal(cache_NSW, expected_NSW)
    stored_TW = cache_NSW.view(-1, cache_NSW.shape[2])[slots_T]
    latent_TC, rope_key_TP = row_parts(stored_TW, 4)
    assert torch.equal(latent_TC.float(), rows_TW[:, :4].to(torch.float8_e4m3fn).float())
    assert torch.equal(rope_key_TP.float(), rows_TW[:, 4:].half().float())
    values_TW = row_values(stored_TW, 4, torch.bfloat16)
    assert values_TW.dtype == torch.bfloat16
    torch.testing.assert_close(values_TW.float(), rows_TW, rtol=2**-4, atol=2**-10)
    assert row_values(cache_NSW[0, 0], 4, torch.float32).isnan().all()


def test_what_fp8_rows_do_not_hold_becomes_their_largest_value_and_nan_stays() -> None:
    cache_NSW = torch.zeros(1, 1, row_width(2, 2, FP8_ROWS), dtype=FP8_ROWS)
    latent_TC = torch.tensor([[1e4, torch.nan]])
    rope_key_TP = torch.tensor([[-1e6, torch.nan]])
    write_latents(cache_NSW, latent_TC, rope_key_TP, torch.tensor([0]))
    row_W = row_values(cache_NSW[0, 0], 2, torch.float32)
    assert row_W[[0, 2]].tolist() == [448.0, -65504.0]
    assert row_W[[1, 3]].isnan().all()


def test_plain_rows_are_values_already() -> None:
    rows_XW = torch.randn(3, 6)
    assert row_values(rows_XW, 4, torch.bfloat16) is rows_XW


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_write_rows_fills_fp8_rows_as_plain_ones(dtype: torch.dtype) -> None:
    """In bfloat16 and sizes that the CPU operators take, so that they must step back."""
    generator = torch.Generator().manual_seed(0)
    row_TW = torch.randn(5, 48, generator=generator).to(dtype)
    norm_C = torch.rand(32, generator=generator).to(dtype)
    turn_TJ = rotations(torch.arange(5) * 31, torch.logspace(0, -3, 8))
    slots_T = torch.tensor([7, 0, 3, 6, 2])
    plain_NSW = torch.zeros(2, 4, 48, dtype=dtype)
    fp8_NSW = torch.zeros(2, 4, row_width(32, 16, FP8_ROWS), dtype=FP8_ROWS)
    for cache_NSW in (plain_NSW, fp8_NSW):
        write_rows(cache_NSW, row_TW, norm_C, 1e-6, turn_TJ, slots_T)
    found_NSW = row_values(fp8_NSW, 32, torch.float32)
    torch.testing.assert_close(found_NSW, plain_NSW.float(), rtol=2**-3.9, atol=2**-8)
