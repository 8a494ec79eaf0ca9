"""Chunks joined and taken to values in one launch."""

from __future__ import annotations

import pytest
import torch

from ostro.kernels.gpu.decode_chunks import cut_chunks
from ostro.kernels.gpu.join_values import join_values_reference, join_values_triton, joins_values
from ostro.kernels.gpu.mla_decode import AttendedChunks

HEADS, LATENT = 3, 32


def _parts(counts: list[int], dtype: torch.dtype, device: str) -> AttendedChunks:
    """Of queries with so many chunks; what is not written is NaN."""
    generator = torch.Generator().manual_seed(sum(counts))
    part_XHC = torch.randn(sum(counts), HEADS, LATENT, generator=generator)
    lse_XH = torch.randn(sum(counts), HEADS, generator=generator) * 20
    out_THC = torch.randn(len(counts), HEADS, LATENT, generator=generator).to(dtype)
    x = 0
    for t, count in enumerate(counts):
        if count == 1:
            part_XHC[x], lse_XH[x] = torch.nan, torch.nan
        else:
            out_THC[t] = torch.nan
        x += count
    return AttendedChunks(part_XHC.to(device), lse_XH.to(device), out_THC.to(device))


def test_join_values_triton_worked_example(triton_device: str) -> None:
    whole = torch.tensor([[[2.0, 1.0]]], device=triton_device)
    unused = torch.full((1, 1, 2), torch.nan, device=triton_device)
    parts = AttendedChunks(unused, unused[..., 0], whole)
    first_T1 = torch.tensor([0, 1], dtype=torch.int32, device=triton_device)
    w_uv_HVC = torch.tensor([[[3.0, 4.0]]], device=triton_device)
    assert join_values_triton(parts, first_T1, w_uv_HVC).tolist() == [[[10.0]]]


@pytest.mark.parametrize("counts", [[], [0], [1], [2, 1], [9, 0, 1, 40]], ids=str)
@pytest.mark.parametrize("value", [24, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_join_values_triton_matches_reference(
    counts: list[int], value: int, dtype: torch.dtype, triton_device: str
) -> None:
    parts = _parts(counts, dtype, triton_device)
    first = torch.tensor([0, *counts], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    generator = torch.Generator().manual_seed(value)
    w_uv_HVC = torch.randn(HEADS, value, LATENT, generator=generator).to(dtype).to(triton_device)
    arguments = (parts, first.to(triton_device), w_uv_HVC)
    found_THV, expected_THV = join_values_triton(*arguments), join_values_reference(*arguments)
    assert found_THV.dtype == dtype
    tolerance = 1e-4 if dtype == torch.float32 else 5e-2
    torch.testing.assert_close(found_THV, expected_THV, rtol=tolerance, atol=tolerance)


def test_only_few_queries_of_few_chunks_are_joined_so() -> None:
    def chunks_of(lengths: list[int]) -> bool:
        tables = [list(range(-(-length // 64))) for length in lengths]
        return joins_values(cut_chunks(tables, lengths, 64))

    assert chunks_of([2_000])
    assert chunks_of([16_000] * 4)
    assert not chunks_of([100] * 5)
    assert not chunks_of([60_000])
