"""Linear layers: packed and plain weights agree."""

from __future__ import annotations

import pytest
import torch

from ostro.kernels.fp8_linear import Fp8Weight
from ostro.kernels.linear import join_linear, linear, linear_reference, pack_linear


def test_linear_worked_example() -> None:
    assert linear(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]])).item() == 11.0


@pytest.mark.parametrize("num_rows", [1, 3, 40])
@pytest.mark.parametrize("outputs", [7, 512])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_linear_matches_reference_for_plain_and_packed_weights(
    num_rows: int, outputs: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    x_TI = torch.randn(num_rows, 256, generator=generator).to(dtype)
    weight_OI = torch.randn(outputs, 256, generator=generator).to(dtype)
    expected_TO = linear_reference(x_TI, weight_OI)
    tolerance = (
        {"rtol": 2e-2, "atol": 0.2} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-4}
    )
    for weight in (weight_OI, pack_linear(weight_OI)):
        torch.testing.assert_close(linear(x_TI, weight), expected_TO, **tolerance)


def test_linear_takes_strided_rows() -> None:
    x_TI = torch.randn(3, 600).bfloat16()[:, 44:]
    weight_OI = torch.randn(512, 556).bfloat16()
    torch.testing.assert_close(
        linear(x_TI, pack_linear(weight_OI)), linear(x_TI.contiguous(), weight_OI)
    )


@pytest.mark.parametrize(
    "weight", [torch.ones(512, 256), torch.ones(8, 8).bfloat16()], ids=["float32", "small"]
)
def test_pack_linear_leaves_what_gains_nothing(weight: torch.Tensor) -> None:
    assert pack_linear(weight) is weight


def test_join_linear_puts_one_weight_after_the_other() -> None:
    first, second = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]])
    joined = join_linear(first, second)
    assert isinstance(joined, torch.Tensor)
    assert joined.tolist() == [[1.0, 2.0], [3.0, 4.0]]


def test_join_linear_keeps_fp8_weights_of_other_scales_apart() -> None:
    def weight(scale: float) -> Fp8Weight:
        values = torch.ones(16, 16).to(torch.float8_e4m3fn)
        return Fp8Weight(values_OI=values, scale=torch.tensor(scale), input_scale=torch.tensor(1.0))

    joined = join_linear(weight(0.5), weight(0.5))
    assert isinstance(joined, Fp8Weight)
    assert joined.values_OI.shape == (32, 16)
    assert join_linear(weight(0.5), weight(0.25)) is None
    assert join_linear(weight(0.5), torch.ones(16, 16)) is None
