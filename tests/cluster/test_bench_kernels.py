"""`ostro bench kernels` without a GPU: what it refuses, and how its figures print."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from ostro.cluster.bench import app
from ostro.cluster.bench_command_kernels import results_table, trials_table
from ostro.kernels.bench.measure import Ceilings
from ostro.kernels.bench.report import Report
from ostro.kernels.bench.run import Result
from ostro.kernels.bench.trials import Trial

CEILINGS = Ceilings(copy_bytes_s=2.4e12, read_bytes_s=3e12, flops_s={"bf16": 8e14, "fp8": 1.5e15})


def make_result(**changes: Any) -> Result:
    fields: dict[str, Any] = {
        "operation": "gate_up fp8",
        "size": "B=32",
        "us": 476.9,
        "floor_us": 460.0,
        "gigabytes_s": 2904.0,
        "teraflops": 9.0,
        "error": 3.5e-3,
        "is_right": True,
        "others_us": {"torch": 492.0, "cudnn": math.nan},
        "failure": "",
    }
    return Result(**{**fields, **changes})


def printed(table: Any) -> str:
    console = Console(width=160)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def test_without_a_gpu_the_command_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = CliRunner().invoke(app, ["kernels"])
    assert result.exit_code == 1
    assert "error: this is measured on a CUDA device, and torch finds none" in result.stderr


@pytest.mark.parametrize("option", ["--json", "--tuned"])
@pytest.mark.parametrize("place", ["nowhere/told.json", "."])
def test_what_could_not_be_written_is_refused_before_anything_is_measured(
    option: str, place: str, tmp_path: Path
) -> None:
    result = CliRunner().invoke(app, ["kernels", "--sweep", "fp8", option, str(tmp_path / place)])
    assert result.exit_code == 2
    assert option in result.stderr


@pytest.mark.parametrize("option", ["--parts", "--sweep"])
def test_unknown_names_are_refused_with_those_that_are_known(option: str) -> None:
    result = CliRunner().invoke(app, ["kernels", option, "decode,attention"])
    assert result.exit_code == 2
    assert "'attention'" in result.stderr
    assert "prefill" in result.stderr


@pytest.mark.parametrize(("is_right", "exit_code"), [(True, 0), (False, 1)])
def test_a_wrong_kernel_fails_the_command(
    is_right: bool, exit_code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def measured(parts: list[str], sweeps: list[str], *_: Any, **__: Any) -> Report:
        asked.append((parts, sweeps))
        return Report("some GPU", CEILINGS, [make_result(is_right=is_right)])

    monkeypatch.setattr("ostro.kernels.bench.report.measure_kernels", measured)
    result = CliRunner().invoke(app, ["kernels", "--parts", "decode,small", "--sweep", ""])
    assert result.exit_code == exit_code, result.output
    assert asked == [(["decode", "small"], [])]
    assert "some GPU" in result.stdout


def test_results_print_with_what_ran_beside() -> None:
    failed = make_result(size="B=1", us=math.nan, failure="OutOfMemoryError: 80 GiB")
    text = printed(results_table(Report("some GPU", CEILINGS, [make_result(), failed])))
    assert "copy 2.40 TB/s, read 3.00 TB/s, bf16 800 TFLOP/s" in text
    assert "torch 492.0" in text
    assert "cudnn" not in text
    assert "96%" in text
    assert "OutOfMemoryError" in text


def test_sweeps_print_the_fastest() -> None:
    trials = [
        Trial(operation="attend", dtype="bfloat16", size="128 @ 0", cut={"num_warps": w}, us=us)
        for w, us in ((4, 20.0), (8, 10.0), (16, None))
    ]
    text = printed(trials_table(trials))
    assert text.index("num_warps 8") < text.index("num_warps 4")
    assert "num_warps 16" not in text
