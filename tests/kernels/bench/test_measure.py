"""Floors, errors and lines of the benchmark; on a GPU one case, measured."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from ostro.kernels.bench import report, small_cases
from ostro.kernels.bench.ceilings import NoGpuError, sum_blocks
from ostro.kernels.bench.measure import (
    Case,
    Ceilings,
    largest_error,
    num_variants,
    relative_error,
)
from ostro.kernels.bench.prefill_cases import checked_rows, num_pairs
from ostro.kernels.bench.run import Result, run_case
from ostro.kernels.bench.sizes import Sizes

CEILINGS = Ceilings(copy_bytes_s=2e12, read_bytes_s=3e12, flops_s={"bf16": 8e14, "fp8": 1.5e15})


def make_case(bytes_moved: float, flops: float) -> Case:
    return Case(
        operation="product",
        size="B=1",
        launches=[],
        bytes_moved=bytes_moved,
        flops=flops,
        error=lambda: 0.0,
        tolerance=0.0,
    )


@pytest.mark.parametrize(
    ("bytes_moved", "flops", "expected_us"),
    [(3e9, 0.0, 1000.0), (3e6, 8e11, 1000.0), (3e9, 16e11, 2000.0)],
)
def test_floor_is_the_later_of_memory_and_products(
    bytes_moved: float, flops: float, expected_us: float
) -> None:
    assert CEILINGS.floor_us(make_case(bytes_moved, flops)) == pytest.approx(expected_us)


def test_errors_are_relative_and_nan_passes_nothing() -> None:
    assert relative_error(torch.tensor([3.0, 5.0]), torch.tensor([3.0, 4.0])) == pytest.approx(0.2)
    assert math.isnan(relative_error(torch.tensor([math.nan]), torch.tensor([1.0])))
    assert math.isnan(largest_error([0.0, math.nan]))
    assert math.isnan(largest_error([math.nan, 0.0]))


def test_variants_pass_the_cache_together() -> None:
    assert num_variants(1.0) == 64
    assert num_variants(16 << 20) == 8
    assert num_variants(1 << 30) == 2


def test_pairs_of_a_chunk() -> None:
    assert num_pairs(2, 3) == 9
    assert num_pairs(8192, 0) == 8192 * 8193 // 2


def test_checked_rows_are_within_the_chunk() -> None:
    for num_tokens in (1, 47, 48, 100, 8192):
        rows = checked_rows(num_tokens)
        assert rows[0].start == 0
        assert rows[-1].stop == num_tokens


def test_sum_of_blocks_reads_everything(triton_device: str) -> None:
    values = torch.ones(2 * 65_536, device=triton_device)
    assert sum_blocks(values).tolist() == [65_536.0, 65_536.0]


def test_a_result_fits_a_short_line() -> None:
    result = Result(
        operation="expert_mlp bf16",
        size="B=2048 skewed",
        us=12_345.6,
        floor_us=10_000.0,
        gigabytes_s=2345.0,
        teraflops=1234.0,
        error=1e-3,
        is_right=True,
        others_us={"torch": 12_345.6, "cudnn": math.nan},
        failure="",
    )
    assert len(result.line()) <= 130
    assert " 81% ok " in result.line()


def test_without_a_gpu_the_error_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(NoGpuError, match="CUDA device"):
        report.measure_kernels([], [], print)


def test_a_report_is_right_if_all_of_it_ran_and_agreed(tmp_path: Path) -> None:
    found = report.Report("some GPU", CEILINGS)
    assert found.is_right()
    found.failures["decode"] = "OutOfMemoryError"
    assert not found.is_right()
    found.write(tmp_path / "report.json")
    assert "some GPU" in (tmp_path / "report.json").read_text()


@pytest.mark.gpu
def test_a_case_is_measured_on_a_gpu() -> None:
    result = run_case(next(small_cases.cases(Sizes(), [64])), CEILINGS)
    assert result.failure == ""
    assert result.is_right
    assert result.us > 0
