"""Products with one NVFP4 matrix by Triton: odd sizes, no rows, poison in and around everything."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from expert_cases import make_nvfp4_weight

from ostro.kernels.gpu.nvfp4_linear import linear_rows, nvfp4_linear_triton
from ostro.kernels.gpu.tiles import FP4, Tile, tile
from ostro.kernels.nvfp4_linear import Nvfp4Weight, nvfp4_linear_reference

BF16 = torch.bfloat16
HOPPER = torch.device("meta")  # whose processors are those of an H200


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """New tensors hold NaN, so that an output that nobody writes shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def make_rows(num_rows: int, inputs: int, device: str, dtype: torch.dtype = BF16) -> torch.Tensor:
    """Rows between rows of NaN, in columns between columns of NaN."""
    wide_TI = torch.full((num_rows + 4, inputs + 32), torch.nan)
    generator = torch.Generator().manual_seed(num_rows)
    wide_TI[2:-2, 16:-16] = torch.randn(num_rows, inputs, generator=generator)
    return wide_TI.to(dtype).to(device)[2:-2, 16:-16]


def assert_right(
    x_TI: torch.Tensor, weight: Nvfp4Weight, values_OI: torch.Tensor, cut: Tile | None = None
) -> None:
    found_TO = nvfp4_linear_triton(x_TI, weight, cut)
    assert found_TO.dtype == x_TI.dtype
    expected_TO = x_TI.to(BF16).float() @ values_OI.T
    torch.testing.assert_close(found_TO.float(), expected_TO, rtol=8e-3, atol=8e-3)


@pytest.mark.parametrize("num_rows", [0, 1, 19])
@pytest.mark.parametrize(("outputs", "inputs"), [(5, 16), (64, 128), (208, 272)])
@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
def test_nvfp4_linear_triton_matches_reference(
    num_rows: int, outputs: int, inputs: int, dtype: torch.dtype, triton_device: str
) -> None:
    weight, values_OI = make_nvfp4_weight(outputs, inputs, triton_device)
    assert_right(make_rows(num_rows, inputs, triton_device, dtype), weight, values_OI)


@pytest.mark.parametrize("num_rows", [33, 64, 65, 150])  # the last ones in tiles of 128
def test_many_rows_match_reference(num_rows: int, triton_device: str) -> None:
    weight, values_OI = make_nvfp4_weight(300, 144, triton_device)
    assert_right(make_rows(num_rows, 144, triton_device), weight, values_OI)


def test_products_of_64_inputs_give_what_those_of_a_block_give(triton_device: str) -> None:
    weight, values_OI = make_nvfp4_weight(80, 208, triton_device)
    for block_in in (128, 64):
        cut = Tile(
            block_rows=16,
            block_out=64,
            block_in=block_in,
            num_warps=4,
            num_stages=3,
            programs_per_processor=1,
        )
        assert_right(make_rows(9, 208, triton_device), weight, values_OI, cut)


@pytest.mark.parametrize("view", ["turned", "odd stride", "odd start"])
def test_rows_that_no_box_can_be_cut_from_are_copied(view: str, triton_device: str) -> None:
    weight, values_OI = make_nvfp4_weight(24, 32, triton_device)
    x_TI = torch.randn(3, 32, generator=torch.Generator().manual_seed(0)).to(BF16)
    if view == "turned":
        placed_TI = x_TI.t().contiguous().to(triton_device).t()
    else:
        stride, start = (41, 8) if view == "odd stride" else (48, 3)
        flat = torch.full((4 * stride,), torch.nan, dtype=BF16, device=triton_device)
        placed_TI = flat.as_strided((3, 32), (stride, 1), start)
        placed_TI.copy_(x_TI)
    assert_right(placed_TI, weight, values_OI)


def test_one_row_of_an_odd_stride_counts_as_contiguous_and_is_copied(triton_device: str) -> None:
    weight, values_OI = make_nvfp4_weight(24, 32, triton_device)
    wide_TI = torch.full((1, 41), torch.nan, dtype=BF16, device=triton_device)
    wide_TI[:, :32] = make_rows(1, 32, triton_device)
    assert_right(wide_TI[:, :32], weight, values_OI)


def test_a_rows_own_trouble_stays_its_own(triton_device: str) -> None:
    weight, _ = make_nvfp4_weight(48, 144, triton_device)
    x_TI = make_rows(21, 144, triton_device)
    clean_TO = nvfp4_linear_triton(x_TI, weight)
    x_TI[4] = torch.nan
    found_TO = nvfp4_linear_triton(x_TI, weight)
    others = torch.arange(21, device=triton_device) != 4
    assert torch.equal(found_TO[others], clean_TO[others])
    assert found_TO[4].isnan().all()


def test_reference_is_the_product_with_the_dequantised_weight() -> None:
    weight, values_OI = make_nvfp4_weight(40, 80)
    x_TI = torch.randn(3, 80, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(nvfp4_linear_reference(x_TI, weight), x_TI @ values_OI.T)


def test_large_tiles_are_for_what_fills_the_gpu() -> None:
    rows = [linear_rows(each, 4096, HOPPER) for each in (1, 16, 17, 64, 200, 512, 2048)]
    assert rows == [16, 16, 32, 64, 64, 64, 128]
    for each in set(rows):
        assert tile("linear", FP4, each, torch.device("cpu")).block_rows == each
