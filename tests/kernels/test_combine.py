"""Combine: dense and sparse parts add up, in rank order, in float32."""

from __future__ import annotations

import pytest
import torch

from ostro.kernels.combine import (
    PairRows,
    add_residual,
    add_residual_reference,
    combine,
    combine_norm,
    combine_norm_reference,
    combine_reference,
    combine_sparse,
    sum_pairs,
)


def test_combine_worked_example() -> None:
    first = torch.tensor([[1.0]])
    assert combine([first, torch.tensor([[2.0]])]).tolist() == [[3.0]]
    assert first.tolist() == [[1.0]]


def test_combine_sparse_worked_example() -> None:
    parts = [
        (torch.tensor([[5.0]]), torch.tensor([1])),
        (torch.tensor([[1.0], [2.0]]), torch.tensor([0, 1])),
    ]
    assert combine_sparse(parts, 2).tolist() == [[1.0], [7.0]]


@pytest.mark.parametrize("num_tokens", [1, 5])
@pytest.mark.parametrize("num_shards", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_combine_and_sparse_match_reference(
    num_tokens: int, num_shards: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    every = torch.arange(num_tokens)
    dense = [
        (torch.randn(num_tokens, 7, generator=generator).to(dtype), every)
        for _ in range(num_shards)
    ]
    expected_TD = combine_reference(dense, num_tokens)
    assert expected_TD.dtype == torch.float32
    assert torch.equal(combine([rows for rows, _ in dense]), expected_TD)
    assert torch.equal(combine_sparse(dense, num_tokens), expected_TD)
    some = [
        (rows[: num_tokens - i % 2], every[: num_tokens - i % 2])
        for i, (rows, _) in enumerate(dense)
    ]
    assert torch.equal(combine_sparse(some, num_tokens), combine_reference(some, num_tokens))


def test_combine_adds_in_float32() -> None:
    parts = [torch.full((1, 1), value).bfloat16() for value in (256.0, 1.0, 1.0)]
    assert combine(parts).item() == 258.0


def test_combine_sparse_leaves_unanswered_tokens_zero() -> None:
    none = (torch.empty(0, 2), torch.empty(0, dtype=torch.int64))
    assert combine_sparse([none], 3).tolist() == [[0.0, 0.0]] * 3


def test_combine_norm_worked_example() -> None:
    part, shared, residual = ([[1.0, 0.0]], [[2.0, 0.0]], [[0.0, 4.0]])
    out_TD, normed_TD = combine_norm(
        [torch.tensor(part)],
        torch.tensor(shared),
        torch.tensor(residual),
        torch.tensor([1.0, 2.0]),
        0.0,
    )
    assert out_TD.tolist() == [[3.0, 4.0]]
    torch.testing.assert_close(normed_TD, torch.tensor([[0.848528, 2.262742]]))


@pytest.mark.parametrize("hidden", [7, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_combine_norm_and_add_residual_match_reference(hidden: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    first, second, shared, residual = (
        torch.randn(3, hidden, generator=generator).to(dtype) for _ in range(4)
    )
    norm_D = torch.rand(hidden, generator=generator).to(dtype)
    sum_TD = combine([first, second])
    expected_TD = add_residual_reference(sum_TD, shared, residual)
    assert torch.equal(add_residual(sum_TD, shared, residual), expected_TD)
    out_TD, normed_TD = combine_norm([first, second], shared, residual, norm_D, 1e-6)
    expected = combine_norm_reference([first, second], shared, residual, norm_D, 1e-6)
    assert torch.equal(out_TD, expected[0])
    torch.testing.assert_close(normed_TD, expected[1])


@pytest.mark.parametrize("num_parts", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_sum_that_has_the_shared_expert_needs_no_other(
    num_parts: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(2)
    rows = [torch.randn(3, 32, generator=generator) for _ in range(num_parts + 1)]
    *parts, residual = rows
    residual, norm_D = residual.to(dtype), torch.ones(32, dtype=dtype)
    expected = combine_norm_reference(parts, None, residual, norm_D, 1e-6)
    if num_parts == 1:
        assert torch.equal(add_residual(parts[0].clone(), None, residual), expected[0])
    out = combine_norm(parts, None, residual, norm_D, 1e-6)
    for one, other in zip(out, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("num_parts", [0, 1, 2])
def test_combine_norm_takes_any_number_of_parts(num_parts: int) -> None:
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randn(3, 32, generator=generator) for _ in range(num_parts + 2)]
    *parts, shared, residual = rows
    norm_D = torch.ones(32)
    expected = combine_norm_reference(parts, shared, residual, norm_D, 1e-6)
    out = combine_norm(parts, shared, residual, norm_D, 1e-6)
    for one, other in zip(out, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_rows_of_pairs_are_added_up_on_the_way() -> None:
    rows_AD = torch.tensor([[1.0], [2.0], [torch.nan], [4.0]])
    pairs = PairRows(rows_AD, torch.tensor([[3, 0], [-1, 1]]))
    ones_T1, norm_1 = torch.ones(2, 1), torch.ones(1)
    assert add_residual(pairs, None, ones_T1).tolist() == [[4.0], [5.0]]
    out_T1, normed_T1 = combine_norm((pairs,), None, ones_T1, norm_1, 0.0)
    assert out_T1.tolist() == [[4.0], [5.0]]
    assert normed_T1.tolist() == [[1.0], [1.0]]


def test_sum_pairs_worked_example() -> None:
    rows_AD = torch.tensor([[1.0], [2.0], [torch.nan], [4.0]])
    pairs = PairRows(rows_AD, torch.tensor([[3, 0], [-1, 1]]))
    assert sum_pairs(pairs).tolist() == [[3.0], [4.0]]
