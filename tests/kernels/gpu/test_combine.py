"""Combine by Triton: parts, residual and norm, one after the other and fused."""

from __future__ import annotations

import pytest
import torch

from ostro.kernels.combine import (
    PairRows,
    add_residual_reference,
    combine_norm_reference,
    combine_reference,
)
from ostro.kernels.gpu.combine import add_residual_triton, combine_norm_triton, combine_triton

each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
each_size = pytest.mark.parametrize(("num_tokens", "hidden"), [(0, 8), (1, 1), (3, 100), (2, 2500)])


def _rows(count: int, num_tokens: int, hidden: int, dtype: torch.dtype, device: str):
    generator = torch.Generator().manual_seed(hidden)
    return [
        torch.randn(num_tokens, hidden, generator=generator).to(dtype).to(device)
        for _ in range(count)
    ]


@each_size
@each_dtype
@pytest.mark.parametrize("num_parts", [1, 3])
def test_combine_triton_matches_reference(
    num_tokens: int, hidden: int, dtype: torch.dtype, num_parts: int, triton_device: str
) -> None:
    parts = _rows(num_parts, num_tokens, hidden, dtype, triton_device)
    out_TD = combine_triton(parts)
    every = torch.arange(num_tokens, device=triton_device)
    expected_TD = combine_reference([(part, every) for part in parts], num_tokens)
    assert out_TD.dtype == torch.float32
    assert torch.equal(out_TD, expected_TD)
    assert all(out_TD.data_ptr() != part.data_ptr() for part in parts if num_tokens)


@each_size
@each_dtype
def test_add_residual_triton_matches_reference(
    num_tokens: int, hidden: int, dtype: torch.dtype, triton_device: str
) -> None:
    (sum_TD,) = _rows(1, num_tokens, hidden, torch.float32, triton_device)
    shared_TD, residual_TD = _rows(2, num_tokens, hidden, dtype, triton_device)
    out_TD = add_residual_triton(sum_TD, shared_TD, residual_TD)
    assert out_TD.dtype == dtype
    assert torch.equal(out_TD, add_residual_reference(sum_TD, shared_TD, residual_TD))


@each_size
@each_dtype
def test_a_sum_that_has_the_shared_expert_needs_no_other(
    num_tokens: int, hidden: int, dtype: torch.dtype, triton_device: str
) -> None:
    sum_TD, residual_TD = _rows(2, num_tokens, hidden, dtype, triton_device)
    norm_D = torch.linspace(0.5, 2.0, hidden, device=triton_device).to(dtype)
    expected = combine_norm_reference((sum_TD,), None, residual_TD, norm_D, 1e-6)
    assert torch.equal(add_residual_triton(sum_TD, None, residual_TD), expected[0])
    out_TD, normed_TD = combine_norm_triton((sum_TD,), None, residual_TD, norm_D, 1e-6)
    assert torch.equal(out_TD, expected[0])
    torch.testing.assert_close(normed_TD, expected[1])


@each_size
@each_dtype
def test_combine_norm_triton_matches_reference(
    num_tokens: int, hidden: int, dtype: torch.dtype, triton_device: str
) -> None:
    *parts, shared_TD, residual_TD = _rows(4, num_tokens, hidden, dtype, triton_device)
    norm_D = torch.linspace(0.5, 2.0, hidden, device=triton_device).to(dtype)
    out_TD, normed_TD = combine_norm_triton(parts, shared_TD, residual_TD, norm_D, 1e-6)
    expected = combine_norm_reference(parts, shared_TD, residual_TD, norm_D, 1e-6)
    assert torch.equal(out_TD, expected[0])
    torch.testing.assert_close(normed_TD, expected[1])


def test_combine_norm_triton_takes_no_parts(triton_device: str) -> None:
    shared_TD, residual_TD = _rows(2, 3, 20, torch.bfloat16, triton_device)
    norm_D = torch.ones(20, dtype=torch.bfloat16, device=triton_device)
    out_TD, normed_TD = combine_norm_triton((), shared_TD, residual_TD, norm_D, 1e-6)
    expected = combine_norm_reference((), shared_TD, residual_TD, norm_D, 1e-6)
    assert torch.equal(out_TD, expected[0])
    torch.testing.assert_close(normed_TD, expected[1])


def test_combine_norm_triton_gives_the_bits_of_its_steps(triton_device: str) -> None:
    *parts, shared_TD, residual_TD = _rows(5, 4, 64, torch.bfloat16, triton_device)
    norm_D = torch.ones(64, dtype=torch.bfloat16, device=triton_device)
    out_TD, _ = combine_norm_triton(parts, shared_TD, residual_TD, norm_D, 1e-6)
    assert torch.equal(out_TD, add_residual_triton(combine_triton(parts), shared_TD, residual_TD))


def test_combine_triton_takes_strided_parts(triton_device: str) -> None:
    (wide,) = _rows(1, 4, 20, torch.bfloat16, triton_device)
    parts = [wide[:, :10], wide[:, 10:]]
    assert torch.equal(combine_triton(parts), wide[:, :10].float() + wide[:, 10:].float())


@each_size
@each_dtype
@pytest.mark.parametrize("num_chosen", [1, 5])
def test_rows_of_pairs_are_added_up_where_the_residual_is(
    num_tokens: int, hidden: int, dtype: torch.dtype, num_chosen: int, triton_device: str
) -> None:
    (rows_AD,) = _rows(1, num_tokens * num_chosen, hidden, dtype, triton_device)
    residual_TD, norm_1D = _rows(2, num_tokens, hidden, dtype, triton_device)
    norm_D = norm_1D[0] if num_tokens else rows_AD.new_ones(hidden)
    generator = torch.Generator().manual_seed(num_tokens)
    expert_TK = torch.rand(num_tokens, 9, generator=generator).argsort(dim=1)[:, :num_chosen] - 3
    expert_TK = expert_TK.clamp(min=-1).to(triton_device)
    rows_AD[expert_TK.flatten() < 0] = torch.nan  # not written
    pairs = PairRows(rows_AD, expert_TK)
    out_TD = add_residual_triton(pairs, None, residual_TD)
    assert torch.equal(out_TD, add_residual_reference(pairs, None, residual_TD))
    both = combine_norm_triton((pairs,), None, residual_TD, norm_D, 1e-6)
    expected = combine_norm_reference((pairs,), None, residual_TD, norm_D, 1e-6)
    assert torch.equal(both[0], expected[0])
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(both[1], expected[1], rtol=tolerance, atol=tolerance)
