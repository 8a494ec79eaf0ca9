"""The gate: which K experts a token goes to, and with what weight.

    logits = x Wg^T;  the K largest (lowest id wins ties);  weights = softmax over those K * scale

This equals a softmax over all experts, renormalised over the chosen ones. All in float32. An expert
that every token goes to, as the shared one, can be put behind them with weight 1.

Shape legend: T tokens, D hidden, E logical experts, K experts per token.
"""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from ostro.kernels.cpu import library
from ostro.kernels.linear import is_packed, linear_cpu, pack_linear

# Stable sort of 128 logits beats K passes of max up to about this many tokens (34 against 41 us at
# 32 tokens, 9.3 against 1.3 ms at 2048, one core).
_MAX_SORTED_TOKENS = 32


def gate(
    x_TD: torch.Tensor,
    gate_ED: torch.Tensor,
    num_chosen: int,
    scale: float = 1.0,
    num_live: torch.Tensor | None = None,
    always: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose `num_chosen` experts a token.

    Args:
        x_TD: Any float dtype.
        gate_ED: Gate matrix, float32, or what `pack_gate` made of it.
        num_chosen: K.
        scale: Factor on the weights, the model's routed scaling factor.
        num_live: int32 [1] on the same device; tokens from there on are padding. None is T.
        always: Id of an expert that every token goes to besides; it has no logit.

    Returns:
        expert_TK int64, most likely first, and weight_TK float32, which sums to `scale` per token;
        with `always` one column more, of that id and 1. -1 and 0 for padding.

    Example:
        logits [[0., 2., 2., 1.]], K 2 give experts [[1, 2]] and weights [[0.5, 0.5]]; with always 4
        [[1, 2, 4]] and [[0.5, 0.5, 1.]].
    """
    if x_TD.is_cuda:
        from ostro.kernels.gpu.gate import gate_triton

        return gate_triton(x_TD, gate_ED, num_chosen, scale, num_live, always)
    if is_packed(gate_ED):
        expert_TK, weight_TK = gate_cpu(x_TD, gate_ED, num_chosen, scale)
    else:
        logits_TE = torch.nn.functional.linear(x_TD.float(), gate_ED)
        expert_TK, weight_TK = _choose(logits_TE, num_chosen, scale)
    expert_TK, weight_TK = _append(expert_TK, weight_TK, always)
    if num_live is not None:
        expert_TK[int(num_live) :] = -1
        weight_TK[int(num_live) :] = 0.0
    return expert_TK, weight_TK


def pack_gate(gate_ED: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The gate matrix in `dtype`, packed on CPU, if rows meet it faster so and it loses nothing.

    Products of bfloat16 values are exact in float32, so a gate that the checkpoint keeps in
    bfloat16 gives the same logits.
    """
    narrow_ED = gate_ED.to(dtype)
    if not torch.equal(narrow_ED.float(), gate_ED):
        return gate_ED
    if gate_ED.is_cuda:
        return narrow_ED
    packed = pack_linear(narrow_ED)
    return packed if is_packed(packed) else gate_ED


def gate_cpu(
    x_TD: torch.Tensor, packed: torch.Tensor, num_chosen: int, scale: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """`gate` by the CPU operators."""
    logits_TE = linear_cpu(x_TD, packed, torch.float32)
    num_rows, num_experts = logits_TE.shape
    expert_TK = torch.empty(num_rows, num_chosen, dtype=torch.int64)
    weight_TK = torch.empty(num_rows, num_chosen)
    library.required().ostro_choose(
        logits_TE.data_ptr(),
        num_rows,
        num_experts,
        num_chosen,
        scale,
        expert_TK.data_ptr(),
        weight_TK.data_ptr(),
        torch.get_num_threads(),
    )
    return expert_TK, weight_TK


def gate_reference(
    x_TD: torch.Tensor,
    gate_ED: torch.Tensor,
    num_chosen: int,
    scale: float = 1.0,
    always: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Meaning of `gate`: softmax over all experts, take the best, renormalise."""
    probs_TE = torch.softmax(x_TD.float() @ gate_ED.float().T, dim=-1)
    best_TE, order_TE = torch.sort(probs_TE, dim=-1, descending=True, stable=True)
    best_TK = best_TE[:, :num_chosen]
    weight_TK = best_TK / best_TK.sum(-1, keepdim=True) * scale
    return _append(order_TE[:, :num_chosen], weight_TK, always)


def _append(
    expert_TK: torch.Tensor, weight_TK: torch.Tensor, always: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    if always is None:
        return expert_TK, weight_TK
    return pad(expert_TK, (0, 1), value=always), pad(weight_TK, (0, 1), value=1.0)


def _choose(
    logits_TE: torch.Tensor, num_chosen: int, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    if logits_TE.shape[0] <= _MAX_SORTED_TOKENS:
        sorted_TE, order_TE = torch.sort(logits_TE, dim=-1, descending=True, stable=True)
        best_TK, expert_TK = sorted_TE[:, :num_chosen], order_TE[:, :num_chosen].contiguous()
    else:
        best_TK, expert_TK = _largest_by_passes(logits_TE, num_chosen)
    weight_TK = torch.softmax(best_TK, dim=-1)
    return expert_TK, weight_TK if scale == 1.0 else weight_TK * scale


def _largest_by_passes(
    logits_TE: torch.Tensor, num_chosen: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """K largest of each row by K passes of max, the first of equals; eats `logits_TE`."""
    best, experts = [], []
    for _ in range(num_chosen):
        best_T, expert_T = logits_TE.max(dim=-1)
        best.append(best_T)
        experts.append(expert_T)
        logits_TE.scatter_(1, expert_T[:, None], -torch.inf)
    return torch.stack(best, dim=1), torch.stack(experts, dim=1)
