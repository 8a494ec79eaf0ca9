"""The expert MLP by Triton, from routed rows to summed rows."""

from __future__ import annotations

import pytest
import torch
from expert_cases import make_fp8_experts, make_nvfp4_experts, make_routed, make_weights

from ostro.kernels.fp8_experts import expert_mlp_fp8_reference
from ostro.kernels.fp8_linear import Fp8Weight
from ostro.kernels.gpu.expert_mlp import (
    expert_mlp_fp8_triton,
    expert_mlp_nvfp4_triton,
    expert_mlp_triton,
)
from ostro.kernels.grouped_gemm import expert_mlp_reference, mlp

HIDDEN, INNER = 48, 80

each_size = pytest.mark.parametrize(
    ("num_rows", "num_experts", "absent"),
    [(0, 2, 0.0), (1, 6, 0.0), (1, 6, 1.0), (3, 1, 0.0), (40, 6, 0.6), (40, 2, 0.0)],
)


def _counts(num_experts: int, device: str) -> torch.Tensor:
    return torch.zeros(1 + num_experts, dtype=torch.int64, device=device)


@each_size
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_expert_mlp_triton_matches_reference(
    num_rows: int, num_experts: int, absent: float, dtype: torch.dtype, triton_device: str
) -> None:
    routed = make_routed(num_rows, num_experts, HIDDEN, absent, dtype)
    weights = make_weights(num_experts, HIDDEN, INNER, dtype)
    rows_RD, expert_RK, weight_RK = (tensor.to(triton_device) for tensor in routed)
    gate_up, down = (tensor.to(triton_device) for tensor in weights)
    counts = _counts(num_experts, triton_device)
    out_RD = expert_mlp_triton(rows_RD, expert_RK, weight_RK, gate_up, down, counts)
    assert out_RD.dtype == dtype
    expected_RD = expert_mlp_reference(
        rows_RD.float(), expert_RK, weight_RK, gate_up.float(), down.float()
    )
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(out_RD.float(), expected_RD, rtol=tolerance, atol=tolerance)
    found = torch.bincount(expert_RK.flatten() + 1, minlength=1 + num_experts)
    assert torch.equal(counts, found)


@each_size
def test_expert_mlp_fp8_triton_matches_reference(
    num_rows: int, num_experts: int, absent: float, triton_device: str
) -> None:
    routed = make_routed(num_rows, num_experts, HIDDEN, absent, torch.bfloat16)
    rows_RD, expert_RK, weight_RK = (tensor.to(triton_device) for tensor in routed)
    experts = make_fp8_experts(num_experts, HIDDEN, INNER, triton_device)
    counts = _counts(num_experts, triton_device)
    out_RD = expert_mlp_fp8_triton(rows_RD, expert_RK, weight_RK, experts, counts)
    expected_RD = expert_mlp_fp8_reference(rows_RD.float(), expert_RK, weight_RK, experts)
    # A hidden value beside the middle of two e4m3 values may round the other way: 1/16 of it.
    torch.testing.assert_close(out_RD.float(), expected_RD, rtol=2e-2, atol=3e-2)
    assert int(counts.sum()) == expert_RK.numel()


@each_size
def test_expert_mlp_nvfp4_triton_matches_reference(
    num_rows: int, num_experts: int, absent: float, triton_device: str
) -> None:
    routed = make_routed(num_rows, num_experts, HIDDEN, absent, torch.bfloat16)
    rows_RD, expert_RK, weight_RK = (tensor.to(triton_device) for tensor in routed)
    experts, gate_up, down = make_nvfp4_experts(num_experts, HIDDEN, INNER, triton_device)
    counts = _counts(num_experts, triton_device)
    out_RD = expert_mlp_nvfp4_triton(rows_RD, expert_RK, weight_RK, experts, counts)
    assert out_RD.dtype == torch.bfloat16
    expected_RD = expert_mlp_reference(rows_RD.float(), expert_RK, weight_RK, gate_up, down)
    torch.testing.assert_close(out_RD.float(), expected_RD, rtol=2e-2, atol=2e-2)
    found = torch.bincount(expert_RK.flatten() + 1, minlength=1 + num_experts)
    assert torch.equal(counts, found)


