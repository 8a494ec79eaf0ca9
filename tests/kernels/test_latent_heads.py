"""Heads that read latents: worked values, and what packing leaves alone."""

from __future__ import annotations

import torch

from ostro.kernels.latent_heads import (
    LatentHeads,
    absorb_queries,
    expand_values,
    expand_values_reference,
    pack_heads,
)


def test_absorb_queries_worked_example() -> None:
    q_THQ = torch.tensor([[[2.0, 5.0]]])  # one nope value, one rope value
    w_uk_HNC = torch.tensor([[[3.0, 4.0]]])
    assert absorb_queries(q_THQ, w_uk_HNC).tolist() == [[[6.0, 8.0, 5.0]]]


def test_expand_values_matches_reference() -> None:
    generator = torch.Generator().manual_seed(0)
    out_THC, w_uv_HVC = (torch.randn(*s, generator=generator) for s in ((4, 3, 8), (3, 5, 8)))
    expected = expand_values_reference(out_THC, w_uv_HVC)
    torch.testing.assert_close(expand_values(out_THC, w_uv_HVC), expected)


def test_pack_heads_leaves_shapes_that_the_cpu_operators_do_not_take() -> None:
    heads = LatentHeads(torch.zeros(2, 4, 10), torch.zeros(2, 4, 10), 1.0)
    assert pack_heads(heads) is heads
