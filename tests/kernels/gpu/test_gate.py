"""The gate by Triton: choice, ties, weights."""

from __future__ import annotations

import pytest
import torch

from ostro.kernels.gate import gate_reference, pack_gate
from ostro.kernels.gpu.gate import gate_triton


def test_gate_triton_worked_example(triton_device: str) -> None:
    gate_ED = torch.tensor([[0.0], [2.0], [2.0], [1.0]], device=triton_device)
    expert_TK, weight_TK = gate_triton(torch.ones(1, 1, device=triton_device), gate_ED, 2)
    assert expert_TK.tolist() == [[1, 2]]
    assert weight_TK.tolist() == [[0.5, 0.5]]


def test_gate_triton_appends_the_expert_that_every_token_goes_to(triton_device: str) -> None:
    gate_ED = torch.tensor([[0.0], [2.0], [2.0], [1.0]], device=triton_device)
    x_TD = torch.ones(1, 1, device=triton_device)
    expert_TK, weight_TK = gate_triton(x_TD, gate_ED, 2, always=4)
    assert expert_TK.tolist() == [[1, 2, 4]]
    assert weight_TK.tolist() == [[0.5, 0.5, 1.0]]


@pytest.mark.parametrize("num_tokens", [0, 1, 7, 17, 33])
@pytest.mark.parametrize(("num_experts", "num_chosen"), [(128, 4), (5, 3), (1, 1)])
@pytest.mark.parametrize("hidden", [24, 600])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gate_triton_matches_reference(
    num_tokens: int,
    num_experts: int,
    num_chosen: int,
    hidden: int,
    dtype: torch.dtype,
    triton_device: str,
) -> None:
    x_TD = _rows(num_tokens, hidden, dtype, triton_device)
    gate_ED = _rows(num_experts, hidden, torch.float32, triton_device, seed=1)
    expert_TK, weight_TK = gate_triton(x_TD, gate_ED, num_chosen, 2.5)
    expected_expert_TK, expected_weight_TK = gate_reference(x_TD, gate_ED, num_chosen, 2.5)
    assert expert_TK.dtype == torch.int64
    assert torch.equal(expert_TK, expected_expert_TK)
    torch.testing.assert_close(weight_TK, expected_weight_TK, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("num_tokens", [0, 1, 20, 40])
@pytest.mark.parametrize("always", [None, 100])
def test_gate_triton_takes_a_narrow_matrix(
    num_tokens: int, always: int | None, triton_device: str
) -> None:
    x_TD = _rows(num_tokens, 300, torch.bfloat16, triton_device)
    gate_ED = _rows(100, 300, torch.bfloat16, triton_device, seed=1)
    expert_TK, weight_TK = gate_triton(x_TD, gate_ED, 4, 2.5, None, always)
    expected_expert_TK, expected_weight_TK = gate_reference(x_TD, gate_ED, 4, 2.5, always)
    assert torch.equal(expert_TK, expected_expert_TK)
    torch.testing.assert_close(weight_TK, expected_weight_TK, rtol=1e-4, atol=1e-5)


def test_gate_triton_gives_a_token_the_same_bits_among_a_few_others(triton_device: str) -> None:
    x_TD = _rows(32, 600, torch.bfloat16, triton_device)
    gate_ED = _rows(24, 600, torch.bfloat16, triton_device, seed=1)
    _, together_TK = gate_triton(x_TD, gate_ED, 3)
    for token in (0, 5, 31):
        _, alone_1K = gate_triton(x_TD[token : token + 1], gate_ED, 3)
        assert torch.equal(alone_1K[0], together_TK[token])


@pytest.mark.gpu
def test_a_gate_that_is_exact_in_bfloat16_stays_so_on_a_gpu() -> None:
    gate_ED = torch.randn(8, 32, dtype=torch.bfloat16, device="cuda").float()
    assert pack_gate(gate_ED, torch.bfloat16).dtype == torch.bfloat16
    finer_ED = gate_ED * (1.0 + 2.0**-12)
    assert pack_gate(finer_ED, torch.bfloat16) is finer_ED


def _rows(count: int, width: int, dtype: torch.dtype, device: str, seed: int = 0) -> torch.Tensor:
    """Random rows in front of memory that must not be read."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, width, generator=generator).to(dtype).to(device)
    return torch.cat((rows, rows.new_full((40, width), torch.nan)))[:count]


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
    expert_TK, weight_TK = gate_triton(x_TD, gate_ED, 2, 1.0, num_live, 3)
    assert expert_TK.tolist() == [[0, 1, 3]] * 2 + [[-1, -1, -1]] * 4
    assert weight_TK.tolist() == [[0.5, 0.5, 1.0]] * 2 + [[0.0, 0.0, 0.0]] * 4
