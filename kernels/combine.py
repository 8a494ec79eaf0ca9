"""Combine: fold the rows that expert shards sent back into their tokens.

    out[t] = sum over shards, in rank order, of that shard's row for token t

Each shard has already weighted and summed its own experts, so it sends one row per token at most.
Sums are float32 and in a fixed order: the result does not depend on who answered first.

Shape legend: T tokens, D hidden, R rows of one shard (at most T), K experts per token, A = T * K
pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ostro.kernels.cpu import library
from ostro.kernels.rms_norm import rms_norm, rms_norm_reference


@dataclass(frozen=True, slots=True)
class PairRows:
    """What each token's experts gave, weighted and not added up yet.

    Attributes:
        rows_AD: Row t * K + k is from token t's k-th expert; not read where that is not here.
        expert_TK: int64 ids, by which they are added up, -1 where the k-th expert is not here.
    """

    rows_AD: torch.Tensor
    expert_TK: torch.Tensor


def sum_pairs(pairs: PairRows) -> torch.Tensor:
    """Add up each token's experts: out_TD in the rows' dtype, zeros for one without an expert.

    Example:
        rows [[1.], [2.], [nan], [4.]], experts [[3, 0], [-1, 1]] give [[3.], [4.]].
    """
    if pairs.rows_AD.is_cuda:
        from ostro.kernels.gpu.sum_pairs import sum_pairs_triton

        return sum_pairs_triton(pairs.rows_AD, pairs.expert_TK)
    return sum_pairs_reference(pairs)


def combine(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Sum dense parts: every shard sent one row per token (zeros where it had no expert).

    Args:
        parts: At least one [T, D] tensor of any float dtype, in rank order.

    Returns:
        out_TD float32; never one of `parts` itself.

    Example:
        parts [[1.]] and [[2.]] give [[3.]].
    """
    if parts[0].is_cuda:
        from ostro.kernels.gpu.combine import combine_triton

        return combine_triton(parts)
    out_TD = parts[0].to(torch.float32, copy=True)
    for part_TD in parts[1:]:
        out_TD += part_TD
    return out_TD


def combine_sparse(
    parts: Sequence[tuple[torch.Tensor, torch.Tensor]], num_tokens: int
) -> torch.Tensor:
    """Sum sparse parts: every shard sent rows for some of the tokens.

    Args:
        parts: (rows_RD, token_R int64) in rank order; no token twice within one part.
        num_tokens: T.

    Returns:
        out_TD float32; zeros for a token that no shard answered.

    Example:
        rows [[5.]] for token 1 and rows [[1.], [2.]] for tokens 0, 1 give [[1.], [7.]].
    """
    hidden = parts[0][0].shape[1]
    out_TD = torch.zeros(num_tokens, hidden, device=parts[0][0].device)
    for rows_RD, token_R in parts:
        out_TD.index_add_(0, token_R, rows_RD.float())
    return out_TD


def add_residual(
    sum_TD: torch.Tensor | PairRows, shared_TD: torch.Tensor | None, residual_TD: torch.Tensor
) -> torch.Tensor:
    """The layer's output: routed sum, shared expert and residual, added in float32, rounded once.

    Args:
        sum_TD: float32, or on a GPU any float dtype, or what is to be added up; may be changed.
        shared_TD: In the model's dtype; None where `sum_TD` has it.
        residual_TD: Likewise, always there.

    Returns:
        out_TD in the dtype of `residual_TD`.

    Example:
        sum [[1.]], shared [[2.]] and residual [[3.]] give [[6.]].
    """
    if residual_TD.is_cuda:
        from ostro.kernels.gpu.combine import add_residual_triton

        return add_residual_triton(sum_TD, shared_TD, residual_TD)
    sum_TD = _added_up(sum_TD)
    if shared_TD is not None and library.serves(residual_TD) and not sum_TD.shape[1] % 16:
        return add_residual_cpu(sum_TD, shared_TD, residual_TD)
    if shared_TD is not None:
        sum_TD += shared_TD
    sum_TD += residual_TD
    return sum_TD.to(residual_TD.dtype)


def _added_up(part: torch.Tensor | PairRows) -> torch.Tensor:
    return sum_pairs(part) if isinstance(part, PairRows) else part


