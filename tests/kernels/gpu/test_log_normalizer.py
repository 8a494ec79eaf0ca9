"""The normaliser of log probabilities by Triton."""

from __future__ import annotations

import math

import pytest
import torch

from ostro.kernels.batch_sampling import log_normalizer_reference
from ostro.kernels.gpu.log_normalizer import log_normalizer_triton


def test_log_normalizer_triton_worked_example(triton_device: str) -> None:
    found_A = log_normalizer_triton(torch.zeros(1, 2, device=triton_device))
    assert found_A.tolist() == [pytest.approx(math.log(2.0))]


@pytest.mark.parametrize("num_rows", [0, 1, 3])
@pytest.mark.parametrize("vocabulary", [1, 257, 9000])
def test_log_normalizer_triton_matches_reference(
    num_rows: int, vocabulary: int, triton_device: str
) -> None:
    generator = torch.Generator().manual_seed(0)
    logits_AV = torch.randn(num_rows, vocabulary, generator=generator) * 5 + 100
    logits_AV[:, 1::3] = -torch.inf
    logits_AV = logits_AV.to(triton_device)
    found_A = log_normalizer_triton(logits_AV)
    torch.testing.assert_close(found_A, log_normalizer_reference(logits_AV))
    alone = [log_normalizer_triton(logits_AV[a : a + 1]) for a in range(num_rows)]
    assert torch.equal(found_A, torch.cat([found_A[:0], *alone]))
