"""MLA of single tokens by Triton: ragged chunks, padding, poison beyond every context."""

from __future__ import annotations

import pytest
import torch
from fp8_rows import as_fp8_rows, rounded_rows

from ostro.kernels.gpu.decode_chunks import DecodeChunks
from ostro.kernels.gpu.latent_heads import latent_queries_triton
from ostro.kernels.gpu.mla_decode import (
    DecodeCut,
    attend_latents_reference,
    attend_latents_triton,
    serves,
)
from ostro.kernels.latent_heads import LatentHeads
from ostro.kernels.mla_decode import DecodePlan, mla_decode_reference, mla_decode_triton

NOPE, ROPE, VALUE, LATENT = 16, 16, 24, 32
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
each_cut = pytest.mark.parametrize(
    "cut",
    [
        DecodeCut(num_warps=4, num_stages=2, early_loads=True),
        DecodeCut(num_warps=8, num_stages=3, early_loads=False),
    ],
    ids=str,
)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


class Case:
    """Queries, heads, and a cache full of NaN but for the contexts; page tables are shuffled."""

    def __init__(
        self, lengths: list[int], dtype: torch.dtype, device: str, *, heads: int = 3, page: int = 16
    ) -> None:
        generator = torch.Generator().manual_seed(len(lengths))
        self.lengths, self.page = lengths, page

        def randn(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator).to(dtype).to(device)

        num_pages = [-(-length // page) for length in lengths]
        free = torch.randperm(sum(num_pages) + 2, generator=generator).tolist()
        self.cache_NSW = torch.full((len(free), page, LATENT + ROPE), torch.nan).to(dtype)
        self.cache_NSW = self.cache_NSW.to(device)
        self.tables, self.contexts = [], []
        for length, count in zip(lengths, num_pages, strict=True):
            table = [free.pop() for _ in range(count)]
            context_SW = randn(length, LATENT + ROPE)
            for start, number in zip(range(0, length, page), table, strict=True):
                part = context_SW[start : start + page]
                self.cache_NSW[number, : len(part)] = part
            self.tables.append(table)
            self.contexts.append(context_SW)
        self.fp8_NSW = as_fp8_rows(self.cache_NSW, LATENT)
        self.q_THQ = randn(len(lengths), heads, NOPE + ROPE)
        self.heads = LatentHeads(randn(heads, NOPE, LATENT), randn(heads, VALUE, LATENT), 0.2)

    def plan(self) -> DecodePlan:
        return DecodePlan(self.tables, self.lengths, self.page, self.q_THQ.device)

    def expected(self) -> torch.Tensor:
        return mla_decode_reference(self.q_THQ, self.contexts, self.heads)

    def expected_of_fp8(self) -> torch.Tensor:
        contexts = [rounded_rows(context_SW, LATENT) for context_SW in self.contexts]
        return mla_decode_reference(self.q_THQ, contexts, self.heads)


def assert_close(out: torch.Tensor, expected: torch.Tensor) -> None:
    assert out.dtype == expected.dtype
    tolerance = TOLERANCE[out.dtype]
    torch.testing.assert_close(
        out.float(), expected.float(), rtol=tolerance, atol=tolerance * float(expected.abs().max())
    )


def test_one_cached_token_gives_its_value(triton_device: str) -> None:
    case = Case([1], torch.float32, triton_device)
    out_THV = mla_decode_triton(case.q_THQ, case.cache_NSW, case.plan().chunks(), case.heads)
    assert_close(out_THV[0], case.heads.w_uv_HVC @ case.contexts[0][0, :LATENT])


@pytest.mark.parametrize("lengths", [[7], [16], [33, 1, 64, 530], [1025, 3]], ids=str)
@each_dtype
def test_mla_decode_triton_matches_reference(
    lengths: list[int], dtype: torch.dtype, triton_device: str
) -> None:
    case = Case(lengths, dtype, triton_device)
    out_THV = mla_decode_triton(case.q_THQ, case.cache_NSW, case.plan().chunks(), case.heads)
    assert_close(out_THV, case.expected())


@pytest.mark.parametrize("lengths", [[7], [33, 1, 64, 530], [1025, 3]], ids=str)
@each_dtype
def test_mla_decode_triton_reads_fp8_rows(
    lengths: list[int], dtype: torch.dtype, triton_device: str
) -> None:
    case = Case(lengths, dtype, triton_device)
    out_THV = mla_decode_triton(case.q_THQ, case.fp8_NSW, case.plan().chunks(), case.heads)
    expected_THV = case.expected_of_fp8()
    assert out_THV.dtype == dtype
    # Multiplied in float16, of 11 bits; bfloat16 has 8.
    tolerance = 4e-3 if dtype == torch.float32 else TOLERANCE[dtype]
    torch.testing.assert_close(
        out_THV.float(),
        expected_THV.float(),
        rtol=tolerance,
        atol=tolerance * float(expected_THV.abs().max()),
    )


@pytest.mark.parametrize(("heads", "page"), [(1, 16), (17, 32), (32, 128)])
def test_mla_decode_triton_takes_other_heads_and_pages(
    heads: int, page: int, triton_device: str
) -> None:
    case = Case([page + 5, 2], torch.float32, triton_device, heads=heads, page=page)
    out_THV = mla_decode_triton(case.q_THQ, case.cache_NSW, case.plan().chunks(), case.heads)
    assert_close(out_THV, case.expected())


def test_a_query_does_not_depend_on_the_others(triton_device: str) -> None:
    case = Case([530, 40, 9], torch.bfloat16, triton_device)
    together = mla_decode_triton(case.q_THQ, case.cache_NSW, case.plan().chunks(), case.heads)
    for query in range(3):
        one = slice(query, query + 1)
        plan = DecodePlan(case.tables[one], case.lengths[one], case.page, case.q_THQ.device)
        alone = mla_decode_triton(case.q_THQ[one], case.cache_NSW, plan.chunks(), case.heads)
        assert torch.equal(alone[0], together[query])


def test_padding_reads_nothing_and_gives_zeros(triton_device: str) -> None:
    case = Case([20], torch.float32, triton_device)
    chunks = case.plan().chunks()

    def pad(values: torch.Tensor, fill: int) -> torch.Tensor:
        return torch.cat((values, torch.full_like(values[-1:], fill)))

    padded = DecodeChunks(
        pages_G=pad(chunks.pages_G, 10**6),
        chunk_X4=pad(chunks.chunk_X4, 0),
        first_T1=pad(chunks.first_T1, int(chunks.first_T1[-1])),
    )
    q_THQ = torch.cat((case.q_THQ, torch.full_like(case.q_THQ, torch.nan)))
    out_THV = mla_decode_triton(q_THQ, case.cache_NSW, padded, case.heads)
    assert_close(out_THV[:1], case.expected())
    assert not out_THV[1].any()


@each_dtype
@each_cut
def test_attend_latents_triton_matches_reference(
    cut: DecodeCut, dtype: torch.dtype, triton_device: str
) -> None:
    case = Case([600, 0, 33], dtype, triton_device)
    q_THW = latent_queries_triton(case.q_THQ, case.heads.w_uk_HNC, None, None)
    arguments = (q_THW, case.cache_NSW, case.plan().chunks(), LATENT, 0.2)
    assert_close(attend_latents_triton(*arguments, cut=cut), attend_latents_reference(*arguments))


@each_cut
def test_attend_latents_triton_takes_very_large_scores(cut: DecodeCut, triton_device: str) -> None:
    case = Case([40], torch.float32, triton_device)
    q_THW = latent_queries_triton(case.q_THQ, case.heads.w_uk_HNC, None, None)
    chunks = case.plan().chunks()
    out_THC = attend_latents_triton(q_THW, case.cache_NSW, chunks, LATENT, 1e4, cut=cut)
    score_HS = torch.einsum("hw,sw->hs", q_THW[0], case.contexts[0])
    assert_close(out_THC[0], case.contexts[0][score_HS.argmax(dim=1), :LATENT])


@pytest.mark.parametrize("length", [1, 63, 64, 65, 127, 128, 129, 191, 200])
def test_a_tile_may_be_a_part_of_a_page(length: int, triton_device: str) -> None:
    case = Case([length], torch.bfloat16, triton_device, page=128)
    chunks = case.plan().chunks()
    out_THV = mla_decode_triton(case.q_THQ, case.cache_NSW, chunks, case.heads)
    assert_close(out_THV, case.expected())
    out_THV = mla_decode_triton(case.q_THQ, case.fp8_NSW, chunks, case.heads)
    assert_close(out_THV, case.expected_of_fp8())


def test_queries_beyond_float16_meet_fp8_rows_at_its_largest_value(triton_device: str) -> None:
    case = Case([40], torch.float32, triton_device)
    q_THW = torch.zeros(1, 3, LATENT + ROPE, device=triton_device)
    q_THW[:, :, 0] = 1e6  # float16 would make it inf, and inf * 0 NaN
    arguments = (case.fp8_NSW, case.plan().chunks(), LATENT, 0.2)
    expected_THC = attend_latents_reference(q_THW, *arguments)
    assert_close(attend_latents_triton(q_THW, *arguments), expected_THC)


@pytest.mark.parametrize(
    ("nope", "latent", "page", "is_served"),
    [
        (16, 32, 16, True),
        (6, 32, 16, False),
        (16, 8, 16, False),
        (16, 32, 4, False),
        (16, 32, 512, False),
    ],
)
def test_serves_powers_of_two_alone(nope: int, latent: int, page: int, is_served: bool) -> None:
    assert serves(nope, 16, latent, page) is is_served
