"""The C++ operators against the plain-torch references, in bfloat16, over odd numbers of rows."""

from __future__ import annotations

import pytest
import torch

from ostro.kernels.combine import add_residual_cpu
from ostro.kernels.cpu import library
from ostro.kernels.gate import gate, gate_reference, pack_gate
from ostro.kernels.grouped_gemm import expert_mlp_cpu, expert_mlp_reference, mlp, swiglu
from ostro.kernels.latent_cache import write_latents_reference, write_rows
from ostro.kernels.latent_heads import LatentHeads, pack_heads
from ostro.kernels.linear import (
    is_packed,
    linear_cpu,
    linear_reference,
    linear_wide,
    pack_linear,
)
from ostro.kernels.mla_decode import DecodePlan, mla_decode, mla_decode_reference
from ostro.kernels.mla_prefill import mla_prefill, mla_prefill_reference
from ostro.kernels.rms_norm import rms_norm_cpu, rms_norm_reference
from ostro.kernels.rotary import rotary_, rotary_reference, rotations

pytestmark = pytest.mark.skipif(library.load() is None, reason=str(library.why_absent()))

BF16 = torch.bfloat16
PAGE_SIZE, LATENT, ROPE, NOPE, VALUE = 16, 64, 32, 16, 48


def randn(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return (torch.randn(*shape, generator=generator) * scale).to(BF16)


def assert_close(found: torch.Tensor, expected: torch.Tensor, share: float = 0.01) -> None:
    """Within a share of the largest value: what two roundings to bfloat16 may differ by."""
    torch.testing.assert_close(
        found.float(), expected.float(), rtol=0.02, atol=share * expected.float().abs().max().item()
    )


@pytest.mark.parametrize("num_rows", [0, 1, 2, 5, 6, 7, 13, 200])
@pytest.mark.parametrize(("num_out", "num_in"), [(16, 2), (48, 34), (320, 64), (64, 588)])
def test_linear(num_rows: int, num_out: int, num_in: int) -> None:
    x_TI, weight_OI = randn(num_rows, num_in), randn(num_out, num_in, seed=1)
    found = linear_cpu(x_TI, pack_linear(weight_OI), BF16)
    if num_rows:
        assert_close(found, linear_reference(x_TI, weight_OI))
    assert found.shape == (num_rows, num_out)


def test_linear_takes_strided_rows_and_gives_each_the_same_alone() -> None:
    wide, packed = randn(9, 100), pack_linear(randn(80, 64, seed=1))
    together = linear_cpu(wide[:, 20:84], packed, BF16)
    for row in range(9):
        alone = linear_cpu(wide[row : row + 1, 20:84].clone(), packed, BF16)
        assert torch.equal(alone[0], together[row])


@pytest.mark.parametrize("num_rows", [0, 1, 3, 40])
@pytest.mark.parametrize("absent", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("inner", [16, 48, 64])
def test_expert_mlp(num_rows: int, absent: float, inner: int) -> None:
    num_experts, hidden = 7, 80
    generator = torch.Generator().manual_seed(num_rows)
    expert_RK = torch.rand(num_rows, num_experts, generator=generator).argsort(dim=1)[:, :4]
    expert_RK[torch.rand(num_rows, 4, generator=generator) < absent] = -1
    weight_RK = torch.rand(num_rows, 4, generator=generator)
    rows_RD = randn(num_rows, hidden)
    gate_up = randn(num_experts, 2 * inner, hidden, scale=0.1)
    down = randn(num_experts, hidden, inner, scale=0.1)
    counts = torch.ones(num_experts + 1, dtype=torch.int64)
    found = expert_mlp_cpu(
        rows_RD, expert_RK, weight_RK, pack_linear(gate_up), pack_linear(down), counts
    )
    expected = expert_mlp_reference(rows_RD, expert_RK, weight_RK, gate_up, down)
    if num_rows:
        assert_close(found, expected, share=0.02)
    pairs = torch.bincount(expert_RK.flatten() + 1, minlength=num_experts + 1)
    assert (counts - 1).tolist() == pairs.tolist()


def test_a_row_gets_the_same_from_its_experts_alone_and_in_a_batch() -> None:
    num_experts, hidden, inner = 5, 64, 32
    rows_RD, expert_RK = randn(30, hidden), torch.randint(0, num_experts, (30, 1))
    weight_RK = torch.rand(30, 1)
    packed = [
        pack_linear(w) for w in (randn(5, 2 * inner, hidden), randn(5, hidden, inner, seed=2))
    ]

    def run(rows: slice) -> torch.Tensor:
        counts = torch.zeros(num_experts + 1, dtype=torch.int64)
        return expert_mlp_cpu(rows_RD[rows], expert_RK[rows], weight_RK[rows], *packed, counts)

    together = run(slice(None))
    for row in range(30):
        assert torch.equal(run(slice(row, row + 1))[0], together[row])


def test_the_shared_mlp_is_one_expert_of_weight_one() -> None:
    x_TD, gate_up, down = randn(5, 64), randn(96, 64, scale=0.1), randn(64, 48, scale=0.1)
    expected = swiglu(x_TD.float() @ gate_up.float().T).to(BF16).float() @ down.float().T
    assert_close(mlp(x_TD, pack_linear(gate_up), pack_linear(down)), expected, share=0.02)


@pytest.mark.parametrize("num_rows", [1, 20])
def test_rms_norm_rounds_as_torch_does(num_rows: int) -> None:
    x_TD, weight_D = randn(num_rows, 160)[:, 32:128], randn(96, seed=1)
    found, expected = rms_norm_cpu(x_TD, weight_D, 1e-5), rms_norm_reference(x_TD, weight_D, 1e-5)
    assert_close(found, expected, share=0.004)


@pytest.mark.parametrize("num_tokens", [1, 20])
def test_rotary(num_tokens: int) -> None:
    q_THQ = randn(num_tokens, 3, NOPE + ROPE)
    turn_TJ = rotations(torch.arange(num_tokens) + 5, torch.linspace(1, 0.01, ROPE // 2))
    expected = rotary_reference(q_THQ[..., NOPE:], turn_TJ)
    before = q_THQ.clone()
    rotary_(q_THQ[..., NOPE:], turn_TJ)
    assert_close(q_THQ[..., NOPE:], expected)
    assert torch.equal(q_THQ[..., :NOPE], before[..., :NOPE])


def test_write_rows() -> None:
    row_TW, norm_C = randn(3, LATENT + ROPE), randn(LATENT, seed=1)
    turn_TJ = rotations(torch.tensor([0, 3, 70]), torch.linspace(1, 0.01, ROPE // 2))
    slots_T = torch.tensor([17, 0, 40])
    found, expected = (torch.zeros(3, PAGE_SIZE, LATENT + ROPE, dtype=BF16) for _ in range(2))
    write_rows(found, row_TW, norm_C, 1e-5, turn_TJ, slots_T)
    latent_TC = rms_norm_reference(row_TW[:, :LATENT], norm_C, 1e-5)
    key_TP = rotary_reference(row_TW[:, None, LATENT:], turn_TJ)[:, 0]
    write_latents_reference(expected, latent_TC, key_TP, slots_T)
    assert_close(found, expected)
    assert found.any(-1).sum() == 3


def test_linear_wide_keeps_what_bfloat16_would_round() -> None:
    x_TI, weight_OI = randn(3, 64), randn(32, 64, seed=1)
    found = linear_wide(x_TI, pack_linear(weight_OI))
    torch.testing.assert_close(found, x_TI.float() @ weight_OI.float().T, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("num_tokens", [1, 9, 50])
def test_gate(num_tokens: int) -> None:
    x_TD, gate_ED = randn(num_tokens, 64), randn(32, 64, seed=3).float()
    packed = pack_gate(gate_ED, BF16)
    assert is_packed(packed)
    expert_TK, weight_TK = gate(x_TD, packed, 4, 2.0)
    expected_experts, expected_weights = gate_reference(x_TD, gate_ED, 4, 2.0)
    assert expert_TK.tolist() == expected_experts.tolist()
    torch.testing.assert_close(weight_TK, expected_weights, rtol=1e-4, atol=1e-5)


def test_a_gate_that_would_lose_digits_is_not_packed() -> None:
    gate_ED = torch.rand(32, 64)
    assert pack_gate(gate_ED, BF16) is gate_ED


def test_the_gate_takes_the_lowest_of_equals() -> None:
    gate_ED = torch.zeros(16, 32)
    gate_ED[[2, 5, 6]] = 1.0
    expert_TK, _ = gate(torch.ones(1, 32, dtype=BF16), pack_gate(gate_ED, BF16), 4)
    assert expert_TK.tolist() == [[2, 5, 6, 0]]


def test_add_residual() -> None:
    sum_TD, shared_TD, residual_TD = torch.randn(3, 48), randn(3, 48), randn(3, 48, seed=1)
    found = add_residual_cpu(sum_TD, shared_TD, residual_TD)
    assert torch.equal(found, (sum_TD + shared_TD.float() + residual_TD.float()).to(BF16))


def make_context(
    lengths: list[int], width: int = LATENT + ROPE
) -> tuple[torch.Tensor, list[list[int]], list[torch.Tensor]]:
    """A cache of NaN but for the contexts, their pages in random order, and the contexts."""
    counts = [-(-length // PAGE_SIZE) for length in lengths]
    free = torch.randperm(sum(counts) + 1, generator=torch.Generator().manual_seed(1)).tolist()
    cache_NSW = torch.full((len(free), PAGE_SIZE, width), torch.nan, dtype=BF16)
    tables, contexts = [], []
    for index, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        table = torch.tensor([free.pop() for _ in range(count)])
        context_SW, places = randn(length, width, seed=index), torch.arange(length)
        cache_NSW[table[places // PAGE_SIZE], places % PAGE_SIZE] = context_SW
        tables.append(table.tolist())
        contexts.append(context_SW)
    return cache_NSW, tables, contexts


def make_heads(num_heads: int, latent: int = LATENT) -> LatentHeads:
    w_uk, w_uv = (randn(num_heads, width, latent, seed=width, scale=0.1) for width in (NOPE, VALUE))
    heads = pack_heads(LatentHeads(w_uk, w_uv, 0.2))
    assert heads.packed is not None
    return heads


def decode(
    q_THQ: torch.Tensor,
    cache_NSW: torch.Tensor,
    tables: list[list[int]],
    lengths: list[int],
    heads: LatentHeads,
) -> torch.Tensor:
    plan = DecodePlan(tables, lengths, PAGE_SIZE, torch.device("cpu"))
    return mla_decode(q_THQ, cache_NSW, plan, heads)


@pytest.mark.parametrize("num_heads", [1, 3, 4, 8, 16, 20, 32, 50])
@pytest.mark.parametrize(
    "lengths", [[1], [7, 16], [3, 600, 40], [191, 193, 256, 257, 1500], [12_345]], ids=str
)
def test_mla_decode(num_heads: int, lengths: list[int]) -> None:
    cache_NSW, tables, contexts = make_context(lengths)
    heads, q_THQ = make_heads(num_heads), randn(len(lengths), num_heads, NOPE + ROPE)
    found = decode(q_THQ, cache_NSW, tables, lengths, heads)
    assert_close(found, mla_decode_reference(q_THQ, contexts, heads), share=0.02)


@pytest.mark.parametrize("num_heads", [2, 7, 9])
@pytest.mark.parametrize("rope", [2, 4, 8, 36])
def test_mla_decode_of_other_widths(num_heads: int, rope: int) -> None:
    latent = 96
    cache_NSW, tables, contexts = make_context([5, 333], latent + rope)
    heads, q_THQ = make_heads(num_heads, latent), randn(2, num_heads, NOPE + rope)
    found = decode(q_THQ, cache_NSW, tables, [5, 333], heads)
    assert_close(found, mla_decode_reference(q_THQ, contexts, heads), share=0.02)


@pytest.mark.parametrize("num_heads", [3, 8, 20])
def test_a_query_decodes_the_same_alone_and_in_a_batch(num_heads: int) -> None:
    lengths = [600, 5, 9000, 70]
    cache_NSW, tables, _ = make_context(lengths)
    heads, q_THQ = make_heads(num_heads), randn(4, num_heads, NOPE + ROPE)
    together = decode(q_THQ, cache_NSW, tables, lengths, heads)
    for t in range(4):
        alone = decode(q_THQ[t : t + 1], cache_NSW, [tables[t]], [lengths[t]], heads)
        assert torch.equal(alone[0], together[t])


def test_a_query_decodes_the_same_with_any_number_of_threads() -> None:
    cache_NSW, tables, _ = make_context([3000])
    heads, q_THQ = make_heads(8), randn(1, 8, NOPE + ROPE)
    before, found = torch.get_num_threads(), []
    try:
        for num_threads in (1, 2, 5):
            torch.set_num_threads(num_threads)
            found.append(decode(q_THQ, cache_NSW, tables, [3000], heads))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("num_heads", [3, 8, 20])
@pytest.mark.parametrize("place", [0, 191, 192, 1499])
def test_scores_far_apart_leave_the_one_key_that_stands_out(num_heads: int, place: int) -> None:
    cache_NSW, (table,), (context_SW,) = make_context([1500])
    context_SW[:, LATENT:] = -context_SW[:, LATENT:].abs()
    context_SW[place, LATENT:] = 1.0
    places = torch.arange(1500)
    cache_NSW[torch.tensor(table)[places // PAGE_SIZE], places % PAGE_SIZE] = context_SW
    heads, q_THQ = make_heads(num_heads), torch.zeros(1, num_heads, NOPE + ROPE, dtype=BF16)
    q_THQ[..., NOPE:] = 1000.0
    expected = mla_decode_reference(q_THQ, [context_SW[place : place + 1]], heads)
    assert_close(decode(q_THQ, cache_NSW, [table], [1500], heads), expected)
    found = mla_prefill(q_THQ, cache_NSW, torch.tensor(table), 1499, heads, absorbed=True)
    assert_close(found, expected)


@pytest.mark.parametrize("absorbed", [False, True], ids=["expanded", "absorbed"])
@pytest.mark.parametrize("block_size", [64, 2048])
@pytest.mark.parametrize(
    ("start", "num_tokens"), [(0, 2), (0, 61), (5, 30), (300, 100), (0, 333), (700, 3)]
)
@pytest.mark.parametrize("num_heads", [3, 18])
def test_mla_prefill(
    num_heads: int, start: int, num_tokens: int, block_size: int, absorbed: bool
) -> None:
    cache_NSW, (table,), (context_LW,) = make_context([start + num_tokens])
    heads, q_THQ = make_heads(num_heads), randn(num_tokens, num_heads, NOPE + ROPE)
    found = mla_prefill(
        q_THQ,
        cache_NSW,
        torch.tensor(table),
        start,
        heads,
        absorbed=absorbed,
        block_size=block_size,
    )
    assert_close(found, mla_prefill_reference(q_THQ, context_LW, heads), share=0.02)


def test_a_long_context_is_attended_to_its_end() -> None:
    """262,147 keys: each part is many tiles long."""
    length = 2**18 + 3
    cache_NSW, (table,), (context_SW,) = make_context([length])
    heads, q_THQ = make_heads(8), randn(3, 8, NOPE + ROPE, scale=0.3)
    expected = mla_prefill_reference(q_THQ, context_SW, heads)
    found = mla_prefill(q_THQ, cache_NSW, torch.tensor(table), length - 3, heads, absorbed=True)
    assert_close(found, expected, share=0.03)
    lengths = [length - 2, length - 1, length]
    assert_close(decode(q_THQ, cache_NSW, [table] * 3, lengths, heads), expected, share=0.03)
