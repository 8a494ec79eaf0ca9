"""Multi-head latent attention of a chunk of one request's tokens over its whole context so far.

Two forms with equal results. Expanded: keys and values are rebuilt from the latents, head by head;
fewer FLOPs per (query, key) pair. Absorbed: queries move into the latent space, heads become rows;
nothing is rebuilt. `absorbed_is_cheaper` says which form costs less.

Keys come in blocks with an online softmax, expanded for a few heads at a time, so memory does not
grow with the context; a context of one block takes torch's fused attention instead. On a GPU the
expanded form is `kernels.gpu`'s.

Shape legend: T new tokens, L context (new tokens included), H heads, Q = N + P query width (N nope,
P rope), V value width, C latent, W = C + P, G groups with their own keys (H or 1), R query rows of
a group, S keys of a block.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from ostro.kernels.cpu import library
from ostro.kernels.latent_cache import row_values
from ostro.kernels.latent_heads import LatentHeads, absorb_queries, expand_values
from ostro.kernels.linear import linear

# Keys of a block, off the GPU.
_KEYS_AT_ONCE = 2048
# Heads whose keys and values of a block are rebuilt together: 8 MiB in bfloat16, which stays in
# the cache and comes from memory that is already mapped. Rebuilding all 32 at once takes two
# thirds longer.
_HEADS_AT_ONCE = 8
# Scores of one block product, at most: 64 MiB in float32.
_MAX_SCORES = 2**24

ExpandBlock = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def absorbed_is_cheaper(
    num_tokens: int, context_length: int, *, nope: int, rope: int, value: int, latent: int
) -> bool:
    """Whether a chunk takes fewer FLOPs absorbed than expanded (per head; both count projections).

    Example:
        with nope 64, rope 64, value 128, latent 256 and a long context: below 154 new tokens.
    """
    pairs = num_tokens * context_length
    absorbed = pairs * (2 * latent + rope) + num_tokens * latent * (nope + value)
    expanded = pairs * (nope + rope + value) + context_length * latent * (nope + value)
    return absorbed < expanded


def mla_prefill(
    q_THQ: torch.Tensor,
    cache_NSW: torch.Tensor,
    pages_n: torch.Tensor,
    start: int,
    heads: LatentHeads,
    *,
    absorbed: bool = False,
    block_size: int | None = None,
) -> torch.Tensor:
    """Attend tokens at positions [start, start + T) causally to positions [0, start + T).

    Args:
        q_THQ: Queries, nope part first, rope part turned, llama-4 scale applied.
        cache_NSW: One layer's pages, plain or of FP8 rows; the tokens' own are already written.
        pages_n: int64 pages of the request, at least as many as the context fills.
        start: Position of the first query within the request.
        heads: The layer's heads.
        absorbed: Form to compute in.
        block_size: Keys per block, off a GPU rounded down to whole pages; None means what suits the
            device.

    Returns:
        out_THV in the dtype of `q_THQ`.

    Example:
        the first token of a request gets Wuv[h] latent, whatever its query.
    """
    if q_THQ.is_cuda and not absorbed:
        from ostro.kernels.gpu import mla_prefill as gpu

        return gpu.mla_prefill_triton(
            q_THQ, cache_NSW, pages_n, start, heads, block_size=block_size or gpu.KEYS_AT_ONCE
        )
    page_size = cache_NSW.shape[1]
    block_pages = max((block_size or _KEYS_AT_ONCE) // page_size, 1)
    context_length = start + q_THQ.shape[0]
    blocks = _LatentBlocks(cache_NSW, pages_n, context_length, block_pages * page_size, heads)
    if not absorbed and heads.packed is None and context_length <= blocks.starts.step:
        latent_LW = blocks.read(0)
        return _attend_once(q_THQ, latent_LW, start, heads)
    if absorbed:
        return _attend_absorbed(q_THQ, blocks, start, heads)
    return _attend_expanded(q_THQ, blocks, start, heads)


def mla_prefill_reference(
    q_THQ: torch.Tensor,
    latent_LW: torch.Tensor,
    heads: LatentHeads,
) -> torch.Tensor:
    """Meaning of `mla_prefill` in float32; `latent_LW` is the context in order, chunk last."""
    num_tokens, _, _ = q_THQ.shape
    wide = LatentHeads(heads.w_uk_HNC.float(), heads.w_uv_HVC.float(), heads.scale)
    key_LHQ, value_LHV = _expand(latent_LW.float(), wide)
    score_HTL = torch.einsum("thq,lhq->htl", q_THQ.float(), key_LHQ) * heads.scale
    context = torch.arange(latent_LW.shape[0], device=q_THQ.device)
    hidden_TL = context[None] > context[-num_tokens:, None]
    weight_HTL = torch.softmax(score_HTL.masked_fill(hidden_TL, -torch.inf), dim=-1)
    return torch.einsum("htl,lhv->thv", weight_HTL, value_LHV).to(q_THQ.dtype)


class _LatentBlocks:
    """Cached rows of one request, block by block in order; FP8 ones in the dtype of the heads."""

    def __init__(
        self,
        cache_NSW: torch.Tensor,
        pages_n: torch.Tensor,
        context_length: int,
        block_size: int,
        heads: LatentHeads,
    ) -> None:
        self._cache_NSW = cache_NSW
        self._pages_n = pages_n
        self._latent_width = heads.w_uk_HNC.shape[2]
        self._dtype = heads.w_uk_HNC.dtype
        self.starts = range(0, context_length, block_size)
        self.context_length = context_length

    def read(self, start: int) -> torch.Tensor:
        """Rows of the block of positions from `start` on, [S, C + P]."""
        stop = min(start + self.starts.step, self.context_length)
        page_size = self._cache_NSW.shape[1]
        pages_n = self._pages_n[start // page_size : -(-stop // page_size)]
        rows_SW = self._cache_NSW.index_select(0, pages_n).flatten(0, 1)[: stop - start]
        return row_values(rows_SW, self._latent_width, self._dtype)


def _expand(latent_SW: torch.Tensor, heads: LatentHeads) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys [S, H, Q] and values [S, H, V] of cached rows."""
    num_heads, nope, latent_width = heads.w_uk_HNC.shape
    latent_SC, rope_SP = latent_SW.split([latent_width, latent_SW.shape[1] - latent_width], dim=1)
    if heads.packed is None:
        nope_SX = latent_SC @ heads.w_uk_HNC.flatten(0, 1).T
        value_SX = latent_SC @ heads.w_uv_HVC.flatten(0, 1).T
    else:
        nope_SX = linear(latent_SC, heads.packed.keys_H.flatten(0, 1))
        value_SX = linear(latent_SC, heads.packed.values_H.flatten(0, 1))
    key_SHQ = latent_SW.new_empty(latent_SW.shape[0], num_heads, nope + rope_SP.shape[1])
    key_SHQ[..., :nope] = nope_SX.view(-1, num_heads, nope)
    key_SHQ[..., nope:] = rope_SP[:, None]
    return key_SHQ, value_SX.unflatten(1, (num_heads, -1))


