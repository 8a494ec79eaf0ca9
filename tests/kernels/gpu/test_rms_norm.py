"""RMS norm by Triton: worked value, dtypes, strides."""

from __future__ import annotations

import pytest
import torch

from ostro.kernels.gpu.rms_norm import rms_norm_triton
from ostro.kernels.rms_norm import rms_norm_reference


def test_rms_norm_triton_worked_example(triton_device: str) -> None:
    x_TD = torch.tensor([[3.0, 4.0]], device=triton_device)
    out_TD = rms_norm_triton(x_TD, torch.tensor([1.0, 2.0], device=triton_device), 0.0)
    torch.testing.assert_close(out_TD.cpu(), torch.tensor([[0.848528, 2.262742]]))


@pytest.mark.parametrize("shape", [(0, 8), (1, 1), (3, 100), (2, 3, 24), (1, 2500)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rms_norm_triton_matches_reference(
    shape: tuple[int, ...], dtype: torch.dtype, triton_device: str
) -> None:
    generator = torch.Generator().manual_seed(0)
    x_TD = torch.randn(shape, generator=generator).to(dtype).to(triton_device)
    weight_D = torch.randn(shape[-1], generator=generator).to(dtype).to(triton_device)
    out_TD = rms_norm_triton(x_TD, weight_D, 1e-6)
    assert out_TD.shape == x_TD.shape
    torch.testing.assert_close(out_TD, rms_norm_reference(x_TD, weight_D, 1e-6))


def test_rms_norm_triton_takes_strided_rows(triton_device: str) -> None:
    wide_TD = torch.randn(4, 10, generator=torch.Generator().manual_seed(1)).to(triton_device)
    weight_D = torch.full((6,), 0.5, device=triton_device)
    strided_TD = rms_norm_triton(wide_TD[:, 4:], weight_D, 1e-6)
    torch.testing.assert_close(strided_TD, rms_norm_reference(wide_TD[:, 4:], weight_D, 1e-6))
