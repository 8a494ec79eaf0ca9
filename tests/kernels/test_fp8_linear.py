"""FP8 linear layers: meaning of both scales and of rounding, and the dispatch of `linear`."""

from __future__ import annotations

import pytest
import torch
from expert_cases import make_fp8_weight

from ostro.kernels.fp8_linear import (
    Fp8Rows,
    Fp8Weight,
    fp8_linear,
    fp8_linear_cuda,
    fp8_linear_reference,
    quantize_fp8,
)
from ostro.kernels.grouped_gemm import mlp
from ostro.kernels.linear import is_packed, linear, pack_linear


def test_fp8_linear_worked_example() -> None:
    weight = Fp8Weight(
        values_OI=torch.tensor([[2.0, 4.0]]).to(torch.float8_e4m3fn),
        scale=torch.tensor(0.5),
        input_scale=torch.tensor(1.0),
    )
    assert fp8_linear(torch.tensor([[1.1, 3.0]]), weight).tolist() == [[7.125]]


def test_quantize_fp8_worked_example() -> None:
    found = quantize_fp8(torch.tensor([[1.1, -9000.0]]), torch.tensor(0.5))
    assert found.dtype == torch.float8_e4m3fn
    assert found.float().tolist() == [[2.25, -448.0]]


def test_fp8_linear_is_near_the_wide_product_of_the_same_weight() -> None:
    weight = make_fp8_weight(48, 80)
    x_TI = torch.randn(9, 80, generator=torch.Generator().manual_seed(1))
    wide_TO = x_TI @ (weight.values_OI.float() * weight.scale).T
    found_TO = fp8_linear(x_TI, weight)
    assert 0 < float((found_TO - wide_TO).norm() / wide_TO.norm()) < 0.04


@pytest.mark.parametrize("num_rows", [0, 1, 3, 17])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fp8_linear_cuda_matches_reference(
    num_rows: int, dtype: torch.dtype, triton_device: str
) -> None:
    weight = make_fp8_weight(48, 80, triton_device)
    wide_TI = torch.randn(num_rows, 96, generator=torch.Generator().manual_seed(1))
    x_TI = wide_TI.to(dtype).to(triton_device)[:, 16:]
    found_TO = fp8_linear_cuda(x_TI, weight)
    assert found_TO.shape == (num_rows, 48)
    expected_TO = fp8_linear_reference(x_TI, weight)
    # Hopper keeps about 14 bits of a sum until it is passed on to float32.
    torch.testing.assert_close(found_TO, expected_TO, rtol=0.016, atol=0.002)


@pytest.mark.parametrize(("outputs", "inputs"), [(24, 32), (32, 24)])
def test_fp8_linear_cuda_refuses_sizes_that_the_gpu_cannot_multiply(
    outputs: int, inputs: int, triton_device: str
) -> None:
    weight = make_fp8_weight(outputs, inputs, triton_device)
    with pytest.raises(ValueError, match="must divide by 16"):
        fp8_linear_cuda(torch.zeros(1, inputs, device=triton_device), weight)


def test_linear_and_mlp_take_an_fp8_weight() -> None:
    gate_up, down = make_fp8_weight(64, 48), make_fp8_weight(48, 32)
    x_TD = torch.randn(5, 48, generator=torch.Generator().manual_seed(2))
    assert torch.equal(linear(x_TD, gate_up), fp8_linear_reference(x_TD, gate_up))
    gate_TF, up_TF = fp8_linear_reference(x_TD, gate_up).chunk(2, dim=1)
    hidden_TF = torch.nn.functional.silu(gate_TF) * up_TF
    assert torch.equal(mlp(x_TD, gate_up, down), fp8_linear_reference(hidden_TF, down))


def test_an_fp8_weight_is_never_packed() -> None:
    weight = make_fp8_weight(512, 256)
    assert pack_linear(weight) is weight
    assert not is_packed(weight)


def test_linear_takes_rows_that_are_rounded_already(triton_device: str) -> None:
    weight = make_fp8_weight(48, 80, triton_device)
    x_TI = torch.randn(3, 80, generator=torch.Generator().manual_seed(1)).to(triton_device)
    values_TI = quantize_fp8(x_TI, weight.input_scale)
    rows = Fp8Rows(values_TI=values_TI, dtype=x_TI.dtype)
    torch.testing.assert_close(linear(rows, weight), linear(x_TI, weight))


def test_linear_refuses_rounded_rows_for_a_plain_weight() -> None:
    rows = Fp8Rows(values_TI=torch.zeros(1, 2).to(torch.float8_e4m3fn), dtype=torch.float32)
    with pytest.raises(TypeError, match="FP8"):
        linear(rows, torch.zeros(3, 2))
