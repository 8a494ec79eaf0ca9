"""Multi-head latent attention of a chunk, expanded: block by block of keys, rebuilt, then attended.

    out[t, h] = sum over s <= t of softmax(q[t, h] . key[s, h] * scale) value[s, h]

The attention to a block takes up the result of the blocks before it, so memory does not grow with
the context. A program holds 64 queries of one head; keys and values come as boxes (TMA), with an
online softmax in base 2. Keys that all of its queries see take a loop without a mask.

Shape legend: T queries (new tokens), S keys of a block, H heads, Q query width, V value width,
C latent, P rope, W = C + P, n pages of the request.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from ostro.kernels.gpu.expand_latents import expand_latents_triton
from ostro.kernels.latent_heads import LatentHeads

# 256 MiB of keys and values in Mistral Small 4's sizes; the float32 result that travels between
# blocks of 16K keys costs under 2% of their attention.
KEYS_AT_ONCE = 16384
_LOG2_E = tl.constexpr(math.log2(math.e))
_NO_KEY = tl.constexpr(-1e30)  # largest score before any key; finite, so that differences are too

# A result with the log of its softmax's denominator: out_THV, float32 lse_HT.
Attended = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillTile:
    """How the attention is cut and launched.

    Attributes:
        block_queries: Queries of one head that a program holds.
        block_keys: Keys per step.
        num_warps: Per program; four hold 64 rows of a Hopper matrix product.
        num_stages: Steps whose loads are under way.
    """

    block_queries: int
    block_keys: int
    num_warps: int
    num_stages: int


# For chunks of at least so many queries, the largest first, as an H200 found them. Two programs
# share a processor, and one multiplies while the other is at its softmax.
_TILES = (
    (512, PrefillTile(block_queries=64, block_keys=64, num_warps=4, num_stages=3)),
    (0, PrefillTile(block_queries=64, block_keys=128, num_warps=4, num_stages=3)),
)
# Float32 is multiplied without tensor cores, from registers; larger tiles spill the more.
_FLOAT32_TILE = PrefillTile(block_queries=16, block_keys=16, num_warps=4, num_stages=1)


def prefill_tile(num_queries: int, dtype: torch.dtype) -> PrefillTile:
    """The tile of a chunk; small chunks, with few programs, take more keys at once.

    Example:
        8192 queries in bfloat16 meet 64 keys at a time, 256 queries 128.
    """
    if dtype == torch.float32:
        return _FLOAT32_TILE
    return next(tile for at_least, tile in _TILES if num_queries >= at_least)


def mla_prefill_triton(
    q_THQ: torch.Tensor,
    cache_NSW: torch.Tensor,
    pages_n: torch.Tensor,
    start: int,
    heads: LatentHeads,
    *,
    block_size: int = KEYS_AT_ONCE,
) -> torch.Tensor:
    """`mla_prefill`, expanded, on a GPU.

    Args:
        q_THQ: As there; at least one query.
        cache_NSW: As there, contiguous.
        pages_n: As there.
        start: As there.
        heads: As there.
        block_size: Keys of a block, at least one.

    Returns:
        out_THV in the dtype of `q_THQ`.
    """
    context_length = start + len(q_THQ)
    last = (context_length - 1) // block_size * block_size
    earlier = None
    for first in range(0, last, block_size):
        # No name holds keys and values, so that they are free before the next ones come.
        earlier = attend_triton(
            q_THQ,
            *expand_latents_triton(cache_NSW, pages_n, first, first + block_size, heads),
            start - first,
            heads.scale,
            earlier=earlier,
            out_dtype=torch.float32,
        )
    key_SHQ, value_SHV = expand_latents_triton(cache_NSW, pages_n, last, context_length, heads)
    return attend_triton(q_THQ, key_SHQ, value_SHV, start - last, heads.scale, earlier=earlier)[0]


def attend_triton(
    q_THQ: torch.Tensor,
    key_SHQ: torch.Tensor,
    value_SHV: torch.Tensor,
    first_query: int,
    scale: float,
    *,
    earlier: Attended | None = None,
    out_dtype: torch.dtype | None = None,
    tile: PrefillTile | None = None,
) -> Attended:
    """Causal attention of queries to one block of keys, and to the blocks before it.

    Query t sees the keys s <= first_query + t.

    Args:
        q_THQ: Queries; at least one.
        key_SHQ: Keys in order of position, contiguous; at least one.
        value_SHV: Values, contiguous.
        first_query: Position of the first query less that of the first key; may be negative.
        scale: Softmax scale, positive.
        earlier: What this gave for other keys, its out in float32; these keys are added to it.
        out_dtype: Of the result; None means that of the queries.
        tile: None means `prefill_tile`.

    Returns:
        out_THV and the natural log of the softmax's denominator, lse_HT; 0 and -inf for a query
        that has seen no key.

    Raises:
        ValueError: Q or V values do not fill 16-byte steps.

    Example:
        one head, q [[0.], [0.]], keys [[1.], [1.]], values [[2.], [4.]], first_query 0: out
        [[2.], [3.]], lse [[0., log 2]].
    """
    num_queries, num_heads, query_width = q_THQ.shape
    num_keys, _, value_width = value_SHV.shape
    cut = tile or prefill_tile(num_queries, q_THQ.dtype)
    block_q = _block_width(query_width)
    block_v = _block_width(value_width)
    out_THV = q_THQ.new_empty(num_queries, num_heads, value_width, dtype=out_dtype or q_THQ.dtype)
    lse_HT = q_THQ.new_empty(num_heads, num_queries, dtype=torch.float32)
    earlier_out_THV, earlier_lse_HT = earlier or (None, None)
    _attend_block_kernel[(triton.cdiv(num_queries, cut.block_queries), num_heads)](
        q_THQ.contiguous(),
        _boxes(key_SHQ, cut.block_keys, block_q),
        _boxes(value_SHV, cut.block_keys, block_v),
        earlier_out_THV,
        earlier_lse_HT,
        out_THV,
        lse_HT,
        num_queries,
        num_keys,
        first_query,
        scale,
        H=num_heads,
        Q=query_width,
        V=value_width,
        BLOCK_T=cut.block_queries,
        BLOCK_S=cut.block_keys,
        BLOCK_Q=block_q,
        BLOCK_V=block_v,
        STAGES=cut.num_stages,
        num_warps=cut.num_warps,
        num_stages=cut.num_stages,
    )
    return out_THV, lse_HT


def attend_reference(
    q_THQ: torch.Tensor,
    key_SHQ: torch.Tensor,
    value_SHV: torch.Tensor,
    first_query: int,
    scale: float,
    *,
    earlier: Attended | None = None,
    out_dtype: torch.dtype | None = None,
) -> Attended:
    """Meaning of `attend_triton`, in float32."""
    score_HTS = torch.einsum("thq,shq->hts", q_THQ.float(), key_SHQ.float()) * scale
    seen_TS = torch.ones(score_HTS.shape[1:], dtype=torch.bool, device=q_THQ.device)
    score_HTS = score_HTS.masked_fill(~seen_TS.tril(first_query), -torch.inf)
    lse_HT = score_HTS.logsumexp(-1)
    out_THV = torch.einsum(
        "hts,shv->thv", (score_HTS - lse_HT[..., None]).exp().nan_to_num(0.0), value_SHV.float()
    )
    if earlier is not None:
        both_HT = torch.logaddexp(lse_HT, earlier[1])
        share_TH1 = (lse_HT - both_HT).exp().nan_to_num(0.0).T[..., None]
        earlier_share_TH1 = (earlier[1] - both_HT).exp().nan_to_num(0.0).T[..., None]
        out_THV = out_THV * share_TH1 + earlier[0] * earlier_share_TH1
        lse_HT = both_HT
    return out_THV.to(out_dtype or q_THQ.dtype), lse_HT


def _block_width(width: int) -> int:
    return max(16, int(triton.next_power_of_2(width)))  # `tl.dot` takes no less


def _boxes(rows_SHX: torch.Tensor, rows: int, columns: int) -> TensorDescriptor:
    """Of one head each; the rows past the last read as zeros."""
    size = rows_SHX.element_size()
    if rows_SHX.shape[2] * size % 16:
        raise ValueError(
            f"heads of {rows_SHX.shape[2]} x {size} bytes do not fill 16-byte steps; "
            f"pad them to a multiple of {16 // size}"
        )
    return TensorDescriptor.from_tensor(rows_SHX.flatten(1), [rows, columns])


@triton.jit
def _folded(scores, values, largest, total, sum_TV, scale_log2):
    """Online softmax: one step's scores and values taken into a tile's running ones."""
    new = tl.maximum(largest, tl.max(scores, 1) * scale_log2)
    weight = tl.exp2(scores * scale_log2 - new[:, None])
    decay = tl.exp2(largest - new)
    total = total * decay + tl.sum(weight, 1)
    sum_TV = tl.dot(
        weight.to(values.dtype), values, sum_TV * decay[:, None], input_precision="ieee"
    )
    return new, total, sum_TV


@triton.jit(do_not_specialize=["num_queries", "num_keys", "first_query"])
def _attend_block_kernel(
    q,
    keys,
    values,
    earlier_out,
    earlier_lse,
    out,
    lse,
    num_queries,
    num_keys,
    first_query,
    scale,
    H: tl.constexpr,
    Q: tl.constexpr,
    V: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_V: tl.constexpr,
    STAGES: tl.constexpr,
):
    h = tl.program_id(1)
    # The last queries see the most keys: they start first, and short programs fill the end.
    start_t = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_T
    t = start_t + tl.arange(0, BLOCK_T)
    is_query = t < num_queries
    row = t.to(tl.int64) * H + h
    i = tl.arange(0, BLOCK_Q)
    v = tl.arange(0, BLOCK_V)
    is_out = is_query[:, None] & (v < V)[None, :]
    q_TQ = tl.load(
        q + row[:, None] * Q + i[None, :], mask=is_query[:, None] & (i < Q)[None, :], other=0.0
    )
    # Without a key: total 1 and sum 0, which the first key's decay of 0 takes away.
    total = tl.full((BLOCK_T,), 1.0, tl.float32)
    if earlier_out is None:
        largest = tl.full((BLOCK_T,), _NO_KEY, tl.float32)
        sum_TV = tl.zeros((BLOCK_T, BLOCK_V), tl.float32)
    else:
        earlier = tl.load(earlier_lse + h * num_queries + t, mask=is_query, other=0.0)
        largest = tl.maximum(earlier * _LOG2_E, _NO_KEY)
        sum_TV = tl.load(earlier_out + row[:, None] * V + v[None, :], mask=is_out, other=0.0)

    scale_log2 = scale * _LOG2_E
    position = first_query + t
    num_seen_by_all = tl.minimum(tl.maximum(first_query + start_t + 1, 0), num_keys)
    num_unmasked = num_seen_by_all // BLOCK_S * BLOCK_S
    num_seen = tl.minimum(first_query + start_t + BLOCK_T, num_keys)
    for s in tl.range(0, num_unmasked, BLOCK_S, num_stages=STAGES):
        key_SQ = keys.load([s, h * Q])
        if BLOCK_Q != Q:  # beside it lies the next head's
            key_SQ = tl.where((i < Q)[None, :], key_SQ, 0.0)
        scores = tl.dot(q_TQ, key_SQ.T, input_precision="ieee")
        largest, total, sum_TV = _folded(
            scores, values.load([s, h * V]), largest, total, sum_TV, scale_log2
        )
    for s in tl.range(num_unmasked, num_seen, BLOCK_S, num_stages=STAGES):
        key_SQ = keys.load([s, h * Q])
        if BLOCK_Q != Q:
            key_SQ = tl.where((i < Q)[None, :], key_SQ, 0.0)
        scores = tl.dot(q_TQ, key_SQ.T, input_precision="ieee")
        place = s + tl.arange(0, BLOCK_S)
        is_seen = (place[None, :] <= position[:, None]) & (place < num_keys)[None, :]
        scores = tl.where(is_seen, scores, float("-inf"))
        largest, total, sum_TV = _folded(
            scores, values.load([s, h * V]), largest, total, sum_TV, scale_log2
        )
    found = (sum_TV / total[:, None]).to(out.dtype.element_ty)
    tl.store(out + row[:, None] * V + v[None, :], found, mask=is_out)
    log_total = tl.where(largest > _NO_KEY, (largest + tl.log2(total)) / _LOG2_E, float("-inf"))
    tl.store(lse + h * num_queries + t, log_total, mask=is_query)
