"""Rotary embedding: YaRN's check values, pairs, angles at far positions, the query scale."""

from __future__ import annotations

import pytest
import torch

from ostro.kernels.rotary import (
    inverse_frequencies,
    llama4_query_scale,
    rotary,
    rotary_reference,
    rotations,
    yarn_inverse_frequencies,
)


def yarn_of_mistral_small_4() -> torch.Tensor:
    return yarn_inverse_frequencies(
        64, 10000.0, factor=128.0, original_max_positions=8192, beta_fast=32.0, beta_slow=1.0
    )


@pytest.mark.parametrize(
    ("pair", "expected"),
    [
        (0, 1.0),
        (12, 3.16228e-2),
        (18, 3.04827e-3),
        (24, 8.41346e-5),
        (25, 5.85855e-6),
        (31, 1.04181e-6),
    ],
)
def test_yarn_inverse_frequencies_of_mistral_small_4(pair: int, expected: float) -> None:
    assert yarn_of_mistral_small_4()[pair].item() == pytest.approx(expected, rel=5e-6)


def test_yarn_with_factor_one_is_plain_rotary() -> None:
    stretched = yarn_inverse_frequencies(
        16, 10000.0, factor=1.0, original_max_positions=4096, beta_fast=32.0, beta_slow=1.0
    )
    torch.testing.assert_close(stretched, inverse_frequencies(16, 10000.0))


def test_rotary_worked_example() -> None:
    turned = rotary(torch.tensor([[[1.0, 0.0]]]), torch.tensor([[1j]], dtype=torch.complex64))
    torch.testing.assert_close(turned, torch.tensor([[[0.0, 1.0]]]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("offset", [0, 1, 3, 4])
def test_rotary_matches_reference_on_slices(dtype: torch.dtype, offset: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x_THP = torch.randn(5, 3, 8 + offset, generator=generator).to(dtype)[..., offset:]
    turn_TJ = rotations(torch.arange(100, 105), inverse_frequencies(8, 10000.0))
    out_THP = rotary(x_THP, turn_TJ)
    assert out_THP.dtype == dtype
    torch.testing.assert_close(out_THP, rotary_reference(x_THP, turn_TJ))


def test_rotary_keeps_scores_dependent_on_distance_only() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 1, 64, generator=generator)
    inv_freq_J = yarn_of_mistral_small_4()

    def score(q_position: int, k_position: int) -> float:
        turned_q = rotary(q, rotations(torch.tensor([q_position]), inv_freq_J))
        turned_k = rotary(k, rotations(torch.tensor([k_position]), inv_freq_J))
        return float((turned_q * turned_k).sum())

    assert score(40, 10) == pytest.approx(score(1030, 1000), abs=1e-3)


def test_rotations_multiply_by_the_factor() -> None:
    turn_TJ = rotations(torch.tensor([7]), torch.tensor([0.5]), 2.0)
    assert turn_TJ.abs().item() == pytest.approx(2.0)
    assert turn_TJ.angle().item() == pytest.approx(3.5 - 2 * torch.pi)


@pytest.mark.parametrize(
    ("position", "expected"),
    [(0, 1.0), (8191, 1.0), (8192, 1.0693147), (65536, 1.2197225), (262143, 1.3465736)],
)
def test_llama4_query_scale(position: int, expected: float) -> None:
    scale_T = llama4_query_scale(torch.tensor([position]), 0.1, 8192)
    assert scale_T.item() == pytest.approx(expected, rel=1e-6)
