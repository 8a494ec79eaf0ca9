"""Grouped products of few pairs by Triton: worked values, odd sizes, the bits of sorted rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from expert_cases import make_fp8_experts, make_routed, make_weights

from ostro.kernels.gpu import few_experts
from ostro.kernels.gpu.expert_schedule import expert_schedule_triton
from ostro.kernels.gpu.few_experts import (
    MAX_FEW_PAIRS,
    down_few_reference,
    down_few_triton,
    gate_up_few_reference,
    gate_up_few_triton,
    takes_pairs,
)
from ostro.kernels.gpu.grouped_gemm import down_triton, gate_up_triton
from ostro.kernels.gpu.permute import permute_triton

each_size = pytest.mark.parametrize(
    ("num_rows", "num_experts", "hidden", "inner", "absent"),
    [
        (1, 6, 48, 16, 0.0),
        (1, 6, 48, 16, 1.0),  # no expert at all
        (2, 5, 144, 16, 0.5),
        (3, 9, 16, 80, 0.3),
        (4, 4, 48, 48, 0.0),  # every expert has every row
    ],
)


def _randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def _counts(num_experts: int, device: str) -> torch.Tensor:
    return torch.full((1 + num_experts,), 7, dtype=torch.int64, device=device)


def _fp8_case(
    num_experts: int, hidden: int, inner: int, device: str
) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any], dict[str, Any]]:
    """Both stacks and the scales of either."""
    e = make_fp8_experts(num_experts, hidden, inner, device)
    of_gate_up = {
        "scale_E": e.gate_up_scale_E,
        "input_scale_E": e.gate_up_input_scale_E,
        "next_input_scale_E": e.down_input_scale_E,
    }
    of_down = {"scale_E": e.down_scale_E, "input_scale_E": e.down_input_scale_E}
    return e.gate_up_EHD, e.down_EDF, of_gate_up, of_down


def test_gate_up_few_triton_worked_example(triton_device: str) -> None:
    gate_up_EHD = torch.zeros(1, 8, 4, device=triton_device)
    gate_up_EHD[0, :, 0] = torch.tensor([1.0] * 4 + [2.0] * 4)
    rows_RD = torch.tensor([[1.0, 0.0, 0.0, 0.0]], device=triton_device)
    expert_RK = torch.zeros(1, 1, dtype=torch.int64, device=triton_device)
    out_AF = gate_up_few_triton(rows_RD, expert_RK, gate_up_EHD, _counts(1, triton_device))
    assert out_AF.tolist() == [[pytest.approx(1.4621, abs=1e-4)] * 4]


def test_down_few_triton_worked_example(triton_device: str) -> None:
    hidden_AF = torch.tensor([[2.0, 0.0, 0.0, 0.0]], device=triton_device)
    expert_RK = torch.zeros(1, 1, dtype=torch.int64, device=triton_device)
    weight_RK = torch.full((1, 1), 0.5, device=triton_device)
    down_EDF = torch.full((1, 3, 4), 3.0, device=triton_device)
    out_AD = down_few_triton(hidden_AF, expert_RK, weight_RK, down_EDF, torch.float32)
    assert out_AD.tolist() == [[3.0] * 3]


@each_size
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_few_experts_triton_match_reference(
    num_rows: int,
    num_experts: int,
    hidden: int,
    inner: int,
    absent: float,
    dtype: torch.dtype,
    triton_device: str,
) -> None:
    routed = make_routed(num_rows, num_experts, hidden, absent, dtype)
    rows_RD, expert_RK, weight_RK = (tensor.to(triton_device) for tensor in routed)
    gate_up, down = (
        each.to(triton_device) for each in make_weights(num_experts, hidden, inner, dtype)
    )
    counts = [_counts(num_experts, triton_device) for _ in "ab"]
    found_AF = gate_up_few_triton(rows_RD, expert_RK, gate_up, counts[0])
    expected_AF = gate_up_few_reference(rows_RD, expert_RK, gate_up, counts[1])
    is_here_A = expert_RK.flatten() >= 0
    tolerance = 1e-4 if dtype == torch.float32 else 1e-2
    close = {"rtol": tolerance, "atol": tolerance}
    torch.testing.assert_close(found_AF[is_here_A], expected_AF[is_here_A], **close)
    assert torch.equal(*counts)
    found_AF[~is_here_A] = torch.nan  # not written
    found_AD = down_few_triton(found_AF, expert_RK, weight_RK, down, dtype)
    expected_AD = down_few_reference(found_AF, expert_RK, weight_RK, down, dtype)
    torch.testing.assert_close(found_AD[is_here_A], expected_AD[is_here_A], **close)


@each_size
def test_few_experts_triton_match_reference_in_fp8(
    num_rows: int, num_experts: int, hidden: int, inner: int, absent: float, triton_device: str
) -> None:
    routed = make_routed(num_rows, num_experts, hidden, absent, torch.bfloat16)
    rows_RD, expert_RK, weight_RK = (tensor.to(triton_device) for tensor in routed)
    gate_up, down, of_gate_up, of_down = _fp8_case(num_experts, hidden, inner, triton_device)
    counts = [_counts(num_experts, triton_device) for _ in "ab"]
    found_AF = gate_up_few_triton(rows_RD, expert_RK, gate_up, counts[0], **of_gate_up)
    expected_AF = gate_up_few_reference(rows_RD, expert_RK, gate_up, counts[1], **of_gate_up)
    is_here_A = expert_RK.flatten() >= 0
    # Beside the middle of two e4m3 values one may round the other way: 1/8 of it.
    torch.testing.assert_close(
        found_AF[is_here_A].float(), expected_AF[is_here_A].float(), rtol=2**-3, atol=2**-9
    )
    found_AF.view(torch.uint8)[~is_here_A] = 0x7F  # NaN
    found_AD, expected_AD = (
        run(found_AF, expert_RK, weight_RK, down, torch.bfloat16, **of_down)
        for run in (down_few_triton, down_few_reference)
    )
    torch.testing.assert_close(found_AD[is_here_A], expected_AD[is_here_A], rtol=1e-2, atol=1e-2)


def test_few_experts_triton_give_the_bits_of_sorted_rows(triton_device: str) -> None:
    num_experts, hidden, inner = 5, 144, 80
    routed = make_routed(4, num_experts, hidden, 0.4, torch.bfloat16)
    rows_RD, expert_RK, weight_RK = (tensor.to(triton_device) for tensor in routed)
    gate_up, down, of_gate_up, of_down = _fp8_case(num_experts, hidden, inner, triton_device)
    counts = [_counts(num_experts, triton_device) for _ in "ab"]
    few_AF = gate_up_few_triton(rows_RD, expert_RK, gate_up, counts[0], **of_gate_up)
    schedule = expert_schedule_triton(expert_RK, num_experts, MAX_FEW_PAIRS, counts[1])
    x_AD = permute_triton(rows_RD, expert_RK, schedule, of_gate_up["input_scale_E"])
    sorted_AF = gate_up_triton(x_AD, gate_up, schedule, **of_gate_up)
    order_A = schedule.order_A[: int(schedule.offsets_E1[-1])].long()
    assert torch.equal(few_AF[order_A].float(), sorted_AF[: len(order_A)].float())
    assert torch.equal(*counts)
    few_AD = down_few_triton(few_AF, expert_RK, weight_RK, down, torch.bfloat16, **of_down)
    sorted_AD = down_triton(sorted_AF, down, weight_RK, schedule, torch.bfloat16, **of_down)
    is_here_A = expert_RK.flatten() >= 0
    assert torch.equal(few_AD[is_here_A], sorted_AD[is_here_A])


@pytest.mark.parametrize(("version", "blackwell"), [("3.6.0", False), ("3.10.1", True)])
def test_few_pairs_go_the_usual_way_where_the_compiler_gives_up(
    monkeypatch: pytest.MonkeyPatch, version: str, blackwell: bool
) -> None:
    device = torch.device("meta")
    monkeypatch.setattr(few_experts.triton, "__version__", version)
    monkeypatch.setattr(few_experts, "architecture", lambda _: 90)
    assert takes_pairs(MAX_FEW_PAIRS, device)
    assert not takes_pairs(MAX_FEW_PAIRS + 1, device)
    monkeypatch.setattr(few_experts, "architecture", lambda _: 100)
    assert takes_pairs(1, device) == blackwell
