"""The cutoff of sampling by Triton: what it keeps, against a sort."""

from __future__ import annotations

import pytest
import torch

from ostro.kernels.batch_sampling import Draws
from ostro.kernels.gpu.sampling_cutoff import (
    sampling_cutoff_reference,
    sampling_cutoff_triton,
    slice_size,
)
from ostro.kernels.sampling import Draw


def cutoffs(logits_BV: torch.Tensor, draws: list[Draw], device: str) -> tuple[torch.Tensor, ...]:
    """The weight at the cutoff of each row: by Triton, and by the reference."""
    logits_BV = logits_BV.to(device)
    settings_B5 = Draws.of(draws, torch.device(device)).settings_B5
    slices = logits_BV.split(slice_size(logits_BV.shape[1]), dim=1)
    largest_BS = torch.stack([part.amax(dim=1) for part in slices], dim=1)
    found_B = sampling_cutoff_triton(logits_BV, settings_B5, largest_BS)
    expected_B = sampling_cutoff_reference(logits_BV, settings_B5, largest_BS)
    assert found_B.dtype == expected_B.dtype == torch.int32
    return found_B.view(torch.float32).cpu(), expected_B.view(torch.float32).cpu()


def test_sampling_cutoff_triton_worked_example(triton_device: str) -> None:
    logits_BV = torch.tensor([[4.0, 2.0, 1.0, 1.0]] * 3).log()
    draws = [Draw(0.0, top_k=2), Draw(0.0, top_p=0.8), Draw(0.0, min_p=0.3)]
    for cutoff_B in cutoffs(logits_BV, draws, triton_device):
        torch.testing.assert_close(cutoff_B, torch.tensor([0.5, 0.25, 0.3]))


@pytest.mark.parametrize("vocabulary", [1, 30, 700, 5000])
@pytest.mark.parametrize("spread", [0.0, 0.01, 1.0, 4.0, 30.0])
def test_sampling_cutoff_triton_matches_a_sort(
    vocabulary: int, spread: float, triton_device: str
) -> None:
    kinds: list[dict[str, float]] = [
        {"top_k": 1},
        {"top_k": 2, "min_p": 0.01},
        {"top_k": 25},
        {"top_k": 600},
        {"top_k": 10**6},
        {"top_p": 0.1},
        {"top_p": 0.9},
        {"top_p": 1.0 - 2.0**-53},
        {"top_k": 40, "top_p": 0.9, "temperature": 0.6},
        {"top_k": 600, "top_p": 0.3, "temperature": 1.5},
    ]
    generator = torch.Generator().manual_seed(0)
    logits_BV = torch.randn(len(kinds), vocabulary, generator=generator) * spread
    found_B, expected_B = cutoffs(logits_BV, [Draw(0.0, **kind) for kind in kinds], triton_device)
    temperature_B1 = torch.tensor([[kind.get("temperature", 1.0)] for kind in kinds])
    scaled_BV = (logits_BV - logits_BV.amax(dim=1, keepdim=True)) / temperature_B1
    weight_BV = scaled_BV.double().exp()
    # Kernel and reference round weights differently, and what has no mass may be kept or not.
    kept, expected = (
        ((weight_BV >= cutoff_B[:, None] * (1 - 1e-5)) & (weight_BV > 2.0**-43)).sum(dim=1)
        for cutoff_B in (found_B, expected_B)
    )
    assert kept.tolist() == expected.tolist()


def test_sampling_cutoff_triton_of_top_p_counts_k_tokens_among_equals(triton_device: str) -> None:
    # Of ten equal tokens two are counted, so that half of the mass is one token's, not five's.
    logits_BV = torch.tensor([[2.0, 2.0] + [1.0] * 10]).log()
    found_B, expected_B = cutoffs(logits_BV, [Draw(0.0, top_k=4, top_p=0.6)], triton_device)
    assert found_B.item() == expected_B.item() == 1.0


def test_sampling_cutoff_triton_leaves_rows_that_do_not_ask(triton_device: str) -> None:
    draws = [Draw(0.0, min_p=0.5), Draw(0.0, temperature=0.0, top_k=3), Draw(0.0, top_k=1)]
    found_B, _ = cutoffs(torch.arange(12.0).view(3, 4), draws, triton_device)
    assert found_B.tolist() == [0.5, 0.0, 1.0]