def _attend_once(
    q_THQ: torch.Tensor,
    latent_LW: torch.Tensor,
    start: int,
    heads: LatentHeads,
) -> torch.Tensor:
    key_LHQ, value_LHV = _expand(latent_LW, heads)
    mask_TL = None
    if start:
        seen = torch.ones(q_THQ.shape[0], latent_LW.shape[0], dtype=torch.bool, device=q_THQ.device)
        mask_TL = seen.tril_(start)
    out_1HTV = torch.nn.functional.scaled_dot_product_attention(
        q_THQ.transpose(0, 1)[None],
        key_LHQ.transpose(0, 1)[None],
        value_LHV.transpose(0, 1)[None],
        attn_mask=mask_TL,
        is_causal=mask_TL is None,
        scale=heads.scale,
    )
    return out_1HTV[0].transpose(0, 1)


def _attend_expanded(
    q_THQ: torch.Tensor,
    blocks: _LatentBlocks,
    start: int,
    heads: LatentHeads,
) -> torch.Tensor:
    num_tokens, num_heads, _ = q_THQ.shape
    value_width = heads.w_uv_HVC.shape[1]
    out_THV = q_THQ.new_empty(num_tokens, num_heads, value_width)
    for first in range(0, num_heads, _HEADS_AT_ONCE):
        some = slice(first, first + _HEADS_AT_ONCE)
        expand = partial(_expand_groups, heads=heads.some(some))
        q_GRQ = q_THQ[:, some].transpose(0, 1)
        softmax = _OnlineSoftmax(q_GRQ, num_tokens, start, value_width, heads.scale)
        out_THV[:, some] = softmax.attend(blocks, expand).transpose(0, 1)
    return out_THV


def _expand_groups(
    latent_SW: torch.Tensor, heads: LatentHeads
) -> tuple[torch.Tensor, torch.Tensor]:
    key_SHQ, value_SHV = _expand(latent_SW, heads)
    return key_SHQ.transpose(0, 1), value_SHV.transpose(0, 1)


