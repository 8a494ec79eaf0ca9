"""Linear layers: packed and plain weights agree."""

from __future__ import annotations

import pytest
import torch

from ostro.kernels.linear import linear, linear_reference, pack_linear


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
