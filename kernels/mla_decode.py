"""Multi-head latent attention of single new tokens, absorbed: keys and values stay latents.

    q_latent[h] = q_nope[h] Wuk[h];   s = (q_latent . latent + q_rope . rope_key) * scale
    out[h] = (softmax(s) latent) Wuv[h]^T

All heads of a request share its keys, so they are the rows of one matrix product. Contexts are
ragged: requests are grouped into buckets whose page counts lie within a factor of two, and each
bucket gathers its pages once. Widths are rounded to few values, as oneDNN compiles a kernel for
every new shape (0.8 ms, against 0.04 ms to run it). Scores are in the model's dtype, the softmax
in float32.

On a GPU the contexts are cut into chunks that programs attend by themselves (`gpu/mla_decode.py`).
On CPU in bfloat16 the CPU operators read the pages where they are, in parts that are joined at the
end, and nothing is gathered or masked. FP8 rows (`latent_cache`) they do not take: those are
gathered and converted, in 15 to 20 times the time.

Shape legend: T queries (one per request), B queries of a bucket, H heads, Q = N + P query width (N
nope, P rope), V value width, C latent, W = C + P, S places gathered per request of a bucket.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch

from ostro.kernels.cpu import library
from ostro.kernels.latent_cache import row_values
from ostro.kernels.latent_heads import (
    LatentHeads,
    PackedHeads,
    absorb_queries,
    expand_values,
    turn_queries_,
)

if TYPE_CHECKING:
    from ostro.kernels.gpu.decode_chunks import DecodeChunks

# Places that one bucket may gather: at 320 values of bf16 this is 80 MiB of latents.
_MAX_GATHERED = 2**17


@dataclass(frozen=True, slots=True)
class DecodeBucket:
    """Queries of similar context length, ready to be attended together; the same for every layer.

    Attributes:
        queries_B: int64 rows of the query tensor; None means all of them, in order.
        pages_G: int64 pages to gather, request after request, the same number for each.
        num_queries: B.
        bias_B1S: float32, 0 or -inf beyond a query's context; None where nothing is masked.
        stale_G: Gathered rows beyond a query's context. They are zeroed, because what an earlier
            owner of the page left there may be NaN, and 0 * NaN would reach the output.
    """

    queries_B: torch.Tensor | None
    pages_G: torch.Tensor
    num_queries: int
    bias_B1S: torch.Tensor | None
    stale_G: torch.Tensor | None


@dataclass(slots=True)
class DecodePlan:
    """Single queries and where their contexts are; made once per step, the same for every layer.

    Attributes:
        page_tables: Pages of each query's request; may hold more than the context needs. From
            arrays of C ints they are taken ten times as fast as from lists.
        context_lengths: Keys that each query sees, itself included; at least 1.
        page_size: Places per page.
        device: Where the plan's tensors go.
    """

    page_tables: Sequence[Sequence[int]]
    context_lengths: Sequence[int]
    page_size: int
    device: torch.device
    _buckets: list[DecodeBucket] | None = field(default=None, init=False)
    _ragged: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = field(
        default=None, init=False
    )
    _chunks: DecodeChunks | None = field(default=None, init=False)

    @classmethod
    def of_chunks(cls, chunks: DecodeChunks, page_size: int) -> DecodePlan:
        """A plan whose lengths are known on the GPU alone, for a graph that is run again."""
        plan = cls([], [], page_size, chunks.chunk_X4.device)
        plan._chunks = chunks
        return plan

    def with_chunks(self, chunks: DecodeChunks) -> DecodePlan:
        """The same plan on the device to which its chunks were taken."""
        plan = DecodePlan(
            self.page_tables, self.context_lengths, self.page_size, chunks.chunk_X4.device
        )
        plan._chunks = chunks
        return plan

    def buckets(self) -> list[DecodeBucket]:
        """Queries by the power of two above their page count.

        Raises:
            ValueError: The plan is one of chunks, which knows no lengths.
        """
        if self._buckets is None:
            self._need_lengths()
            self._buckets = self._plan_buckets()
        return self._buckets

    def _plan_buckets(self) -> list[DecodeBucket]:
        page_size = self.page_size
        num_pages = [-(-length // page_size) for length in self.context_lengths]
        by_size: dict[int, list[int]] = {}
        for query, count in enumerate(num_pages):
            by_size.setdefault((count - 1).bit_length(), []).append(query)
        buckets = []
        for size in sorted(by_size):
            queries = by_size[size]
            most_pages = max(num_pages[query] for query in queries)
            step = max(_MAX_GATHERED // (most_pages * page_size), 1)
            for first in range(0, len(queries), step):
                part = queries[first : first + step]
                buckets.append(
                    _make_bucket(
                        part, self.page_tables, self.context_lengths, page_size, self.device
                    )
                )
        return buckets

    def ragged(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(pages of all queries on end, where each query's begin, context lengths), int64.

        Raises:
            ValueError: As `buckets`.
        """
        if self._ragged is None:
            self._need_lengths()
            pages = array("i")
            first: list[int] = []
            for table, length in zip(self.page_tables, self.context_lengths, strict=True):
                first.append(len(pages))
                pages.extend(table[: -(-length // self.page_size)])
            columns = (np.array(pages, np.int64), first, list(self.context_lengths))
            pages_n, first_T, length_T = (torch.tensor(c, device=self.device) for c in columns)
            self._ragged = pages_n, first_T, length_T
        return self._ragged

    def _need_lengths(self) -> None:
        if self._chunks is not None and not self.context_lengths:
            raise ValueError("a plan of chunks alone is for the kernels that `serves` tells of")

    def chunks(self) -> DecodeChunks:
        """What the programs of a GPU attend."""
        from ostro.kernels.gpu.decode_chunks import cut_chunks

        if self._chunks is None:
            chunks = cut_chunks(self.page_tables, self.context_lengths, self.page_size)
            self._chunks = chunks if self.device.type == "cpu" else chunks.to(self.device)
        return self._chunks


def _make_bucket(
    queries: list[int],
    page_tables: Sequence[Sequence[int]],
    context_lengths: Sequence[int],
    page_size: int,
    device: torch.device,
) -> DecodeBucket:
    is_all = len(queries) == len(context_lengths)
    lengths = [context_lengths[query] for query in queries]
    num_pages = _rounded(-(-max(lengths) // page_size))
    pages: list[int] = []
    for query in queries:
        table = page_tables[query][:num_pages]
        pages.extend(table)
        pages.extend([table[0]] * (num_pages - len(table)))
    width = num_pages * page_size
    bias_B1S = stale_G = None
    if min(lengths) < width:
        beyond_BS = torch.arange(width) >= torch.tensor(lengths)[:, None]
        bias_BS = torch.zeros(beyond_BS.shape).masked_fill_(beyond_BS, -torch.inf)
        bias_B1S = bias_BS[:, None].to(device)
        stale_G = beyond_BS.flatten().nonzero()[:, 0].to(device)
    return DecodeBucket(
        queries_B=None if is_all else torch.tensor(queries, device=device),
        pages_G=torch.tensor(pages, device=device),
        num_queries=len(queries),
        bias_B1S=bias_B1S,
        stale_G=stale_G,
    )


def _rounded(num_pages: int) -> int:
    """Up to a multiple of an eighth of the power of two above: four sizes an octave."""
    unit = max((1 << (num_pages - 1).bit_length()) // 8, 1)
    return -(-num_pages // unit) * unit


def mla_decode(
    q_THQ: torch.Tensor,
    cache_NSW: torch.Tensor,
    plan: DecodePlan,
    heads: LatentHeads,
    turn_TJ: torch.Tensor | None = None,
    scale_T: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attend each query to its request's cached latents.

    Args:
        q_THQ: Queries, nope part first; changed, if they are to be turned or scaled.
        cache_NSW: One layer's pages, plain or of FP8 rows; the queries' own rows are already
            written.
        plan: Of these queries.
        heads: The layer's heads.
        turn_TJ: Rotations of the queries' positions; None where the rope part is turned already.
        scale_T: Llama-4 scale of each query; None where it is 1 or applied already.

    Returns:
        out_THV in the dtype of `q_THQ`.

    Example:
        a context of one token gives Wuv[h] latent, whatever the query.
    """
    if q_THQ.is_cuda:
        from ostro.kernels.gpu.mla_decode import serves

        nope, latent = heads.w_uk_HNC.shape[1:]
        if serves(nope, q_THQ.shape[2] - nope, latent, cache_NSW.shape[1]):
            return mla_decode_triton(q_THQ, cache_NSW, plan.chunks(), heads, turn_TJ, scale_T)
    turn_queries_(q_THQ, heads.w_uk_HNC.shape[1], turn_TJ, scale_T)
    is_even = not (q_THQ.shape[2] - heads.w_uk_HNC.shape[1]) % 2  # rope
    if heads.packed is not None and is_even and cache_NSW.dtype == q_THQ.dtype:
        return mla_decode_cpu(q_THQ, cache_NSW, plan, heads, heads.packed)
    q_THW = absorb_queries(q_THQ, heads.w_uk_HNC)
    latent_width = heads.w_uk_HNC.shape[2]
    buckets = plan.buckets()
    if len(buckets) == 1 and buckets[0].queries_B is None:
        out_THC = _attend_bucket(q_THW, cache_NSW, buckets[0], latent_width, heads.scale)
        return expand_values(out_THC, heads.w_uv_HVC)
    out_THC = q_THW.new_empty(*q_THW.shape[:2], latent_width)
    for bucket in buckets:
        queries_B = slice(None) if bucket.queries_B is None else bucket.queries_B
        out_THC[queries_B] = _attend_bucket(
            q_THW[queries_B], cache_NSW, bucket, latent_width, heads.scale
        )
    return expand_values(out_THC, heads.w_uv_HVC)


def mla_decode_triton(
    q_THQ: torch.Tensor,
    cache_NSW: torch.Tensor,
    chunks: DecodeChunks,
    heads: LatentHeads,
    turn_TJ: torch.Tensor | None = None,
    scale_T: torch.Tensor | None = None,
) -> torch.Tensor:
    """`mla_decode` by Triton.

    A query's result does not depend on the others, but in its last bits on whether they are few.
    """
    from ostro.kernels.gpu.join_values import join_values_triton, joins_values
    from ostro.kernels.gpu.latent_heads import expand_values_triton, latent_queries_triton
    from ostro.kernels.gpu.mla_decode import attend_chunks, attend_latents_triton

    q_THW = latent_queries_triton(q_THQ, heads.w_uk_HNC, turn_TJ, scale_T)
    arguments = (q_THW, cache_NSW, chunks, heads.w_uk_HNC.shape[2], heads.scale)
    if joins_values(chunks):
        return join_values_triton(attend_chunks(*arguments), chunks.first_T1, heads.w_uv_HVC)
    return expand_values_triton(attend_latents_triton(*arguments), heads.w_uv_HVC)


def mla_decode_cpu(
    q_THQ: torch.Tensor,
    cache_NSW: torch.Tensor,
    plan: DecodePlan,
    heads: LatentHeads,
    packed: PackedHeads,
) -> torch.Tensor:
    """`mla_decode` by the CPU operators; a query's result does not depend on the others."""
    num_heads, nope, latent = heads.w_uk_HNC.shape
    value, page_size = heads.w_uv_HVC.shape[1], cache_NSW.shape[1]
    pages_n, first_T, length_T = plan.ragged()
    if q_THQ.stride(2) != 1:
        q_THQ = q_THQ.contiguous()
    out_THV = q_THQ.new_empty(q_THQ.shape[0], num_heads, value)
    library.required().ostro_mla_decode(
        q_THQ.data_ptr(),
        q_THQ.stride(0),
        q_THQ.stride(1),
        packed.absorb_H.data_ptr(),
        packed.values_H.data_ptr(),
        cache_NSW.data_ptr(),
        pages_n.data_ptr(),
        first_T.data_ptr(),
        length_T.data_ptr(),
        q_THQ.shape[0],
        num_heads,
        nope,
        q_THQ.shape[2] - nope,
        latent,
        value,
        page_size,
        heads.scale,
        out_THV.data_ptr(),
        torch.get_num_threads(),
    )
    return out_THV


def mla_decode_reference(
    q_THQ: torch.Tensor, latents: Sequence[torch.Tensor], heads: LatentHeads
) -> torch.Tensor:
    """Meaning of `mla_decode` in float32: keys and values expanded, query by query.

    `latents` holds each query's context as [length, C + P] rows.
    """
    w_uk_HNC, w_uv_HVC = heads.w_uk_HNC.float(), heads.w_uv_HVC.float()
    nope, latent_width = w_uk_HNC.shape[1:]
    out = []
    for q_HQ, latent_SW in zip(q_THQ.float(), latents, strict=True):
        latent_SC, rope_SP = (
            latent_SW[:, :latent_width].float(),
            latent_SW[:, latent_width:].float(),
        )
        key_HSN = latent_SC @ w_uk_HNC.transpose(1, 2)
        value_HSV = latent_SC @ w_uv_HVC.transpose(1, 2)
        score_HS = torch.einsum("hn,hsn->hs", q_HQ[:, :nope], key_HSN) + q_HQ[:, nope:] @ rope_SP.T
        weight_HS = torch.softmax(score_HS * heads.scale, dim=-1)
        out.append(torch.einsum("hs,hsv->hv", weight_HS, value_HSV))
    return torch.stack(out).to(q_THQ.dtype)


def _attend_bucket(
    q_BHW: torch.Tensor,
    cache_NSW: torch.Tensor,
    bucket: DecodeBucket,
    latent_width: int,
    scale: float,
) -> torch.Tensor:
    gathered_GW = cache_NSW.index_select(0, bucket.pages_G).view(-1, cache_NSW.shape[2])
    gathered_GW = row_values(gathered_GW, latent_width, q_BHW.dtype)
    if bucket.stale_G is not None:
        gathered_GW.index_fill_(0, bucket.stale_G, 0.0)
    latent_BSW = gathered_GW.view(bucket.num_queries, -1, gathered_GW.shape[1])
    score_BHS = torch.bmm(q_BHW, latent_BSW.transpose(1, 2)).float().mul_(scale)
    if bucket.bias_B1S is not None:
        score_BHS.add_(bucket.bias_B1S)
    weight_BHS = torch.softmax(score_BHS, dim=-1).to(q_BHW.dtype)
    return torch.bmm(weight_BHS, latent_BSW[..., :latent_width])
