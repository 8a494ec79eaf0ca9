"""Chunked prefill: attention over blocks of keys, and blocks of keys from pages."""

from __future__ import annotations

import pytest
import torch
from fp8_rows import as_fp8_rows, rounded_rows

from ostro.kernels.gpu.mla_prefill import (
    Attended,
    PrefillTile,
    attend_reference,
    attend_triton,
    mla_prefill_triton,
    prefill_tile,
)
from ostro.kernels.latent_heads import LatentHeads
from ostro.kernels.mla_prefill import mla_prefill_reference

PAGE_SIZE = 4
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
TILES = [
    PrefillTile(block_queries=16, block_keys=16, num_warps=4, num_stages=1),
    PrefillTile(block_queries=16, block_keys=32, num_warps=4, num_stages=2),
    PrefillTile(block_queries=32, block_keys=16, num_warps=4, num_stages=2),
]

each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def normal(*shape: int, dtype: torch.dtype, device: str, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype).to(device)


def make_block(
    num_queries: int, num_keys: int, dtype: torch.dtype, device: str, query: int = 16
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values of two heads."""
    return (
        normal(num_queries, 2, query, dtype=dtype, device=device),
        normal(num_keys, 2, query, dtype=dtype, device=device, seed=1),
        normal(num_keys, 2, 32, dtype=dtype, device=device, seed=2),
    )


def make_context(
    start: int, num_tokens: int, dtype: torch.dtype, device: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, LatentHeads]:
    """Queries, a cache full of NaN but for the context, its pages, the context, heads."""
    num_heads, nope, rope, value, latent = 3, 20, 4, 24, 36
    length = start + num_tokens
    num_pages = -(-length // PAGE_SIZE)
    generator = torch.Generator().manual_seed(length)
    pages_n = torch.randperm(num_pages + 1, generator=generator)[:num_pages].to(device)
    context_LW = normal(length, latent + rope, dtype=dtype, device=device, seed=1)
    cache_NSW = torch.full(
        (num_pages + 1, PAGE_SIZE, latent + rope), torch.nan, dtype=dtype, device=device
    )
    positions = torch.arange(length, device=device)
    cache_NSW[pages_n[positions // PAGE_SIZE], positions % PAGE_SIZE] = context_LW
    w_uk_HNC = normal(num_heads, nope, latent, dtype=dtype, device=device, seed=2) / latent**0.5
    w_uv_HVC = normal(num_heads, value, latent, dtype=dtype, device=device, seed=3) / latent**0.5
    q_THQ = normal(num_tokens, num_heads, nope + rope, dtype=dtype, device=device, seed=4)
    return q_THQ, cache_NSW, pages_n, context_LW, LatentHeads(w_uk_HNC, w_uv_HVC, 0.3)


def assert_close(out: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    torch.testing.assert_close(out, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def assert_same_attention(found: Attended, expected: Attended, dtype: torch.dtype) -> None:
    assert_close(found[0], expected[0], dtype)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-4, atol=1e-5)


def test_attend_triton_worked_example(triton_device: str) -> None:
    q_THQ = torch.zeros(2, 1, 4, device=triton_device)
    key_SHQ = torch.ones(2, 1, 4, device=triton_device)
    value_SHV = torch.tensor([[[2.0] * 4], [[4.0] * 4]], device=triton_device)
    out_THV, lse_HT = attend_triton(q_THQ, key_SHQ, value_SHV, 0, 1.0)
    torch.testing.assert_close(out_THV[:, 0, 0].tolist(), [2.0, 3.0])
    torch.testing.assert_close(lse_HT.exp().tolist(), [[1.0, 2.0]])


@each_dtype
@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize(
    ("num_queries", "num_keys", "first_query"),
    [(1, 1, 0), (1, 70, 69), (33, 33, 0), (17, 57, 40), (40, 16, 3), (9, 40, -4), (3, 5, 2**30)],
)
def test_attend_triton_matches_reference(
    num_queries: int,
    num_keys: int,
    first_query: int,
    tile: PrefillTile,
    dtype: torch.dtype,
    triton_device: str,
) -> None:
    block = make_block(num_queries, num_keys, dtype, triton_device)
    found = attend_triton(*block, first_query, 0.3, tile=tile)
    assert_same_attention(found, attend_reference(*block, first_query, 0.3), dtype)


@pytest.mark.parametrize(
    ("num_queries", "dtype"),
    [(20, torch.float32), (20, torch.bfloat16), (700, torch.bfloat16)],
    ids=str,
)
def test_attend_triton_matches_reference_with_the_tile_it_chooses(
    num_queries: int, dtype: torch.dtype, triton_device: str
) -> None:
    block = make_block(num_queries, 150, dtype, triton_device)
    found = attend_triton(*block, 30, 0.3)
    assert_same_attention(found, attend_reference(*block, 30, 0.3), dtype)


@each_dtype
def test_attend_triton_goes_on_from_earlier_keys(dtype: torch.dtype, triton_device: str) -> None:
    q_THQ, key_SHQ, value_SHV = make_block(37, 50, dtype, triton_device)
    expected = attend_reference(q_THQ, key_SHQ, value_SHV, 13, 0.3)
    attended = None
    for first in (0, 20, 24):  # the last block starts after some queries
        stop = {0: 20, 20: 24, 24: 50}[first]
        attended = attend_triton(
            q_THQ,
            key_SHQ[first:stop],
            value_SHV[first:stop],
            13 - first,
            0.3,
            earlier=attended,
            out_dtype=dtype if stop == 50 else torch.float32,
            tile=TILES[0],
        )
    assert attended is not None
    assert_same_attention(attended, expected, dtype)


def test_attend_reference_goes_on_from_earlier_keys() -> None:
    q_THQ, key_SHQ, value_SHV = make_block(9, 12, torch.float32, "cpu")
    earlier = attend_reference(q_THQ, key_SHQ[:7], value_SHV[:7], 3, 0.3)
    found = attend_reference(q_THQ, key_SHQ[7:], value_SHV[7:], -4, 0.3, earlier=earlier)
    expected = attend_reference(q_THQ, key_SHQ, value_SHV, 3, 0.3)
    assert_same_attention(found, expected, torch.float32)


def test_attend_triton_gives_nothing_to_queries_before_every_key(triton_device: str) -> None:
    block = make_block(20, 5, torch.float32, triton_device)
    out_THV, lse_HT = attend_triton(*block, -18, 0.3, tile=TILES[0])
    assert not out_THV[:18].any()
    assert torch.equal(lse_HT[:, :18], torch.full_like(lse_HT[:, :18], -torch.inf))
    again = attend_triton(*block, -18, 0.3, earlier=(out_THV, lse_HT), tile=TILES[0])
    assert not again[0][:18].any()
    assert not again[1][:, :18].isfinite().any()


@pytest.mark.filterwarnings("ignore:All-NaN slice")  # the interpreter's, of the other head
def test_attend_triton_takes_widths_that_are_no_powers_of_two(triton_device: str) -> None:
    q_THQ, key_SHQ, value_SHV = make_block(19, 33, torch.float32, triton_device, query=20)
    value_SHV = value_SHV[..., :24].contiguous()
    expected = attend_reference(q_THQ[:, :1], key_SHQ[:, :1], value_SHV[:, :1], 14, 0.3)
    key_SHQ[:, 1], value_SHV[:, 1] = torch.nan, torch.nan  # a head's own trouble stays its own
    out_THV, lse_HT = attend_triton(q_THQ, key_SHQ, value_SHV, 14, 0.3)
    assert_same_attention((out_THV[:, :1], lse_HT[:1]), expected, torch.float32)


def test_attend_triton_reads_no_key_that_comes_after_a_query(triton_device: str) -> None:
    q_THQ, key_SHQ, value_SHV = make_block(40, 40, torch.bfloat16, triton_device)
    expected = attend_triton(q_THQ, key_SHQ, value_SHV, 0, 0.3, tile=TILES[0])
    key_SHQ[16:] = 100.0
    value_SHV[16:] = 100.0
    found = attend_triton(q_THQ, key_SHQ, value_SHV, 0, 0.3, tile=TILES[0])
    assert torch.equal(found[0][:16], expected[0][:16])
    assert torch.equal(found[1][:, :16], expected[1][:, :16])


def test_attend_triton_survives_scores_that_exp_does_not(triton_device: str) -> None:
    q_THQ, key_SHQ, value_SHV = make_block(20, 40, torch.float32, triton_device)
    block = (q_THQ * 10, key_SHQ * 10, value_SHV)
    found, expected = attend_triton(*block, 20, 1.0), attend_reference(*block, 20, 1.0)
    # Scores of 1000 are right to 1e-4, and so are the weights.
    assert_same_attention(found, expected, torch.bfloat16)


def test_keys_that_do_not_fill_16_byte_steps_are_refused(triton_device: str) -> None:
    block = make_block(3, 3, torch.bfloat16, triton_device, query=10)
    with pytest.raises(ValueError, match="pad them to a multiple of 8"):
        attend_triton(*block, 0, 0.3)


def test_small_chunks_take_small_tiles() -> None:
    assert prefill_tile(8192, torch.bfloat16).block_keys == 64
    assert prefill_tile(256, torch.bfloat16).block_keys == 128


@each_dtype
@pytest.mark.parametrize("block_size", [7, 16, 16384])
@pytest.mark.parametrize(("start", "num_tokens"), [(0, 1), (0, 21), (1, 5), (31, 13)])
def test_mla_prefill_triton_matches_reference(
    start: int, num_tokens: int, block_size: int, dtype: torch.dtype, triton_device: str
) -> None:
    q_THQ, cache_NSW, pages_n, context_LW, heads = make_context(
        start, num_tokens, dtype, triton_device
    )
    out_THV = mla_prefill_triton(q_THQ, cache_NSW, pages_n, start, heads, block_size=block_size)
    assert_close(out_THV, mla_prefill_reference(q_THQ, context_LW, heads), dtype)


def test_mla_prefill_triton_reads_fp8_rows(triton_device: str) -> None:
    q_THQ, cache_NSW, pages_n, context_LW, heads = make_context(
        31, 13, torch.float32, triton_device
    )
    latent = heads.w_uk_HNC.shape[2]
    cache_NSW = as_fp8_rows(cache_NSW, latent)
    out_THV = mla_prefill_triton(q_THQ, cache_NSW, pages_n, 31, heads, block_size=16)
    expected = mla_prefill_reference(q_THQ, rounded_rows(context_LW, latent), heads)
    assert_close(out_THV, expected, torch.float32)


def test_mla_prefill_triton_takes_queries_that_are_a_view(triton_device: str) -> None:
    q_THQ, cache_NSW, pages_n, context_LW, heads = make_context(3, 9, torch.float32, triton_device)
    view_THQ = torch.stack((q_THQ, q_THQ), dim=1)[:, 1]
    out_THV = mla_prefill_triton(view_THQ, cache_NSW, pages_n, 3, heads)
    expected = mla_prefill_reference(q_THQ, context_LW, heads)
    assert_close(out_THV, expected, torch.float32)
