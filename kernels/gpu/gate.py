"""The gate on a GPU: a matrix product, then one Triton kernel that chooses.

For few tokens the product is a Triton kernel too: the gate matrix, 1 MB in bfloat16, is cut into
blocks of experts and inputs, one for each multiprocessor, and the kernel that chooses adds up what
the blocks of inputs gave, in their order. The cut does not depend on the tokens, so neither do a
token's bits depend on the others there.

A logit and the id of its expert make one 64-bit integer whose order is that of the logits, lowest
id first among equals, so that one integer maximum finds both.

Shape legend: T tokens, D hidden, E logical experts, K experts per token, S blocks of inputs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ostro.kernels.gpu.dependent_launch import (
    await_inputs,
    await_previous,
    let_next_start,
    pdl_options,
)

_BLOCK_TOKENS = 4  # of the choice: one for each warp
_MAX_FEW_TOKENS = 32
_SIDE = 16  # experts and tokens of a block of the product: the least that tensor cores take
_BLOCK_D = 256  # so that 128 experts and 4,096 inputs are 128 blocks


def gate_triton(
    x_TD: torch.Tensor,
    gate_ED: torch.Tensor,
    num_chosen: int,
    scale: float = 1.0,
    num_live: torch.Tensor | None = None,
    always: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`ostro.kernels.gate.gate` by Triton; the same shapes and dtypes."""
    num_tokens, num_experts = len(x_TD), len(gate_ED)
    width = num_chosen + (always is not None)
    expert_TK = x_TD.new_empty(num_tokens, width, dtype=torch.int64)
    weight_TK = x_TD.new_empty(num_tokens, width, dtype=torch.float32)
    if num_tokens:
        is_few = num_tokens <= _MAX_FEW_TOKENS
        logits_STE = _partial_logits(x_TD, gate_ED) if is_few else _logits(x_TD, gate_ED)[None]
        _gate_kernel[(triton.cdiv(num_tokens, _BLOCK_TOKENS),)](
            logits_STE,
            num_live,
            expert_TK,
            weight_TK,
            num_tokens,
            num_experts,
            scale,
            K=num_chosen,
            S=len(logits_STE),
            ALWAYS=always,
            BLOCK_T=_BLOCK_TOKENS,
            BLOCK_E=triton.next_power_of_2(num_experts),
            BLOCK_K=triton.next_power_of_2(width),
            num_warps=4,
            **pdl_options(x_TD.device),
        )
    return expert_TK, weight_TK


def _logits(x_TD: torch.Tensor, gate_ED: torch.Tensor) -> torch.Tensor:
    if x_TD.is_cuda and x_TD.dtype == gate_ED.dtype != torch.float32:
        return torch.mm(x_TD, gate_ED.T, out_dtype=torch.float32)
    return torch.nn.functional.linear(x_TD.float(), gate_ED.float())


def _partial_logits(x_TD: torch.Tensor, gate_ED: torch.Tensor) -> torch.Tensor:
    """Logits of each block of inputs, to be added up: [S, T, E], float32."""
    (num_tokens, hidden), num_experts = x_TD.shape, len(gate_ED)
    num_blocks = triton.cdiv(hidden, _BLOCK_D)
    logits_STE = x_TD.new_empty(num_blocks, num_tokens, num_experts, dtype=torch.float32)
    grid = (triton.cdiv(num_experts, _SIDE), num_blocks, triton.cdiv(num_tokens, _SIDE))
    _partial_logits_kernel[grid](
        x_TD.contiguous(),
        gate_ED.contiguous(),
        logits_STE,
        num_tokens,
        num_experts,
        hidden,
        BLOCK_T=_SIDE,
        BLOCK_E=_SIDE,
        BLOCK_D=_BLOCK_D,
        num_warps=4,
        **pdl_options(x_TD.device),
    )
    return logits_STE


@triton.jit
def _partial_logits_kernel(
    x,
    gate,
    logits,
    T,
    E,
    D,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr = False,
):
    let_next_start(PDL)
    e = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    s = tl.program_id(1)
    d = s * BLOCK_D + tl.arange(0, BLOCK_D)
    t = (tl.program_id(2) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)  # as t * D wants it
    is_gate = (e < E)[:, None] & (d < D)[None, :]
    gate_ED = tl.load(gate + e[:, None] * D + d[None, :], mask=is_gate, other=0.0)
    await_previous(PDL)
    is_x = (t < T)[:, None] & (d < D)[None, :]
    x_TD = tl.load(x + t[:, None] * D + d[None, :], mask=is_x, other=0.0)
    if x.dtype.element_ty != gate.dtype.element_ty:
        gate_ED = gate_ED.to(tl.float32)
        x_TD = x_TD.to(tl.float32)
    logits_TE = tl.dot(x_TD, tl.trans(gate_ED), input_precision="ieee")
    place = (s * T + t)[:, None] * E + e[None, :]
    tl.store(logits + place, logits_TE, mask=(t < T)[:, None] & (e < E)[None, :])


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
    S: tl.constexpr,
    ALWAYS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr = False,
):
    await_inputs(PDL)
    t = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    e = tl.arange(0, BLOCK_E)
    k = tl.arange(0, BLOCK_K)
    is_logit = (t < T)[:, None] & (e < E)[None, :]
    value = tl.load(logits + t[:, None] * E + e[None, :], mask=is_logit, other=0.0)
    for s in tl.static_range(1, S):
        place = (s * T + t)[:, None] * E + e[None, :]
        value += tl.load(logits + place, mask=is_logit, other=0.0)
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
    width: tl.constexpr = K if ALWAYS is None else K + 1
    if ALWAYS is not None:
        chosen = tl.where((k == K)[None, :], ALWAYS, chosen)
        share = tl.where((k == K)[None, :], 1.0, share)
    if num_live is not None:
        is_live = (t < tl.load(num_live))[:, None]
        chosen = tl.where(is_live, chosen, -1)
        share = tl.where(is_live, share, 0.0)
    place = t[:, None] * width + k[None, :]
    is_chosen = (t < T)[:, None] & (k < width)[None, :]
    tl.store(expert + place, chosen.to(tl.int64), mask=is_chosen)
    tl.store(weight + place, share, mask=is_chosen)
