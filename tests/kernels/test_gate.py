"""The gate: choice, ties, weights."""

from __future__ import annotations

import pytest
import torch

from ostro.kernels.gate import gate, gate_reference


def test_gate_worked_example() -> None:
    gate_ED = torch.tensor([[0.0], [2.0], [2.0], [1.0]])
    expert_TK, weight_TK = gate(torch.ones(1, 1), gate_ED, 2)
    assert expert_TK.tolist() == [[1, 2]]
    assert weight_TK.tolist() == [[0.5, 0.5]]
    expert_TK, weight_TK = gate(torch.ones(1, 1), gate_ED, 2, always=4)
    assert expert_TK.tolist() == [[1, 2, 4]]
    assert weight_TK.tolist() == [[0.5, 0.5, 1.0]]


@pytest.mark.parametrize("num_tokens", [0, 1, 8, 33, 200])
@pytest.mark.parametrize("always", [None, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gate_matches_reference(num_tokens: int, dtype: torch.dtype, always: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    x_TD = torch.randn(num_tokens, 24, generator=generator).to(dtype)
    gate_ED = torch.randn(128, 24, generator=generator)
    expert_TK, weight_TK = gate(x_TD, gate_ED, 4, 2.5, always=always)
    expected_expert_TK, expected_weight_TK = gate_reference(x_TD, gate_ED, 4, 2.5, always)
    assert expert_TK.dtype == torch.int64
    assert torch.equal(expert_TK, expected_expert_TK)
    torch.testing.assert_close(weight_TK, expected_weight_TK, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("num_tokens", [2, 100])
def test_gate_breaks_ties_by_lowest_expert(num_tokens: int) -> None:
    gate_ED = torch.zeros(128, 3)
    gate_ED[77] = 1.0
    expert_TK, _ = gate(torch.ones(num_tokens, 3), gate_ED, 4)
    assert expert_TK.tolist() == [[77, 0, 1, 2]] * num_tokens


def test_gate_sends_padding_nowhere() -> None:
    num_live = torch.tensor([1], dtype=torch.int32)
    expert_TK, weight_TK = gate(torch.ones(2, 3), torch.eye(3), 2, num_live=num_live)
    assert expert_TK.tolist() == [[0, 1], [-1, -1]]
    assert weight_TK.tolist() == [[0.5, 0.5], [0.0, 0.0]]
    expert_TK, weight_TK = gate(torch.ones(2, 3), torch.eye(3), 2, num_live=num_live, always=3)
    assert expert_TK.tolist() == [[0, 1, 3], [-1, -1, -1]]
    assert weight_TK.tolist() == [[0.5, 0.5, 1.0], [0.0, 0.0, 0.0]]