def add_residual_cpu(
    sum_TD: torch.Tensor, shared_TD: torch.Tensor, residual_TD: torch.Tensor
) -> torch.Tensor:
    """`add_residual` by the CPU operators; D is a multiple of 16."""
    native = library.required()
    sum_TD, shared_TD = sum_TD.contiguous(), shared_TD.contiguous()
    residual_TD = residual_TD.contiguous()
    out_TD = torch.empty_like(residual_TD)
    native.ostro_add_rows(
        sum_TD.data_ptr(),
        shared_TD.data_ptr(),
        residual_TD.data_ptr(),
        out_TD.numel(),
        out_TD.data_ptr(),
        torch.get_num_threads(),
    )
    return out_TD


def combine_norm(
    parts: Sequence[torch.Tensor | PairRows],
    shared_TD: torch.Tensor | None,
    residual_TD: torch.Tensor,
    norm_D: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A residual with what is added to it, and its RMS norm, the input of what comes next.

    Args:
        parts: [T, D] tensors of any float dtype, in rank order; none where routed experts add
            nothing. One alone in float32 may be changed; the first may be of pairs.
        shared_TD: Added too, in the model's dtype; None where a part has it.
        residual_TD: Likewise, always there.
        norm_D: Weight of the norm, likewise.
        eps: Of the norm.

    Returns:
        out_TD as of `combine` and `add_residual`, and `rms_norm` of it; on a GPU one launch.

    Example:
        part [[1., 0.]], shared [[2., 0.]], residual [[0., 4.]], norm [1., 2.], eps 0 give
        [[3., 4.]] and [[0.8485, 2.2627]].
    """
    if residual_TD.is_cuda:
        from ostro.kernels.gpu.combine import combine_norm_triton

        return combine_norm_triton(parts, shared_TD, residual_TD, norm_D, eps)
    dense = [_added_up(part) for part in parts]
    if not dense:
        out_TD = residual_TD if shared_TD is None else residual_TD + shared_TD
    elif len(dense) == 1 and dense[0].dtype == torch.float32:
        out_TD = add_residual(dense[0], shared_TD, residual_TD)
    else:
        out_TD = add_residual(combine(dense), shared_TD, residual_TD)
    return out_TD, rms_norm(out_TD, norm_D, eps)


def combine_reference(
    parts: Sequence[tuple[torch.Tensor, torch.Tensor]], num_tokens: int
) -> torch.Tensor:
    """Meaning of both, row by row (a dense part has tokens 0 .. T-1)."""
    out_TD = torch.zeros(num_tokens, parts[0][0].shape[1], device=parts[0][0].device)
    for rows_RD, token_R in parts:
        for row_D, token in zip(rows_RD, token_R.tolist(), strict=True):
            out_TD[token] += row_D.float()
    return out_TD


def sum_pairs_reference(pairs: PairRows) -> torch.Tensor:
    """Meaning of `sum_pairs`: float32 sums by ascending id, rounded once."""
    expert_TK = pairs.expert_TK
    out_TD = torch.zeros(len(expert_TK), pairs.rows_AD.shape[1], device=pairs.rows_AD.device)
    for t, experts in enumerate(expert_TK.tolist()):
        for _, k in sorted((e, k) for k, e in enumerate(experts) if e >= 0):
            out_TD[t] += pairs.rows_AD[t * len(experts) + k].float()
    return out_TD.to(pairs.rows_AD.dtype)


def add_residual_reference(
    sum_TD: torch.Tensor | PairRows, shared_TD: torch.Tensor | None, residual_TD: torch.Tensor
) -> torch.Tensor:
    """Meaning of `add_residual`."""
    sum_TD = sum_pairs_reference(sum_TD) if isinstance(sum_TD, PairRows) else sum_TD
    if shared_TD is not None:
        sum_TD = sum_TD.float() + shared_TD.float()
    return (sum_TD.float() + residual_TD.float()).to(residual_TD.dtype)


def combine_norm_reference(
    parts: Sequence[torch.Tensor | PairRows],
    shared_TD: torch.Tensor | None,
    residual_TD: torch.Tensor,
    norm_D: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Meaning of `combine_norm`."""
    sum_TD = torch.zeros(residual_TD.shape, device=residual_TD.device)
    for part in parts:
        sum_TD += (sum_pairs_reference(part) if isinstance(part, PairRows) else part).float()
    out_TD = add_residual_reference(sum_TD, shared_TD, residual_TD)
    return out_TD, rms_norm_reference(out_TD, norm_D, eps)