def _attend_absorbed(
    q_THQ: torch.Tensor,
    blocks: _LatentBlocks,
    start: int,
    heads: LatentHeads,
) -> torch.Tensor:
    num_tokens, num_heads, _ = q_THQ.shape
    latent_width = heads.w_uk_HNC.shape[2]

    def expand(latent_SW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return latent_SW[None], latent_SW[None, :, :latent_width]

    q_1RW = absorb_queries(q_THQ, heads.w_uk_HNC).flatten(0, 1)[None]
    softmax = _OnlineSoftmax(q_1RW, num_tokens, start, latent_width, heads.scale)
    out_THC = softmax.attend(blocks, expand).view(num_tokens, num_heads, latent_width)
    return expand_values(out_THC, heads.w_uv_HVC)


def _is_served(q_GRQ: torch.Tensor, values_GRV: torch.Tensor) -> bool:
    """Whether the CPU operators take these queries and values."""
    is_whole = q_GRQ.shape[2] % 2 == 0 and values_GRV.shape[2] % 16 == 0
    return library.serves(q_GRQ) and is_whole and q_GRQ.stride(2) == 1


class _OnlineSoftmax:
    """Attention of query rows over key blocks that arrive in order of position.

    A group's rows go by token, as many rows to each. Per row this keeps the largest score, the sum
    of exp(score - largest) and the values weighted alike, in float32, and rescales them when a
    larger score arrives.
    """

    def __init__(
        self, q_GRQ: torch.Tensor, num_tokens: int, start: int, value_width: int, scale: float
    ) -> None:
        self._q_GRQ = q_GRQ
        self._start = start
        self._rows_per_token = q_GRQ.shape[1] // num_tokens
        positions_T = torch.arange(start, start + num_tokens, device=q_GRQ.device)
        self._positions_R = positions_T.repeat_interleave(self._rows_per_token)
        self._scale = scale
        rows = q_GRQ.shape[:2]
        self._largest_GR1 = torch.full((*rows, 1), -torch.inf, device=q_GRQ.device)
        self._sum_GR1 = torch.zeros(*rows, 1, device=q_GRQ.device)
        self._values_GRV = torch.zeros(*rows, value_width, device=q_GRQ.device)

    def attend(self, blocks: _LatentBlocks, expand: ExpandBlock) -> torch.Tensor:
        """Fold in every block; out [G, R, V] in the dtype of the queries."""
        if _is_served(self._q_GRQ, self._values_GRV):
            return self._attend_cpu(blocks, expand)
        groups, num_rows, _ = self._q_GRQ.shape
        rows_at_once = max(_MAX_SCORES // (groups * blocks.starts.step), 1)
        for block_start in blocks.starts:
            key_GSQ, value_GSV = expand(blocks.read(block_start))
            positions_S = torch.arange(
                block_start, block_start + key_GSQ.shape[1], device=key_GSQ.device
            )
            is_all_seen = block_start + key_GSQ.shape[1] <= self._start + 1
            for row in range(0, num_rows, rows_at_once):
                rows = slice(row, row + rows_at_once)
                hidden_RS = None
                if not is_all_seen:
                    hidden_RS = positions_S > self._positions_R[rows, None]
                self._fold(rows, key_GSQ, value_GSV, hidden_RS)
        return (self._values_GRV / self._sum_GR1).to(self._q_GRQ.dtype)

    def _attend_cpu(self, blocks: _LatentBlocks, expand: ExpandBlock) -> torch.Tensor:
        native, q_GRQ = library.required(), self._q_GRQ
        groups, num_rows, width = q_GRQ.shape
        out_RGV = q_GRQ.new_empty(num_rows, groups, self._values_GRV.shape[2])
        for block_start in blocks.starts:
            key_GSQ, value_GSV = expand(blocks.read(block_start))
            is_last = block_start + key_GSQ.shape[1] == blocks.context_length
            native.ostro_attend_block(
                q_GRQ.data_ptr(),
                q_GRQ.stride(1),
                q_GRQ.stride(0),
                key_GSQ.data_ptr(),
                key_GSQ.stride(1),
                key_GSQ.stride(0),
                value_GSV.data_ptr(),
                value_GSV.stride(1),
                value_GSV.stride(0),
                groups,
                num_rows,
                self._rows_per_token,
                key_GSQ.shape[1],
                width,
                out_RGV.shape[2],
                self._start,
                block_start,
                self._scale,
                self._largest_GR1.data_ptr(),
                self._sum_GR1.data_ptr(),
                self._values_GRV.data_ptr(),
                out_RGV.data_ptr() if is_last else None,
                torch.get_num_threads(),
            )
        return out_RGV.transpose(0, 1)

    def _fold(
        self,
        rows: slice,
        key_GSQ: torch.Tensor,
        value_GSV: torch.Tensor,
        hidden_RS: torch.Tensor | None,
    ) -> None:
        score_GRS = torch.bmm(self._q_GRQ[:, rows], key_GSQ.transpose(1, 2)).float()
        score_GRS.mul_(self._scale)
        if hidden_RS is not None:
            score_GRS.masked_fill_(hidden_RS, -torch.inf)
        old_GR1 = self._largest_GR1[:, rows]
        # The first block holds position 0, which every row sees: `new_GR1` is finite from there on.
        new_GR1 = torch.maximum(old_GR1, score_GRS.amax(-1, keepdim=True))
        decay_GR1 = torch.exp(old_GR1 - new_GR1)
        weight_GRS = score_GRS.sub_(new_GR1).exp_()
        self._sum_GR1[:, rows].mul_(decay_GR1).add_(weight_GRS.sum(-1, keepdim=True))
        folded_GRV = torch.bmm(weight_GRS.to(value_GSV.dtype), value_GSV).float()
        self._values_GRV[:, rows].mul_(decay_GR1).add_(folded_GRV)
        self._largest_GR1[:, rows] = new_GR1
