"""The prologue of attention on CPU: what it returns and what it stores."""

from __future__ import annotations

import pytest
import torch

from ostro.kernels.fp8_linear import Fp8Weight
from ostro.kernels.mla_prologue import (
    PrologueNorms,
    mla_prologue,
    mla_prologue_reference,
    project_queries,
    project_queries_reference,
)
from ostro.kernels.rotary import rotations


def test_mla_prologue_worked_example() -> None:
    cache_NSW = torch.full((1, 2, 4), torch.nan)
    out_TL = mla_prologue(
        torch.tensor([[3.0, 4.0]]),
        torch.tensor([[2.0, 2.0, 1.0, 0.0]]),
        PrologueNorms(torch.ones(2), torch.tensor([1.0, 3.0]), 0.0),
        torch.tensor([[1j]]),
        torch.tensor([1]),
        cache_NSW,
    )
    torch.testing.assert_close(out_TL, torch.tensor([[0.848528, 1.131371]]))
    torch.testing.assert_close(cache_NSW[0, 1], torch.tensor([1.0, 3.0, 0.0, 1.0]))
    assert cache_NSW[0, 0].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_mla_prologue_matches_reference(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    query_TL, row_TW = (torch.randn(5, n, generator=generator).to(dtype) for n in (16, 48))
    norms = [torch.rand(n, generator=generator).to(dtype) for n in (16, 32)]
    turn_TJ = rotations(torch.arange(5), torch.logspace(0, -2, 8))
    slots_T = torch.tensor([3, 0, 5, 4, 1])
    caches = [torch.zeros(2, 3, 48, dtype=dtype) for _ in range(2)]
    arguments = (query_TL, row_TW, PrologueNorms(*norms, 1e-6), turn_TJ, slots_T)
    out_TL = mla_prologue(*arguments, caches[0])
    expected_TL = mla_prologue_reference(*arguments, caches[1])
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(out_TL, expected_TL, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(caches[0], caches[1], rtol=tolerance, atol=tolerance)


def test_project_queries_worked_example() -> None:
    inputs = (
        torch.tensor([[3.0, 4.0]]),
        torch.tensor([[2.0, 2.0, 1.0, 0.0]]),
        PrologueNorms(torch.ones(2), torch.ones(2), 0.0),
        torch.tensor([[1j]]),
        torch.tensor([1]),
        torch.zeros(1, 2, 4),
    )
    found_TO = project_queries(*inputs, torch.ones(1, 2))
    torch.testing.assert_close(found_TO, torch.tensor([[1.9799]]), rtol=1e-4, atol=1e-4)
    ones = Fp8Weight(
        values_OI=torch.ones(1, 2).to(torch.float8_e4m3fn),
        scale=torch.tensor(1.0),
        input_scale=torch.tensor(1.0),
    )
    found_TO = project_queries(*inputs, ones)
    assert found_TO.item() == 0.875 + 1.125  # as e4m3 has them
    assert torch.equal(found_TO, project_queries_reference(*inputs, ones))
