"""Grouped matrix products: odd sizes, empty experts, poison around every row that counts."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from ostro.kernels.gpu.expert_schedule import ExpertSchedule, expert_schedule_reference
from ostro.kernels.gpu.grouped_gemm import (
    down_reference,
    down_triton,
    gate_up_reference,
    gate_up_triton,
)

FP8 = torch.float8_e4m3fn
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 8e-3, FP8: 0.07}


@dataclass
class Case:
    """Rows of `num_rows_E` for each expert, and NaN after them."""

    num_rows_E: list[int]
    num_in: int
    num_out: int
    dtype: torch.dtype
    device: str
    block_rows: int = 16

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        num_experts, num_pairs = len(self.num_rows_E), sum(self.num_rows_E)
        ids = torch.arange(num_experts).repeat_interleave(torch.tensor(self.num_rows_E))
        ids = torch.cat((ids, torch.tensor([-1, -1])))
        ids = ids[torch.randperm(len(ids), generator=generator)]
        counts = torch.zeros(1 + num_experts, dtype=torch.int64, device=self.device)
        self.schedule: ExpertSchedule = expert_schedule_reference(
            ids[:, None].to(self.device), num_experts, self.block_rows, counts
        )
        x = torch.randn(num_pairs + 2, self.num_in, generator=generator)
        x[num_pairs:] = torch.nan
        self.x = self._narrow(x)
        weight = torch.randn(num_experts, self.num_out, self.num_in, generator=generator)
        self.weight = self._narrow(weight / self.num_in**0.5)
        self.gate_weight = torch.rand(num_pairs + 2, 1, generator=generator).to(self.device)
        self.scales = torch.rand(3, num_experts, generator=generator).add(0.5).to(self.device)
        self.is_present = (ids >= 0).to(self.device)

    def _narrow(self, values: torch.Tensor) -> torch.Tensor:
        return values.to(self.dtype).to(self.device)

    def scale_arguments(self, num_scales: int) -> dict[str, torch.Tensor]:
        if self.dtype != FP8:
            return {}
        names = ("scale_E", "input_scale_E", "next_input_scale_E")[:num_scales]
        return dict(zip(names, self.scales, strict=False))


def assert_close(out: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    assert out.dtype == expected.dtype
    scale = max(1.0, float(expected.float().abs().max()) / 4) if expected.numel() else 1.0
    torch.testing.assert_close(
        out.float(), expected.float(), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * scale
    )


each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, FP8], ids=str)


def test_gate_up_triton_worked_example(triton_device: str) -> None:
    case = Case([1], 4, 2, torch.float32, triton_device)
    case.x[0] = torch.tensor([1.0, 0.0, 0.0, 0.0])
    case.weight[0, 0], case.weight[0, 1] = 1.0, 2.0
    out_AF = gate_up_triton(case.x, case.weight, case.schedule)
    torch.testing.assert_close(out_AF[:1].cpu(), torch.tensor([[1.4621172]]))


def test_down_triton_worked_example(triton_device: str) -> None:
    case = Case([1], 4, 1, torch.float32, triton_device)
    case.x[0] = torch.tensor([2.0, 0.0, 0.0, 0.0])
    case.weight[:], case.gate_weight[:] = 3.0, 0.5
    y_AD = down_triton(case.x, case.weight, case.gate_weight, case.schedule, torch.float32)
    assert y_AD[case.is_present].tolist() == [[3.0]]


@each_dtype
@pytest.mark.parametrize("num_rows_E", [[1], [3, 0, 20, 16], [0, 0, 1]], ids=str)
@pytest.mark.parametrize(("hidden", "inner"), [(16, 3), (208, 136)])
def test_gate_up_triton_matches_reference(
    dtype: torch.dtype, num_rows_E: list[int], hidden: int, inner: int, triton_device: str
) -> None:
    case = Case(num_rows_E, hidden, 2 * inner, dtype, triton_device)
    scales = case.scale_arguments(3)
    expected = gate_up_reference(case.x, case.weight, case.schedule, **scales)
    out_AF = gate_up_triton(case.x, case.weight, case.schedule, **scales)
    assert_close(out_AF[: len(expected)], expected, dtype)


@each_dtype
@pytest.mark.parametrize("num_rows_E", [[1], [3, 0, 20, 16], [0, 0, 1]], ids=str)
@pytest.mark.parametrize(("inner", "hidden"), [(16, 3), (208, 136)])
def test_down_triton_matches_reference(
    dtype: torch.dtype, num_rows_E: list[int], inner: int, hidden: int, triton_device: str
) -> None:
    case = Case(num_rows_E, inner, hidden, dtype, triton_device)
    out_dtype = torch.bfloat16 if dtype == FP8 else dtype
    arguments = (case.x, case.weight, case.gate_weight, case.schedule, out_dtype)
    scales = case.scale_arguments(2)
    expected = down_reference(*arguments, **scales)[case.is_present]
    y_AD = down_triton(*arguments, **scales)[case.is_present]
    assert_close(y_AD, expected, out_dtype)


@each_dtype
@pytest.mark.parametrize("block_rows", [32, 64, 128])
def test_large_tiles_match_reference(
    dtype: torch.dtype, block_rows: int, triton_device: str
) -> None:
    case = Case([block_rows + 5, 2], 144, 2 * 136, dtype, triton_device, block_rows)
    scales = case.scale_arguments(3)
    expected = gate_up_reference(case.x, case.weight, case.schedule, **scales)
    out_AF = gate_up_triton(case.x, case.weight, case.schedule, **scales)
    assert_close(out_AF[: len(expected)], expected, dtype)


def test_gate_up_triton_writes_no_other_rows(triton_device: str) -> None:
    case = Case([5, 0, 17], 32, 2 * 24, torch.bfloat16, triton_device)
    clean_AF = gate_up_triton(case.x, case.weight, case.schedule)[:22].clone()
    case.x[4] = torch.nan  # a row's own trouble stays its own
    out_AF = gate_up_triton(case.x, case.weight, case.schedule)[:22]
    others = torch.arange(22, device=triton_device) != 4
    assert torch.equal(out_AF[others], clean_AF[others])


def test_fp8_results_saturate(triton_device: str) -> None:
    case = Case([2], 32, 2 * 16, FP8, triton_device)
    case.scales[2] = 1e-6
    out_AF = gate_up_triton(case.x, case.weight, case.schedule, **case.scale_arguments(3))[:2]
    assert out_AF.float().abs().max().item() == 448.0
    assert not out_AF.float().isnan().any()


def test_rows_that_do_not_fill_16_byte_steps_are_refused(triton_device: str) -> None:
    case = Case([1], 12, 6, torch.bfloat16, triton_device)
    with pytest.raises(ValueError, match="pad them to a multiple of 8"):
        gate_up_triton(case.x, case.weight, case.schedule)
