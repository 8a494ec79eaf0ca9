"""RMS norm: worked value, dtypes, strides."""

from __future__ import annotations

import pytest
import torch

from ostro.kernels.rms_norm import rms_norm


def test_rms_norm_worked_example() -> None:
    out = rms_norm(torch.tensor([[3.0, 4.0]]), torch.tensor([1.0, 2.0]), 0.0)
    torch.testing.assert_close(out, torch.tensor([[0.848528, 2.262742]]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rms_norm_matches_float64(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x_TD = torch.randn(5, 100, generator=generator).to(dtype)
    weight_D = torch.randn(100, generator=generator).to(dtype)
    wide = x_TD.double()
    normed = wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight_D.double()
    out_TD = rms_norm(x_TD, weight_D, 1e-6)
    assert out_TD.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 1.6e-2
    torch.testing.assert_close(out_TD.double(), normed, rtol=tolerance, atol=tolerance)


def test_rms_norm_takes_strided_rows() -> None:
    wide_TD = torch.randn(4, 10, generator=torch.Generator().manual_seed(1))
    weight_D = torch.full((6,), 0.5)
    strided = rms_norm(wide_TD[:, :6], weight_D, 1e-6)
    torch.testing.assert_close(strided, rms_norm(wide_TD[:, :6].contiguous(), weight_D, 1e-6))


def test_rms_norm_of_large_bfloat16_does_not_overflow() -> None:
    out = rms_norm(torch.full((1, 8), 3e38).bfloat16(), torch.ones(8).bfloat16(), 1e-6)
    assert not out.isnan().any()
