"""The gate by Triton: choice, ties, weights."""

from __future__ import annotations

import pytest
import torch

from ostro.kernels.gate import gate_reference
from ostro.kernels.gpu.gate import gate_triton


def test_gate_triton_worked_example(triton_device: str) -> None:
    gate_ED = torch.tensor([[0.0], [2.0], [2.0], [1.0]], device=triton_device)
    expert_TK, weight_TK = gate_triton(torch.ones(1, 1, device=triton_device), gate_ED, 2)
    assert expert_TK.tolist() == [[1, 2]]
    assert weight_TK.tolist() == [[0.5, 0.5]]


@pytest.mark.parametrize("num_tokens", [0, 1, 7])
@pytest.mark.parametrize(("num_experts", "num_chosen"), [(128, 4), (5, 3), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gate_triton_matches_reference(
    num_tokens: int, num_experts: int, num_chosen: int, dtype: torch.dtype, triton_device: str
) -> None:
    generator = torch.Generator().manual_seed(0)
    x_TD = torch.randn(num_tokens, 24, generator=generator).to(dtype).to(triton_device)
    gate_ED = torch.randn(num_experts, 24, generator=generator).to(triton_device)
    expert_TK, weight_TK = gate_triton(x_TD, gate_ED, num_chosen, 2.5)
    expected_expert_TK, expected_weight_TK = gate_reference(x_TD, gate_ED, num_chosen, 2.5)
    assert expert_TK.dtype == torch.int64
    assert torch.equal(expert_TK, expected_expert_TK)
    torch.testing.assert_close(weight_TK, expected_weight_TK, rtol=1e-5, atol=1e-6)


def test_gate_triton_breaks_ties_by_lowest_expert(triton_device: str) -> None:
    gate_ED = torch.zeros(128, 3, device=triton_device)
    gate_ED[77], gate_ED[1] = 1.0, -0.0
    expert_TK, _ = gate_triton(torch.ones(5, 3, device=triton_device), gate_ED, 4)
    assert expert_TK.tolist() == [[77, 0, 1, 2]] * 5


def test_gate_triton_orders_negative_and_infinite_logits(triton_device: str) -> None:
    logits = [-torch.inf, -3.0, -1e-30, -2.0, 1e30, 1e-30]
    gate_ED = torch.tensor(logits, device=triton_device)[:, None]
    expert_TK, _ = gate_triton(torch.ones(1, 1, device=triton_device), gate_ED, 6)
    assert expert_TK.tolist() == [[4, 5, 2, 3, 1, 0]]


def test_gate_triton_sends_padding_nowhere(triton_device: str) -> None:
    x_TD, gate_ED = torch.ones(6, 3, device=triton_device), torch.eye(3, device=triton_device)
    num_live = torch.tensor([2], dtype=torch.int32, device=triton_device)
    expert_TK, weight_TK = gate_triton(x_TD, gate_ED, 2, 1.0, num_live)
    assert expert_TK.tolist() == [[0, 1]] * 2 + [[-1, -1]] * 4
    assert weight_TK.tolist() == [[0.5, 0.5]] * 2 + [[0.0, 0.0]] * 4
