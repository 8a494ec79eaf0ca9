"""MLA of chunks: fused, blocked and absorbed forms agree with plain attention."""

from __future__ import annotations

import pytest
import torch
from fp8_rows import as_fp8_rows, rounded_rows

from ostro.kernels import mla_prefill as mla_prefill_module
from ostro.kernels.latent_heads import LatentHeads
from ostro.kernels.mla_prefill import absorbed_is_cheaper, mla_prefill, mla_prefill_reference

PAGE_SIZE = 4
HEADS, ROPE, LATENT = 3, 4, 8


def make_case(
    start: int, num_tokens: int, nope: int = 6, value: int = 5
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, LatentHeads]:
    """Queries, a cache full of NaN but for the context, its pages, the context, heads."""
    generator = torch.Generator().manual_seed(start + num_tokens)
    length = start + num_tokens
    num_pages = -(-length // PAGE_SIZE)
    pages_n = torch.randperm(num_pages + 1, generator=generator)[:num_pages]
    context_LW = torch.randn(length, LATENT + ROPE, generator=generator)
    cache_NSW = torch.full((num_pages + 1, PAGE_SIZE, LATENT + ROPE), torch.nan)
    positions = torch.arange(length)
    cache_NSW[pages_n[positions // PAGE_SIZE], positions % PAGE_SIZE] = context_LW
    heads = LatentHeads(
        torch.randn(HEADS, nope, LATENT, generator=generator),
        torch.randn(HEADS, value, LATENT, generator=generator),
        0.3,
    )
    q_THQ = torch.randn(num_tokens, HEADS, nope + ROPE, generator=generator)
    return q_THQ, cache_NSW, pages_n, context_LW, heads


@pytest.mark.parametrize("block_size", [4, 12, 2048])
@pytest.mark.parametrize("absorbed", [False, True], ids=["expanded", "absorbed"])
@pytest.mark.parametrize("num_tokens", [1, 5, 13])
@pytest.mark.parametrize("start", [0, 1, 8, 31])
def test_mla_prefill_matches_reference(
    start: int, num_tokens: int, absorbed: bool, block_size: int
) -> None:
    q_THQ, cache_NSW, pages_n, context_LW, heads = make_case(start, num_tokens)
    out_THV = mla_prefill(
        q_THQ, cache_NSW, pages_n, start, heads, absorbed=absorbed, block_size=block_size
    )
    torch.testing.assert_close(
        out_THV, mla_prefill_reference(q_THQ, context_LW, heads), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("block_size", [4, 2048])
@pytest.mark.parametrize("absorbed", [False, True], ids=["expanded", "absorbed"])
def test_mla_prefill_reads_fp8_rows(absorbed: bool, block_size: int) -> None:
    q_THQ, cache_NSW, pages_n, context_LW, heads = make_case(8, 5)
    out_THV = mla_prefill(
        q_THQ,
        as_fp8_rows(cache_NSW, LATENT),
        pages_n,
        8,
        heads,
        absorbed=absorbed,
        block_size=block_size,
    )
    expected = mla_prefill_reference(q_THQ, rounded_rows(context_LW, LATENT), heads)
    torch.testing.assert_close(out_THV, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("start", [0, 7])
def test_mla_prefill_matches_reference_when_query_and_value_are_equally_wide(start: int) -> None:
    q_THQ, cache_NSW, pages_n, context_LW, heads = make_case(start, 9, nope=4, value=8)
    out_THV = mla_prefill(q_THQ, cache_NSW, pages_n, start, heads)
    torch.testing.assert_close(out_THV, mla_prefill_reference(q_THQ, context_LW, heads))


def test_mla_prefill_expands_some_heads_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mla_prefill_module, "_HEADS_AT_ONCE", HEADS - 1)
    q_THQ, cache_NSW, pages_n, context_LW, heads = make_case(6, 11)
    out_THV = mla_prefill(q_THQ, cache_NSW, pages_n, 6, heads, block_size=4)
    torch.testing.assert_close(
        out_THV, mla_prefill_reference(q_THQ, context_LW, heads), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("absorbed", [False, True], ids=["expanded", "absorbed"])
def test_mla_prefill_cuts_queries_when_scores_would_not_fit(
    absorbed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mla_prefill_module, "_MAX_SCORES", 4 * HEADS * 2)
    q_THQ, cache_NSW, pages_n, context_LW, heads = make_case(6, 11)
    out_THV = mla_prefill(q_THQ, cache_NSW, pages_n, 6, heads, absorbed=absorbed, block_size=4)
    torch.testing.assert_close(
        out_THV, mla_prefill_reference(q_THQ, context_LW, heads), rtol=1e-4, atol=1e-5
    )


def test_absorbed_is_cheaper_below_the_crossover() -> None:
    sizes = {"nope": 64, "rope": 64, "value": 128, "latent": 256}
    assert absorbed_is_cheaper(153, 262144, **sizes)
    assert not absorbed_is_cheaper(154, 262144, **sizes)
    assert not absorbed_is_cheaper(64, 64, **sizes)
    assert absorbed_is_cheaper(2, 100, **sizes)
