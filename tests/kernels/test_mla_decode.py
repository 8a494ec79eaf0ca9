"""MLA of single tokens: absorbed over ragged pages equals expanded keys and values."""

from __future__ import annotations

import pytest
import torch
from fp8_rows import as_fp8_rows, rounded_rows

from ostro.kernels import mla_decode as mla_decode_module
from ostro.kernels.latent_heads import LatentHeads
from ostro.kernels.mla_decode import DecodePlan, mla_decode, mla_decode_reference

PAGE_SIZE = 4
HEADS, NOPE, ROPE, VALUE, LATENT = 3, 6, 4, 5, 8
CPU = torch.device("cpu")


def make_heads(dtype: torch.dtype = torch.float32) -> LatentHeads:
    generator = torch.Generator().manual_seed(1)
    return LatentHeads(
        torch.randn(HEADS, NOPE, LATENT, generator=generator).to(dtype),
        torch.randn(HEADS, VALUE, LATENT, generator=generator).to(dtype),
        0.3,
    )


def make_pages(lengths: list[int]) -> tuple[torch.Tensor, list[list[int]], list[torch.Tensor]]:
    """A cache full of NaN but for the contexts, page tables in random order, and the contexts."""
    generator = torch.Generator().manual_seed(2)
    num_pages = [-(-length // PAGE_SIZE) for length in lengths]
    free = torch.randperm(sum(num_pages) + 2, generator=generator).tolist()
    cache_NSW = torch.full((len(free), PAGE_SIZE, LATENT + ROPE), torch.nan)
    tables, contexts = [], []
    for length, count in zip(lengths, num_pages, strict=True):
        table = [free.pop() for _ in range(count)]
        context_SW = torch.randn(length, LATENT + ROPE, generator=generator)
        for position in range(length):
            cache_NSW[table[position // PAGE_SIZE], position % PAGE_SIZE] = context_SW[position]
        tables.append(table)
        contexts.append(context_SW)
    return cache_NSW, tables, contexts


def queries(num_tokens: int) -> torch.Tensor:
    return torch.randn(num_tokens, HEADS, NOPE + ROPE, generator=torch.Generator().manual_seed(3))


def test_a_plan_of_chunks_alone_refuses_what_needs_lengths() -> None:
    chunks = DecodePlan([[0]], [3], 16, CPU).chunks()
    plan = DecodePlan.of_chunks(chunks, 16)
    for needed in (plan.buckets, plan.ragged):
        with pytest.raises(ValueError, match="plan of chunks"):
            needed()


def test_mla_decode_of_one_cached_token_is_its_value() -> None:
    cache_NSW, tables, contexts = make_pages([1])
    heads = make_heads()
    out_THV = mla_decode(queries(1), cache_NSW, DecodePlan(tables, [1], PAGE_SIZE, CPU), heads)
    torch.testing.assert_close(out_THV[0], heads.w_uv_HVC @ contexts[0][0, :LATENT])


@pytest.mark.parametrize(
    "lengths", [[1], [7], [8], [4, 4], [1, 2, 3], [5, 8, 6], [1, 40, 3, 100, 17, 39, 2]], ids=str
)
def test_mla_decode_matches_reference_and_reads_nothing_beyond_a_context(
    lengths: list[int],
) -> None:
    cache_NSW, tables, contexts = make_pages(lengths)
    heads, q_THQ = make_heads(), queries(len(lengths))
    out_THV = mla_decode(q_THQ, cache_NSW, DecodePlan(tables, lengths, PAGE_SIZE, CPU), heads)
    torch.testing.assert_close(out_THV, mla_decode_reference(q_THQ, contexts, heads))


def test_mla_decode_in_bfloat16_stays_close() -> None:
    lengths = [9, 30]
    cache_NSW, tables, contexts = make_pages(lengths)
    heads, q_THQ = make_heads(torch.bfloat16), queries(2).bfloat16()
    plan = DecodePlan(tables, lengths, PAGE_SIZE, CPU)
    out_THV = mla_decode(q_THQ, cache_NSW.bfloat16(), plan, heads)
    assert out_THV.dtype == torch.bfloat16
    expected = mla_decode_reference(q_THQ, [c.bfloat16() for c in contexts], heads)
    torch.testing.assert_close(out_THV, expected, rtol=5e-2, atol=0.2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_mla_decode_reads_fp8_rows(dtype: torch.dtype) -> None:
    lengths = [9, 30, 2]
    cache_NSW, tables, contexts = make_pages(lengths)
    heads, q_THQ = make_heads(dtype), queries(3).to(dtype)
    plan = DecodePlan(tables, lengths, PAGE_SIZE, CPU)
    out_THV = mla_decode(q_THQ, as_fp8_rows(cache_NSW, LATENT), plan, heads)
    assert out_THV.dtype == dtype
    rounded = [rounded_rows(context_SW, LATENT) for context_SW in contexts]
    expected = mla_decode_reference(q_THQ, rounded, heads)
    tolerance = {} if dtype == torch.float32 else {"rtol": 5e-2, "atol": 0.2}
    torch.testing.assert_close(out_THV, expected, **tolerance)


def test_a_decode_plan_groups_contexts_within_a_factor_of_two() -> None:
    lengths = [1, 4, 5, 16, 9, 64, 4000]
    tables = [list(range(-(-length // PAGE_SIZE))) for length in lengths]
    buckets = DecodePlan(tables, lengths, PAGE_SIZE, CPU).buckets()
    gathered = sum(bucket.pages_G.numel() for bucket in buckets) * PAGE_SIZE
    assert gathered < 2 * sum(-(-length // PAGE_SIZE) * PAGE_SIZE for length in lengths)
    found = [
        q for bucket in buckets if bucket.queries_B is not None for q in bucket.queries_B.tolist()
    ]
    assert sorted(found) == list(range(len(lengths)))


def test_a_decode_plan_ignores_pages_beyond_the_context() -> None:
    (bucket,) = DecodePlan([[5, 6, 7]], [PAGE_SIZE + 1], PAGE_SIZE, CPU).buckets()
    assert bucket.pages_G.tolist() == [5, 6]
    assert bucket.stale_G is not None
    assert bucket.stale_G.tolist() == [5, 6, 7]


def test_a_decode_plan_makes_few_shapes_of_many_contexts() -> None:
    tables, lengths = [list(range(1024))], range(1025, 4097, 16)
    plans = [DecodePlan(tables, [length], PAGE_SIZE, CPU).buckets() for length in lengths]
    gathered = [plan[0].pages_G.numel() for plan in plans]
    assert len(set(gathered)) <= 9
    assert all(p * PAGE_SIZE < 1.3 * n for p, n in zip(gathered, lengths, strict=True))


def test_a_decode_plan_bounds_what_a_bucket_gathers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mla_decode_module, "_MAX_GATHERED", 8 * PAGE_SIZE)
    lengths = [4 * PAGE_SIZE] * 5 + [9 * PAGE_SIZE]
    cache_NSW, tables, contexts = make_pages(lengths)
    plan = DecodePlan(tables, lengths, PAGE_SIZE, CPU)
    assert [bucket.num_queries for bucket in plan.buckets()] == [2, 2, 1, 1]
    q_THQ, heads = queries(len(lengths)), make_heads()
    expected = mla_decode_reference(q_THQ, contexts, heads)
    torch.testing.assert_close(mla_decode(q_THQ, cache_NSW, plan, heads), expected)
