"""Grouped products of NVFP4 weights: odd sizes, empty experts, poison around every row."""

from __future__ import annotations

import pytest
import torch
from expert_cases import make_nvfp4_experts

from ostro.kernels.gpu.expert_schedule import ExpertSchedule, expert_schedule_reference
from ostro.kernels.gpu.grouped_gemm import down_reference, gate_up_reference
from ostro.kernels.gpu.nvfp4_gemm import (
    down_nvfp4_reference,
    down_nvfp4_triton,
    gate_up_nvfp4_reference,
    gate_up_nvfp4_triton,
)
from ostro.kernels.gpu.tiles import Tile

BF16 = torch.bfloat16
# Outputs and inputs: less than a block and more than one, not filling tiles of outputs.
each_size = pytest.mark.parametrize(("hidden", "inner"), [(16, 48), (208, 144)])
each_count = pytest.mark.parametrize("num_rows_E", [[1], [3, 0, 20, 16], [0, 0, 1]], ids=str)


class Case:
    """Rows of `num_rows_E` for each expert in the schedule's order, and NaN after them."""

    def __init__(
        self, num_rows_E: list[int], hidden: int, inner: int, device: str, block_rows: int = 16
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        num_experts, self.num_pairs = len(num_rows_E), sum(num_rows_E)
        ids = torch.arange(num_experts).repeat_interleave(torch.tensor(num_rows_E))
        ids = torch.cat((ids, torch.tensor([-1, -1])))
        ids = ids[torch.randperm(len(ids), generator=generator)]
        self.is_present = (ids >= 0).to(device)
        counts = torch.zeros(1 + num_experts, dtype=torch.int64, device=device)
        self.schedule: ExpertSchedule = expert_schedule_reference(
            ids[:, None].to(device), num_experts, block_rows, counts
        )
        self.experts, self.gate_up_EHD, self.down_EDF = make_nvfp4_experts(
            num_experts, hidden, inner, device
        )
        self.x_AD = self._rows(hidden, generator, device)
        self.hidden_AF = self._rows(inner, generator, device)
        self.weight_RK = torch.rand(len(ids), 1, generator=generator).to(device)

    def _rows(self, width: int, generator: torch.Generator, device: str) -> torch.Tensor:
        rows = torch.randn(self.num_pairs + 2, width, generator=generator)
        rows[self.num_pairs :] = torch.nan
        return rows.to(BF16).to(device)

    def gate_up(self, cut: Tile | None = None) -> torch.Tensor:
        out_AF = gate_up_nvfp4_triton(self.x_AD, self.experts, self.schedule, cut)
        return out_AF[: self.num_pairs]

    def down(self, cut: Tile | None = None) -> torch.Tensor:
        y_AD = down_nvfp4_triton(
            self.hidden_AF, self.experts, self.weight_RK, self.schedule, BF16, cut
        )
        return y_AD[self.is_present]


def assert_close(out: torch.Tensor, expected: torch.Tensor) -> None:
    assert out.dtype == BF16
    scale = max(1.0, float(expected.float().abs().max()) / 4)
    torch.testing.assert_close(out.float(), expected.float(), rtol=8e-3, atol=8e-3 * scale)


def test_references_are_those_of_the_dequantised_weights() -> None:
    case = Case([3, 0, 5], 48, 80, "cpu")
    torch.testing.assert_close(
        gate_up_nvfp4_reference(case.x_AD, case.experts, case.schedule),
        gate_up_reference(case.x_AD, case.gate_up_EHD, case.schedule),
    )
    arguments = case.weight_RK, case.schedule, BF16
    torch.testing.assert_close(
        down_nvfp4_reference(case.hidden_AF, case.experts, *arguments),
        down_reference(case.hidden_AF, case.down_EDF, *arguments),
    )


@each_count
@each_size
def test_gate_up_nvfp4_triton_matches_reference(
    num_rows_E: list[int], hidden: int, inner: int, triton_device: str
) -> None:
    case = Case(num_rows_E, hidden, inner, triton_device)
    assert_close(case.gate_up(), gate_up_reference(case.x_AD, case.gate_up_EHD, case.schedule))


@each_count
@each_size
def test_down_nvfp4_triton_matches_reference(
    num_rows_E: list[int], hidden: int, inner: int, triton_device: str
) -> None:
    case = Case(num_rows_E, hidden, inner, triton_device)
    expected = down_reference(
        case.hidden_AF, case.down_EDF, case.weight_RK, case.schedule, torch.bfloat16
    )
    assert_close(case.down(), expected[case.is_present])


@pytest.mark.parametrize("block_rows", [32, 64, 128])
def test_large_tiles_match_reference(block_rows: int, triton_device: str) -> None:
    case = Case([block_rows + 5, 2], 272, 144, triton_device, block_rows)
    assert_close(case.gate_up(), gate_up_reference(case.x_AD, case.gate_up_EHD, case.schedule))


def test_products_of_64_inputs_give_what_those_of_a_block_give(triton_device: str) -> None:
    case = Case([9, 4], 272, 208, triton_device)
    whole, half = (
        Tile(
            block_rows=16,
            block_out=64,
            block_in=block_in,
            num_warps=4,
            num_stages=3,
            programs_per_processor=1,
        )
        for block_in in (128, 64)
    )
    assert_close(case.gate_up(half), case.gate_up(whole))
    assert_close(case.down(half), case.down(whole))


def test_a_rows_own_trouble_stays_its_own(triton_device: str) -> None:
    case = Case([5, 0, 17], 32, 48, triton_device)
    clean_AF = case.gate_up().clone()
    case.x_AD[4] = torch.nan
    out_AF = case.gate_up()
    others = torch.arange(22, device=triton_device) != 4
    assert torch.equal(out_AF[others], clean_AF[others])
    assert out_AF[4].isnan().all()
