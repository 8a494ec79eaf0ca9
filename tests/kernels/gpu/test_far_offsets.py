"""Places past 2**31 elements: what a kernel reads and writes there is what it does near zero.

Offsets are made of numbers of 32 bits, and wrap without a word where one of them is not widened
first. Where a place comes from a table (pages, slots, experts, pairs) kernels run as they are;
where it comes from a program's number, only far programs run, in the interpreter.
"""

from __future__ import annotations

import pytest
import torch
from expert_cases import make_nvfp4_weight
from far_programs import far_programs, untouched_arguments
from fp8_rows import as_fp8_rows

from ostro.kernels.gpu.combine import _combine_kernel
from ostro.kernels.gpu.decode_chunks import DecodeChunks
from ostro.kernels.gpu.expand_latents import expand_latents_triton
from ostro.kernels.gpu.expert_schedule import ExpertSchedule
from ostro.kernels.gpu.fp8_linear import _quantize_fp8_kernel
from ostro.kernels.gpu.gate import _gate_kernel, _partial_logits_kernel
from ostro.kernels.gpu.grouped_gemm import down_triton, gate_up_triton
from ostro.kernels.gpu.latent_heads import _expand_values_kernel, _latent_queries_kernel
from ostro.kernels.gpu.log_normalizer import _log_normalizer_kernel
from ostro.kernels.gpu.mla_decode import attend_latents_triton
from ostro.kernels.gpu.mla_prologue import mla_prologue_triton
from ostro.kernels.gpu.nvfp4_linear import nvfp4_linear_triton
from ostro.kernels.gpu.permute import _permute_kernel, permute_triton
from ostro.kernels.gpu.rms_norm import _rms_norm_kernel
from ostro.kernels.gpu.sampling import _largest_kernel
from ostro.kernels.gpu.sum_pairs import _sum_pairs_kernel
from ostro.kernels.gpu.tiles import FP4, tile
from ostro.kernels.latent_heads import LatentHeads
from ostro.kernels.mla_prologue import PrologueNorms

FAR = 2**31
BF16 = torch.bfloat16
PAGE_SIZE, LATENT, ROPE = 16, 64, 32
each_cache = pytest.mark.parametrize("is_fp8", [False, True], ids=["plain", "fp8"])


@pytest.fixture(autouse=True)
def _interpreted(triton_device: str) -> object:
    if triton_device != "cpu":
        pytest.skip("programs far on are run by the interpreter")
    with untouched_arguments():
        yield


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def rows_far_on(near: torch.Tensor) -> tuple[torch.Tensor, int]:
    """A tensor that ends with these rows, past 2**31 elements, and the number of the first."""
    width = near[0].numel()
    first = FAR // width + 1
    far = torch.empty(first + len(near), *near.shape[1:], dtype=near.dtype)
    far[first:] = near
    return far, first


def cached(rows_NSW: torch.Tensor, *, is_fp8: bool) -> torch.Tensor:
    return as_fp8_rows(rows_NSW, LATENT) if is_fp8 else rows_NSW


# ---- places from tables


