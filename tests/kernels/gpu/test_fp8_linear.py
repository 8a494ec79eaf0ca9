"""Rounding rows to FP8 by Triton: worked value, dtypes, strides, what is too large or NaN."""

from __future__ import annotations

import pytest
import torch

from ostro.kernels.fp8_linear import quantize_fp8_reference
from ostro.kernels.gpu.fp8_linear import quantize_fp8_triton


def test_quantize_fp8_triton_worked_example(triton_device: str) -> None:
    x_TI = torch.tensor([[1.1, -9000.0]], device=triton_device)
    found_TI = quantize_fp8_triton(x_TI, torch.tensor(0.5, device=triton_device))
    assert found_TI.dtype == torch.float8_e4m3fn
    assert found_TI.float().tolist() == [[2.25, -448.0]]


@pytest.mark.parametrize("shape", [(0, 16), (1, 1), (3, 100), (2, 4500)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [1e-4, 0.02])  # with the first most values are too large
def test_quantize_fp8_triton_matches_reference(
    shape: tuple[int, int], dtype: torch.dtype, scale: float, triton_device: str
) -> None:
    x_TI = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    x_TI = x_TI.to(dtype).to(triton_device)
    input_scale = torch.tensor(scale, device=triton_device)
    found_TI = quantize_fp8_triton(x_TI, input_scale)
    assert found_TI.shape == shape
    assert torch.equal(found_TI.float(), quantize_fp8_reference(x_TI, input_scale).float())


@pytest.mark.parametrize("view", ["rows of a wider tensor", "transposed"])
def test_quantize_fp8_triton_takes_strided_rows_and_reads_no_more(
    view: str, triton_device: str
) -> None:
    wide_TI = torch.randn(6, 10, generator=torch.Generator().manual_seed(1)).to(triton_device)
    if view == "transposed":
        x_TI = wide_TI.t()
    else:
        wide_TI[:, :4] = torch.nan
        x_TI = wide_TI[:, 4:]
    input_scale = torch.tensor(0.02, device=triton_device)
    found_TI = quantize_fp8_triton(x_TI, input_scale)
    assert torch.equal(found_TI.float(), quantize_fp8_reference(x_TI, input_scale).float())


def test_quantize_fp8_triton_keeps_a_nan_where_it_is(triton_device: str) -> None:
    x_TI = torch.tensor([[1.0, torch.nan, torch.inf]], device=triton_device)
    found_TI = quantize_fp8_triton(x_TI, torch.tensor(1.0, device=triton_device)).float()
    assert found_TI.isnan().tolist() == [[False, True, False]]
    assert found_TI[0, 2].item() == 448.0
