"""Rounding rows to FP8 by Triton: worked value, dtypes, strides, what is too large or NaN."""

from __future__ import annotations

import pytest
import torch
from expert_cases import make_fp8_weight

from ostro.kernels.fp8_linear import Fp8Rows, fp8_linear_reference, quantize_fp8_reference
from ostro.kernels.gpu.fp8_linear import MAX_FEW_ROWS, fp8_linear_triton, quantize_fp8_triton


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


@pytest.mark.parametrize("num_rows", [0, 1, MAX_FEW_ROWS])
@pytest.mark.parametrize(("outputs", "inputs"), [(5, 7), (3000, 80), (9, 5000)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fp8_linear_triton_matches_reference(
    num_rows: int, outputs: int, inputs: int, dtype: torch.dtype, triton_device: str
) -> None:
    weight = make_fp8_weight(outputs, inputs, triton_device)
    x_TI = torch.randn(num_rows, inputs, generator=torch.Generator().manual_seed(num_rows))
    x_TI = x_TI.to(dtype).to(triton_device)
    expected_TO = fp8_linear_reference(x_TI, weight)
    values_TI = quantize_fp8_reference(x_TI, weight.input_scale)
    for rows in (x_TI, Fp8Rows(values_TI=values_TI, dtype=dtype)):
        found_TO = fp8_linear_triton(rows, weight)
        assert found_TO.dtype == dtype
        torch.testing.assert_close(found_TO, expected_TO, rtol=1e-2, atol=1e-4)


def test_fp8_linear_triton_does_not_read_other_rows(triton_device: str) -> None:
    weight = make_fp8_weight(16, 16, triton_device)
    wide_TI = torch.full((4, 32), torch.nan, device=triton_device)
    wide_TI[1:3, :16] = torch.randn(2, 16, generator=torch.Generator().manual_seed(0))
    x_TI = wide_TI[1:3, :16]
    torch.testing.assert_close(
        fp8_linear_triton(x_TI, weight), fp8_linear_reference(x_TI, weight), rtol=1e-5, atol=1e-5
    )
