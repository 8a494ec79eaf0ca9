"""The gate on a GPU: a matrix product, then one Triton kernel that chooses.

A logit and the id of its expert make one 64-bit integer whose order is that of the logits, lowest
id first among equals, so that one integer maximum finds both.

Shape legend: T tokens, D hidden, E logical experts, K experts per token.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK_TOKENS = 4


def gate_triton(
    x_TD: torch.Tensor,
    gate_ED: torch.Tensor,
    num_chosen: int,
    scale: float = 1.0,
    num_live: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`ostro.kernels.gate.gate` by Triton; the same shapes and dtypes."""
    logits_TE = torch.nn.functional.linear(x_TD.float(), gate_ED)
    num_tokens, num_experts = logits_TE.shape
    expert_TK = logits_TE.new_empty(num_tokens, num_chosen, dtype=torch.int64)
    weight_TK = logits_TE.new_empty(num_tokens, num_chosen)
    if num_tokens:
        _gate_kernel[(triton.cdiv(num_tokens, _BLOCK_TOKENS),)](
            logits_TE,
            num_live,
            expert_TK,
            weight_TK,
            num_tokens,
            num_experts,
            scale,
            K=num_chosen,
            BLOCK_T=_BLOCK_TOKENS,
            BLOCK_E=triton.next_power_of_2(num_experts),
            BLOCK_K=triton.next_power_of_2(num_chosen),
            num_warps=4,
        )
    return expert_TK, weight_TK


@triton.jit
def _gate_kernel(
    logits,
    num_live,
    expert,
    weight,
    T,
    E,
    scale,
    K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    e = tl.arange(0, BLOCK_E)
    k = tl.arange(0, BLOCK_K)
    is_logit = (t < T)[:, None] & (e < E)[None, :]
    value = tl.load(logits + t.to(tl.int64)[:, None] * E + e[None, :], mask=is_logit, other=0.0)
    # A float's bits order as an unsigned integer once negatives are inverted and positives get the
    # top bit; minus zero becomes zero first, as they are equal.
    bits = (value + 0.0).to(tl.uint32, bitcast=True)
    ordered = tl.where((bits >> 31) != 0, bits ^ 0xFFFFFFFF, bits | 0x80000000)
    key = (ordered.to(tl.uint64) << 32) | (BLOCK_E - 1 - e).to(tl.uint64)[None, :]
    key = tl.where((e < E)[None, :], key, 0)
    chosen = tl.zeros((BLOCK_T, BLOCK_K), tl.int32)
    logit = tl.full((BLOCK_T, BLOCK_K), float("-inf"), tl.float32)
    for i in tl.static_range(K):
        best = tl.max(key, axis=1)
        key = tl.where(key == best[:, None], 0, key)
        id_ = (BLOCK_E - 1) - (best & 0xFFFFFFFF).to(tl.int32)
        high = (best >> 32).to(tl.uint32)
        back = tl.where((high >> 31) != 0, high & 0x7FFFFFFF, high ^ 0xFFFFFFFF)
        chosen = tl.where((k == i)[None, :], id_[:, None], chosen)
        logit = tl.where((k == i)[None, :], back.to(tl.float32, bitcast=True)[:, None], logit)
    power = tl.exp(logit - tl.max(logit, axis=1)[:, None])
    share = power / tl.sum(power, axis=1)[:, None] * scale
    if num_live is not None:
        is_live = (t < tl.load(num_live))[:, None]
        chosen = tl.where(is_live, chosen, -1)
        share = tl.where(is_live, share, 0.0)
    place = t.to(tl.int64)[:, None] * K + k[None, :]
    is_chosen = (t < T)[:, None] & (k < K)[None, :]
    tl.store(expert + place, chosen.to(tl.int64), mask=is_chosen)
    tl.store(weight + place, share, mask=is_chosen)
