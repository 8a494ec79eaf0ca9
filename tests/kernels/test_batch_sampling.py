"""Sampling of whole batches: tables, the draw, adjusted logits, the best tokens."""

from __future__ import annotations

import math

import pytest
import torch

from ostro.kernels.batch_sampling import (
    Draws,
    adjust,
    best_tokens,
    log_normalizer,
    sample_rows,
)
from ostro.kernels.sampling import Draw

NEVER = -torch.inf
CPU = torch.device("cpu")


def test_draws_know_what_no_row_asks_for() -> None:
    cold, plain = Draw(0.0, temperature=0.0, top_k=5, top_p=0.5), Draw(0.5)
    assert Draws.of([cold], CPU).is_greedy
    assert not Draws.of([cold, plain], CPU).is_greedy
    assert not Draws.of([cold, plain], CPU).is_filtered
    assert Draws.of([cold, plain, Draw(0.5, top_k=5)], CPU).is_filtered
    assert Draws.of([Draw(0.5, top_p=0.5)], CPU).is_filtered
    assert Draws.of([], CPU).settings_B5.shape == (0, 5)


def test_draws_hold_settings_by_row() -> None:
    draw = Draw(uniform=1 / 3, temperature=0.7, top_k=9, top_p=0.9, min_p=0.1)
    assert Draws.of([draw], CPU).settings_B5.tolist() == [[0.7, 9.0, 0.9, 0.1, 1 / 3]]


def test_sample_rows_worked_example() -> None:
    logits_BV = torch.tensor([[0.0, NEVER, 0.0]] * 3)
    draws = Draws.of([Draw(0.9, temperature=0.0), Draw(0.4), Draw(0.6)], CPU)
    assert sample_rows(logits_BV, draws).tolist() == [0, 0, 2]
    only_two = torch.full((3, 1), 4, dtype=torch.int32)
    assert sample_rows(logits_BV, draws, only_two).tolist() == [2, 2, 2]


def test_adjust_worked_example() -> None:
    logits_BV = torch.tensor([[2.0, -2.0, 1.0]])
    found_BV = adjust(
        logits_BV,
        torch.tensor([0, 1, 1]),
        torch.tensor([2.0, 2.0, 2.0]),
        torch.tensor([1, 2]),
        torch.tensor([1.0, NEVER]),
    )
    assert found_BV.tolist() == [[1.0, -3.0, NEVER]]
    assert logits_BV.tolist() == [[2.0, -2.0, 1.0]]


def test_log_normalizer_worked_example() -> None:
    assert log_normalizer(torch.zeros(1, 2)).tolist() == [pytest.approx(math.log(2.0))]


def test_best_tokens_are_the_lowest_of_equals() -> None:
    assert best_tokens(torch.tensor([[0.0, 2.0, 1.0, 2.0]]), 3).tolist() == [[1, 3, 2]]
    assert best_tokens(torch.zeros(2, 300), 4).tolist() == [[0, 1, 2, 3]] * 2


def test_best_tokens_are_ordered_as_floats_are() -> None:
    logits_AV = torch.tensor([[NEVER, -3.0, -0.0, -2.0, 1e30, 0.0, -1e-40]])
    assert best_tokens(logits_AV, 9).tolist() == [[4, 2, 5, 6, 3, 1, 0]]