@each_cache
def test_a_latent_is_written_to_a_far_slot(is_fp8: bool) -> None:
    near_NSW = cached(torch.zeros(1, PAGE_SIZE, LATENT + ROPE, dtype=BF16), is_fp8=is_fp8)
    cache_NSW, page = rows_far_on(near_NSW.clone())
    norms = PrologueNorms(randn(48, seed=1), randn(LATENT, seed=2), 1e-6)
    turn_TJ = torch.polar(torch.ones(1, ROPE // 2), torch.rand(1, ROPE // 2))
    for where_NSW, first in ((near_NSW, 0), (cache_NSW, page)):
        slots_T = torch.tensor([first * PAGE_SIZE + 3])
        row_TW, query_TL = randn(1, LATENT + ROPE), randn(1, 48)
        mla_prologue_triton(query_TL, row_TW, norms, turn_TJ, slots_T, where_NSW)
    assert near_NSW[0, 3].any()
    assert torch.equal(cache_NSW[page], near_NSW[0])


@each_cache
def test_attention_reads_a_far_page(is_fp8: bool) -> None:
    page_NSW = cached(randn(1, PAGE_SIZE, LATENT + ROPE), is_fp8=is_fp8)
    cache_NSW, page = rows_far_on(page_NSW)
    q_THW = randn(1, 16, LATENT + ROPE, seed=1)
    found = []
    for where_NSW, number in ((page_NSW, 0), (cache_NSW, page)):
        chunks = DecodeChunks(
            pages_G=torch.tensor([number], dtype=torch.int32),
            chunk_X4=torch.tensor([[0, 0, 11, 0]], dtype=torch.int32),
            first_T1=torch.tensor([0, 1], dtype=torch.int32),
        )
        found.append(attend_latents_triton(q_THW, where_NSW, chunks, LATENT, 0.1))
    assert torch.equal(*found)


@each_cache
def test_keys_are_expanded_from_a_far_page(is_fp8: bool) -> None:
    page_NSW = cached(randn(1, PAGE_SIZE, LATENT + ROPE), is_fp8=is_fp8)
    cache_NSW, page = rows_far_on(page_NSW)
    heads = LatentHeads(randn(2, 16, LATENT, seed=1), randn(2, 16, LATENT, seed=2), 0.1)
    near = expand_latents_triton(page_NSW, torch.tensor([0]), 2, 13, heads)
    far = expand_latents_triton(cache_NSW, torch.tensor([page]), 2, 13, heads)
    for one, other in zip(near, far, strict=True):
        assert torch.equal(one, other)


def schedule_of(expert: int, pair: int = 0) -> ExpertSchedule:
    """One pair, of this expert."""
    offsets_E1 = torch.zeros(expert + 2, dtype=torch.int32)
    offsets_E1[-1] = 1
    return ExpertSchedule(
        order_A=torch.tensor([pair], dtype=torch.int32),
        offsets_E1=offsets_E1,
        tiles_N2=torch.tensor([[expert, 0]], dtype=torch.int32),
        num_tiles=torch.tensor([1], dtype=torch.int32),
        block_rows=16,
    )


def test_products_read_a_far_expert() -> None:
    hidden, inner = 256, 128
    near_EHD = randn(1, 2 * inner, hidden)
    far_EHD, expert = rows_far_on(near_EHD)
    x_AD = randn(1, hidden, seed=1)
    near_AF = gate_up_triton(x_AD, near_EHD, schedule_of(0))
    assert torch.equal(gate_up_triton(x_AD, far_EHD, schedule_of(expert)), near_AF)
    del far_EHD
    near_EDF = randn(1, hidden, inner, seed=2)
    far_EDF, expert = rows_far_on(near_EDF)
    weight_RK = torch.tensor([[0.5]])
    near_AD = down_triton(near_AF, near_EDF, weight_RK, schedule_of(0), BF16)
    far_AD = down_triton(near_AF, far_EDF, weight_RK, schedule_of(expert), BF16)
    assert torch.equal(far_AD, near_AD)


def test_a_pair_takes_a_far_row() -> None:
    near_RD = randn(1, 512)
    far_RD, row = rows_far_on(near_RD)
    out_AD = permute_triton(far_RD, torch.tensor([[0]]), schedule_of(0, pair=row))
    assert torch.equal(out_AD, near_RD)


# ---- places from a program's number


def test_rows_far_on_are_permuted() -> None:
    near_RD = randn(1, 512)
    out_AD, first = rows_far_on(torch.zeros(1, 512, dtype=BF16))
    order_A = torch.empty(first + 1, dtype=torch.int32)
    order_A[first] = 0
    offsets_E1 = torch.tensor([0, first + 1], dtype=torch.int32)
    with far_programs(first):
        _permute_kernel[(1, 1)](
            near_RD,
            torch.zeros(1, 1, dtype=torch.int64),
            order_A,
            offsets_E1,
            None,
            out_AD,
            512,
            1,
            1,
            BLOCK_D=512,
        )
    assert torch.equal(out_AD[first:], near_RD)


def test_pairs_far_on_are_added_up() -> None:
    near_AD, row = randn(2, 512), FAR // 512 + 1
    y_AD = torch.empty(2 * (row + 1), 512, dtype=BF16)
    y_AD[2 * row :] = near_AD
    out_RD = torch.empty(row + 1, 512, dtype=BF16)
    expert_RK = torch.empty(row + 1, 2, dtype=torch.int64)
    expert_RK[row] = torch.tensor([1, 0])
    with far_programs(row):
        _sum_pairs_kernel[(1, 1)](y_AD, expert_RK, out_RD, 512, K=2, BLOCK_K=2, BLOCK_D=512)
    assert torch.equal(out_RD[row], near_AD.float().sum(0).to(BF16))


def test_rows_far_on_are_combined_and_normed() -> None:
    near_TD, weight_D = randn(1, 256), randn(256, seed=1)
    x_TD, first = rows_far_on(near_TD)
    found = []
    for where_TD, number in ((near_TD, 0), (x_TD, first)):
        out_TD, normed_TD = torch.empty_like(where_TD), torch.empty_like(where_TD)
        alone_TD = torch.empty_like(where_TD)
        expert_T1 = torch.zeros(len(where_TD), 1, dtype=torch.int64)
        with far_programs(number):
            _combine_kernel[(1,)](
                where_TD,
                expert_T1,
                (where_TD,),
                out_TD,
                weight_D,
                normed_TD,
                1e-6,
                256,
                K=1,
                BLOCK_K=1,
                BLOCK_D=256,
            )
            _rms_norm_kernel[(1,)](where_TD, weight_D, alone_TD, 256, 1e-6, 256, BLOCK_D=256)
        found.append((out_TD[number], normed_TD[number], alone_TD[number]))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_rows_far_on_are_rounded_to_fp8() -> None:
    near_TI, scale = randn(1, 256), torch.tensor(0.25)
    x_TI, first = rows_far_on(near_TI)
    found = []
    for where_TI, number in ((near_TI, 0), (x_TI, first)):
        out_TI = torch.empty(where_TI.shape, dtype=torch.float8_e4m3fn)
        with far_programs(number):
            _quantize_fp8_kernel[(1, 1)](where_TI, scale, out_TI, 256, 256, BLOCK_I=256)
        found.append(out_TI[number].float())
    assert torch.equal(*found)


def test_rows_far_on_are_multiplied_by_an_nvfp4_weight() -> None:
    weight, _ = make_nvfp4_weight(64, 16)
    near_TI, rows = randn(16, 16), 16
    cut = tile("linear", FP4, rows, torch.device("cpu"))
    first_tile = FAR // 64 // rows + 1
    far_TI = torch.empty((first_tile + 1) * rows, 16, dtype=BF16)
    far_TI[-rows:] = near_TI
    with far_programs(first_tile):
        far_TO = nvfp4_linear_triton(far_TI, weight, cut)
    assert torch.equal(far_TO[-rows:], nvfp4_linear_triton(near_TI, weight, cut))


def test_rows_of_logits_far_on_are_normalized_and_chosen_from() -> None:
    near_BV = randn(1, 1024)
    logits_BV, first = rows_far_on(near_BV)
    normalizer_B = torch.empty(first + 1)
    largest_BS, id_BS = torch.empty(first + 1, 1), torch.empty(first + 1, 1, dtype=torch.int32)
    with far_programs(first):
        _log_normalizer_kernel[(1,)](logits_BV, normalizer_B, 1024, BLOCK_V=1024)
        _largest_kernel[(1, 1)](logits_BV, None, largest_BS, id_BS, 1024, 1, BLOCK_V=1024)
    expected = torch.logsumexp(near_BV[0].float(), 0)
    torch.testing.assert_close(normalizer_B[first], expected)
    assert id_BS[first, 0] == near_BV[0].argmax()


def test_tokens_far_on_have_partial_logits() -> None:
    near_TD, gate_ED = randn(16, 256), randn(16, 256, seed=1)
    num_tokens = -(-(FAR // 256 + 1) // 16) * 16 + 16
    x_TD = torch.empty(num_tokens, 256, dtype=BF16)
    x_TD[-16:] = near_TD
    logits_STE = torch.empty(1, num_tokens, 16)
    with far_programs(0, 0, num_tokens // 16 - 1):
        _partial_logits_kernel[(1, 1, 1)](
            x_TD, gate_ED, logits_STE, num_tokens, 16, 256, BLOCK_T=16, BLOCK_E=16, BLOCK_D=256
        )
    expected_TE = near_TD.float() @ gate_ED.float().T
    torch.testing.assert_close(logits_STE[0, -16:], expected_TE, rtol=1e-4, atol=1e-3)


def test_partial_logits_lie_far_on() -> None:
    num_tokens, num_experts, num_parts = 2**14, 128, 2**10 + 2
    hidden = 16 * num_parts
    gate_ED, x_TD = torch.empty(num_experts, hidden), torch.empty(num_tokens, hidden)
    x_TD[-16:, -16:], gate_ED[-16:, -16:] = 2.0, 1.0
    logits_STE = torch.empty(num_parts, num_tokens, num_experts)
    with far_programs(num_experts // 16 - 1, num_parts - 1, num_tokens // 16 - 1):
        _partial_logits_kernel[(1, 1, 1)](
            x_TD,
            gate_ED,
            logits_STE,
            num_tokens,
            num_experts,
            hidden,
            BLOCK_T=16,
            BLOCK_E=16,
            BLOCK_D=16,
        )
    assert (logits_STE[-1, -16:, -16:] == 32.0).all()


def test_experts_are_chosen_by_logits_far_on() -> None:
    num_tokens, num_experts, num_parts = 2**20, 128, 18
    logits_STE = torch.empty(num_parts, num_tokens, num_experts)
    logits_STE[:, -4:] = randn(num_parts, 4, num_experts, dtype=torch.float32)
    expert_TK, weight_TK = (
        torch.empty(num_tokens, 2, dtype=dtype) for dtype in (torch.int64, torch.float32)
    )
    with far_programs(num_tokens // 4 - 1):
        _gate_kernel[(1,)](
            logits_STE,
            None,
            expert_TK,
            weight_TK,
            num_tokens,
            num_experts,
            1.0,
            K=2,
            S=num_parts,
            ALWAYS=None,
            BLOCK_T=4,
            BLOCK_E=128,
            BLOCK_K=2,
        )
    expected_TK = logits_STE[:, -4:].sum(0).topk(2).indices
    assert torch.equal(expert_TK[-4:], expected_TK)


def test_queries_and_values_of_tokens_far_on() -> None:
    heads, nope, rope = 16, 32, 32
    near_THQ, w_uk_HNC = randn(16, heads, nope + rope), randn(heads, nope, LATENT, seed=1)
    w_uv_HVC = randn(heads, 32, LATENT, seed=2)
    num_far = -(-(FAR // (heads * nope)) // 16) * 16 + 16
    found = []
    for num_tokens in (16, num_far):
        q_THQ = torch.empty(num_tokens, heads, nope + rope, dtype=BF16)
        q_THQ[-16:] = near_THQ
        q_THW = torch.empty(num_tokens, heads, LATENT + rope, dtype=BF16)
        out_THV = torch.empty(num_tokens, heads, 32, dtype=BF16)
        with far_programs(heads - 1, num_tokens // 16 - 1):
            _latent_queries_kernel[(1, 1)](
                q_THQ,
                w_uk_HNC,
                None,
                None,
                q_THW,
                num_tokens,
                *q_THQ.stride()[:2],
                heads,
                N=nope,
                P=rope,
                C=LATENT,
                BLOCK_T=16,
            )
            latents_THC = torch.empty(num_tokens, heads, LATENT, dtype=BF16)
            latents_THC[-16:, -1] = q_THW[-16:, -1, :LATENT]
            _expand_values_kernel[(1, 1)](
                latents_THC,
                w_uv_HVC,
                out_THV,
                num_tokens,
                heads,
                32,
                C=LATENT,
                BLOCK_V=32,
                BLOCK_T=16,
            )
        found.append((q_THW[-16:, -1], out_THV[-16:, -1]))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
