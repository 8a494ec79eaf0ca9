"""Places past 2**31 elements: the CPU operators do there what they do near zero.

Tensors are made by `torch.empty`: memory that nobody touches is not there.
"""

from __future__ import annotations

import pytest
import torch

from ostro.kernels.cpu import library
from ostro.kernels.latent_cache import write_rows
from ostro.kernels.latent_heads import LatentHeads, pack_heads
from ostro.kernels.linear import linear_cpu, pack_linear
from ostro.kernels.mla_decode import DecodePlan, mla_decode
from ostro.kernels.mla_prefill import mla_prefill
from ostro.kernels.rms_norm import rms_norm_cpu
from ostro.kernels.rotary import rotary_

pytestmark = pytest.mark.skipif(library.load() is None, reason=str(library.why_absent()))

FAR = 2**31
BF16 = torch.bfloat16
PAGE_SIZE, LATENT, ROPE, NOPE, VALUE = 16, 64, 32, 16, 48


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(BF16)


def far_page(near_NSW: torch.Tensor) -> tuple[torch.Tensor, int]:
    """A cache whose last page is this one, past 2**31 elements, and its number."""
    page = FAR // near_NSW.numel() + 1
    cache_NSW = torch.empty(page + 1, *near_NSW.shape[1:], dtype=BF16)
    cache_NSW[page] = near_NSW[0]
    return cache_NSW, page


def far_rows(near_TD: torch.Tensor) -> torch.Tensor:
    """The same rows, 2**30 elements apart."""
    num_rows, width = near_TD.shape
    memory = torch.empty(num_rows * FAR // 2, dtype=BF16)
    far_TD = memory.as_strided((num_rows, width), (FAR // 2, 1))
    far_TD.copy_(near_TD)
    return far_TD


def test_a_latent_is_written_to_a_far_slot() -> None:
    near_NSW = torch.zeros(1, PAGE_SIZE, LATENT + ROPE, dtype=BF16)
    cache_NSW, page = far_page(near_NSW)
    turn_TJ = torch.polar(torch.ones(1, ROPE // 2), torch.full((1, ROPE // 2), 0.3))
    for where_NSW, first in ((near_NSW, 0), (cache_NSW, page)):
        slots_T = torch.tensor([first * PAGE_SIZE + 3])
        row_TW = randn(1, LATENT + ROPE)
        write_rows(where_NSW, row_TW, randn(LATENT, seed=1), 1e-6, turn_TJ, slots_T)
    assert near_NSW[0, 3].any()
    assert torch.equal(cache_NSW[page], near_NSW[0])


def test_attention_reads_a_far_page() -> None:
    near_NSW = randn(1, PAGE_SIZE, LATENT + ROPE)
    cache_NSW, page = far_page(near_NSW)
    heads = LatentHeads(randn(4, NOPE, LATENT, seed=1), randn(4, VALUE, LATENT, seed=2), 0.1)
    heads = pack_heads(heads)
    q_THQ = randn(5, 4, NOPE + ROPE, seed=3)
    decoded, prefilled = [], []
    for where_NSW, number in ((near_NSW, 0), (cache_NSW, page)):
        plan = DecodePlan([[number]], [11], PAGE_SIZE, torch.device("cpu"))
        decoded.append(mla_decode(q_THQ[:1].clone(), where_NSW, plan, heads))
        pages_n = torch.tensor([number])
        prefilled.append(mla_prefill(q_THQ.clone(), where_NSW, pages_n, 6, heads))
    assert torch.equal(*decoded)
    assert torch.equal(*prefilled)


def test_rows_that_lie_far_apart_are_normed_multiplied_and_turned() -> None:
    near_TD = randn(4, 64)
    far_TD, weight_D = far_rows(near_TD), randn(64, seed=1)
    assert torch.equal(rms_norm_cpu(far_TD, weight_D, 1e-6), rms_norm_cpu(near_TD, weight_D, 1e-6))
    packed = pack_linear(randn(80, 64, seed=2))
    assert torch.equal(linear_cpu(far_TD, packed, BF16), linear_cpu(near_TD, packed, BF16))
    turn_TJ = torch.polar(torch.ones(4, 32), torch.rand(4, 32))
    for rows_TD in (near_TD, far_TD):
        rotary_(rows_TD[:, None], turn_TJ)
    assert torch.equal(far_TD, near_TD)