def test_expert_mlp_nvfp4_triton_takes_float32_rows(triton_device: str) -> None:
    routed = make_routed(3, 4, HIDDEN, 0.0, torch.float32)
    rows_RD, expert_RK, weight_RK = (tensor.to(triton_device) for tensor in routed)
    experts, gate_up, down = make_nvfp4_experts(4, HIDDEN, INNER, triton_device)
    out_RD = expert_mlp_nvfp4_triton(
        rows_RD, expert_RK, weight_RK, experts, _counts(4, triton_device)
    )
    assert out_RD.dtype == torch.float32
    expected_RD = expert_mlp_reference(rows_RD, expert_RK, weight_RK, gate_up, down)
    torch.testing.assert_close(out_RD, expected_RD, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("num_rows", [1, 7, 40])
def test_a_shared_expert_behind_the_routed_ones_adds_its_mlp(
    num_rows: int, triton_device: str
) -> None:
    rows_RD, expert_RK, weight_RK = make_routed(num_rows, 6, HIDDEN, 0.3, torch.bfloat16)
    always = torch.full((num_rows, 1), 6), torch.ones(num_rows, 1)
    routed = torch.cat((expert_RK, always[0]), 1), torch.cat((weight_RK, always[1]), 1)
    experts = make_fp8_experts(7, HIDDEN, INNER, triton_device)
    counts = _counts(7, triton_device)
    out_RD = expert_mlp_fp8_triton(
        rows_RD.to(triton_device), *(each.to(triton_device) for each in routed), experts, counts
    )
    experts = make_fp8_experts(7, HIDDEN, INNER)
    expected_RD = expert_mlp_fp8_reference(rows_RD.float(), expert_RK, weight_RK, experts)
    gate_up = Fp8Weight(
        values_OI=experts.gate_up_EHD[6],
        scale=experts.gate_up_scale_E[6],
        input_scale=experts.gate_up_input_scale_E[6],
    )
    down = Fp8Weight(
        values_OI=experts.down_EDF[6],
        scale=experts.down_scale_E[6],
        input_scale=experts.down_input_scale_E[6],
    )
    expected_RD += mlp(rows_RD.float(), gate_up, down)
    torch.testing.assert_close(out_RD.float().cpu(), expected_RD, rtol=2e-2, atol=3e-2)
    assert int(counts[7]) == num_rows


def test_expert_mlp_triton_gives_a_row_the_same_result_alone(triton_device: str) -> None:
    routed = make_routed(9, 4, HIDDEN, 0.3, torch.bfloat16)
    rows_RD, expert_RK, weight_RK = (tensor.to(triton_device) for tensor in routed)
    gate_up, down = (
        tensor.to(triton_device) for tensor in make_weights(4, HIDDEN, INNER, torch.bfloat16)
    )
    together_RD = expert_mlp_triton(
        rows_RD, expert_RK, weight_RK, gate_up, down, _counts(4, triton_device)
    )
    order = [3, 1, 0, 2]  # of the row's experts
    alone_RD = expert_mlp_triton(
        rows_RD[5:6],
        expert_RK[5:6, order],
        weight_RK[5:6, order],
        gate_up,
        down,
        _counts(4, triton_device),
    )
    assert torch.equal(alone_RD, together_RD[5:6])


@pytest.mark.parametrize("num_rows", [3, 40])  # few pairs and sorted ones
def test_a_broken_row_shows_in_fp8_and_stays_its_own(num_rows: int, triton_device: str) -> None:
    routed = make_routed(num_rows, 6, HIDDEN, 0.0, torch.bfloat16)
    rows_RD, expert_RK, weight_RK = (tensor.to(triton_device) for tensor in routed)
    experts = make_fp8_experts(6, HIDDEN, INNER, triton_device)
    clean_RD, broken_RD = (
        expert_mlp_fp8_triton(rows, expert_RK, weight_RK, experts, _counts(6, triton_device))
        for rows in (rows_RD, rows_RD.index_fill(0, expert_RK.new_tensor([1]), torch.nan))
    )
    assert broken_RD[1].isnan().all()
    others = torch.arange(num_rows, device=triton_device) != 1
    assert torch.equal(broken_RD[others], clean_RD[others])
