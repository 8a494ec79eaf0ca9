"""Norms, rotary, the cache write and the queries' product in one launch."""

from __future__ import annotations

import pytest
import torch
from expert_cases import make_fp8_weight

from ostro.kernels.gpu.fp8_linear import MAX_FEW_INPUTS, MAX_FEW_ROWS
from ostro.kernels.gpu.query_projection import project_queries_triton, projects_queries
from ostro.kernels.latent_cache import FP8_ROWS, row_values, row_width
from ostro.kernels.mla_prologue import PrologueNorms, project_queries_reference
from ostro.kernels.rotary import rotations

QUERY, LATENT, ROPE, PAGE = 48, 12, 8, 4


def _rows(num_tokens: int, dtype: torch.dtype, device: str):
    """(queries, rows, norms, rotations, slots); the rows are parts of one product."""
    generator = torch.Generator().manual_seed(num_tokens)
    wide = torch.randn(num_tokens, QUERY + LATENT + ROPE, generator=generator).to(dtype).to(device)
    norms = torch.rand(QUERY + LATENT, generator=generator).to(dtype).to(device)
    turn_TJ = rotations(torch.arange(num_tokens) * 31 + 7, torch.logspace(0, -3, ROPE // 2))
    slots_T = torch.randperm(5 * PAGE, generator=generator)[:num_tokens]
    return (
        wide[:, :QUERY],
        wide[:, QUERY:],
        PrologueNorms(norms[:QUERY], norms[QUERY:], 1e-6),
        turn_TJ.to(device),
        slots_T.to(device),
    )


@pytest.mark.parametrize("num_tokens", [1, MAX_FEW_ROWS])
@pytest.mark.parametrize("outputs", [5, 1100])  # the latter are several blocks of each program
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("is_padding", [False, True], ids=["live", "padding"])
def test_project_queries_triton_matches_reference(
    num_tokens: int, outputs: int, dtype: torch.dtype, is_padding: bool, triton_device: str
) -> None:
    *rows, slots_T = _rows(num_tokens, dtype, triton_device)
    if is_padding:
        slots_T[-1] = -1
    weight = make_fp8_weight(outputs, QUERY, triton_device)
    shape = (5, PAGE, LATENT + ROPE)
    caches = [torch.full(shape, 7.0).to(dtype).to(triton_device) for _ in "ab"]
    found_TO = project_queries_triton(*rows, slots_T, caches[0], weight)
    expected_TO = project_queries_reference(*rows, slots_T, caches[1], weight)
    assert found_TO.dtype == dtype
    # A query beside the middle of two e4m3 values may round the other way.
    torch.testing.assert_close(found_TO, expected_TO, rtol=2e-2, atol=2e-2)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(caches[0], caches[1], rtol=tolerance, atol=tolerance)


def test_project_queries_triton_fills_fp8_rows(triton_device: str) -> None:
    *rows, slots_T = _rows(2, torch.bfloat16, triton_device)
    weight = make_fp8_weight(16, QUERY, triton_device)
    shape = (5, PAGE, row_width(LATENT, ROPE, FP8_ROWS))
    caches = [torch.full(shape, 0x30, dtype=FP8_ROWS, device=triton_device) for _ in "ab"]
    project_queries_triton(*rows, slots_T, caches[0], weight)
    project_queries_reference(*rows, slots_T, caches[1], weight)
    found, expected = (row_values(cache, LATENT, torch.float32) for cache in caches)
    torch.testing.assert_close(found, expected, rtol=2**-3, atol=2**-9)  # one ulp of e4m3


def test_only_few_rows_are_projected_so() -> None:
    assert projects_queries(torch.ones(MAX_FEW_ROWS, 32))
    assert not projects_queries(torch.ones(0, 32))
    assert not projects_queries(torch.ones(MAX_FEW_ROWS + 1, 32))
    assert not projects_queries(torch.ones(1, MAX_FEW_INPUTS + 1))
