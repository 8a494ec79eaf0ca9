"""Absorbed attention of single new tokens on a GPU: chunks of keys, then a query's chunks joined.

Keys are the left factor, scores_SH = K q^T and sum_CH = K^T p: 64 of them fill a tensor core and 32
heads are its other side, so the cache is read once for all heads. Pages come as boxes (TMA).

FP8 latents are multiplied in float16, which Hopper converts e4m3 to two at a time; bfloat16 goes
through float32, one by one, and would take longer than reading twice the bytes.

Shape legend: T queries (one per request), H heads, Q = N + P query width (N nope, P rope),
C latent, W = C + P (of the cache: `kernels.latent_cache`), X chunks, G pages of all of them,
N pages, S page size.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from ostro.kernels.gpu.decode_chunks import MAX_CHUNK_KEYS, MIN_CHUNK_KEYS, DecodeChunks
from ostro.kernels.gpu.dependent_launch import await_inputs, pdl_options
from ostro.kernels.gpu.tiles import BLACKWELL, architecture
from ostro.kernels.latent_cache import FP8_ROWS, row_parts, row_values

_MAX_TILE_KEYS = 64
FEW_CHUNKS, _BLOCK_CHUNKS, _BLOCK_LATENT = 8, 64, 64  # of a program that joins
_LOG2_E = 1.4426950408889634


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeCut:
    """How the attention is launched.

    Attributes:
        num_warps: Per program.
        num_stages: Tiles in shared memory or on their way.
        early_loads: Issue the next tile's loads before a tile's scores, not after them; FP8 latents
            are converted a tile ahead anyway.
    """

    num_warps: int
    num_stages: int
    early_loads: bool


@dataclass(frozen=True, slots=True)
class AttendedChunks:
    """What programs made of their chunks.

    Attributes:
        part_XHC: float32 weighted latents of each chunk of a query that has several; others' rows
            are not written.
        lse_XH: float32 logarithm of its weights' sum, in base 2; likewise.
        out_THC: The result of a query that has one chunk; others' rows are not written.
    """

    part_XHC: torch.Tensor
    lse_XH: torch.Tensor
    out_THC: torch.Tensor


def decode_cut(cache_dtype: torch.dtype, device: torch.device) -> DecodeCut:
    """What was fastest on an H200; on Blackwell the sums of four warps spill.

    FP8 rows: what lets two programs share a processor; no sweep has run yet.
    """
    if cache_dtype == FP8_ROWS:
        return DecodeCut(num_warps=4, num_stages=2, early_loads=False)
    is_hopper = architecture(device) < BLACKWELL
    return DecodeCut(num_warps=4 if is_hopper else 8, num_stages=2, early_loads=is_hopper)


def serves(nope: int, rope: int, latent: int, page_size: int) -> bool:
    """Whether the kernels take these sizes: powers of two that fill tensor cores."""
    sizes = (nope, rope, latent, page_size)
    is_whole = all(size >= 16 and size & (size - 1) == 0 for size in sizes)
    return is_whole and page_size <= MIN_CHUNK_KEYS


def attend_chunks(
    q_THW: torch.Tensor,
    cache_NSW: torch.Tensor,
    chunks: DecodeChunks,
    latent: int,
    scale: float,
    *,
    cut: DecodeCut | None = None,
) -> AttendedChunks:
    """Attend to cached rows, chunk by chunk.

    Args:
        q_THW: From `latent_queries_triton`.
        cache_NSW: One layer's pages, plain or of FP8 rows.
        chunks: Of these queries.
        latent: C.
        scale: Softmax scale.
        cut: How to launch; None means `decode_cut`.
    """
    cut = cut or decode_cut(cache_NSW.dtype, cache_NSW.device)
    num_tokens, num_heads, _ = q_THW.shape
    latent_NSC, rope_key_NSP = row_parts(cache_NSW, latent)
    rope = rope_key_NSP.shape[2]
    page_size, num_chunks = cache_NSW.shape[1], len(chunks.chunk_X4)
    keys = min(page_size, _MAX_TILE_KEYS)
    block_heads = max(16, triton.next_power_of_2(num_heads))
    part_XHC = q_THW.new_empty(num_chunks, num_heads, latent, dtype=torch.float32)
    lse_XH = q_THW.new_empty(num_chunks, num_heads, dtype=torch.float32)
    out_THC = q_THW.new_empty(num_tokens, num_heads, latent)
    _attend_kernel[(num_chunks,)](
        q_THW,
        TensorDescriptor.from_tensor(latent_NSC, [1, keys, latent]),
        TensorDescriptor.from_tensor(rope_key_NSP, [1, keys, rope]),
        chunks.pages_G,
        chunks.chunk_X4,
        chunks.first_T1,
        part_XHC,
        lse_XH,
        out_THC,
        scale * _LOG2_E,
        num_heads,
        C=latent,
        P=rope,
        S=page_size,
        KEYS=keys,
        BLOCK_H=block_heads,
        IS_FP8=cache_NSW.dtype == FP8_ROWS,
        EARLY_LOADS=cut.early_loads,
        PAGES=max(1, MAX_CHUNK_KEYS // page_size),
        STAGES=cut.num_stages,
        num_warps=cut.num_warps,
        num_stages=cut.num_stages,
        **pdl_options(q_THW.device),
    )
    return AttendedChunks(part_XHC, lse_XH, out_THC)


def attend_latents_triton(
    q_THW: torch.Tensor,
    cache_NSW: torch.Tensor,
    chunks: DecodeChunks,
    latent: int,
    scale: float,
    *,
    cut: DecodeCut | None = None,
) -> torch.Tensor:
    """Attend to cached rows: out_THC, zeros for a query without keys; arguments are those above."""
    parts = attend_chunks(q_THW, cache_NSW, chunks, latent, scale, cut=cut)
    num_tokens, num_heads, _ = q_THW.shape
    block_latent = min(latent, _BLOCK_LATENT)
    _join_kernel[(num_tokens, num_heads, latent // block_latent)](
        parts.part_XHC,
        parts.lse_XH,
        chunks.first_T1,
        parts.out_THC,
        num_heads,
        C=latent,
        BLOCK_C=block_latent,
        FEW_X=FEW_CHUNKS,
        BLOCK_X=_BLOCK_CHUNKS,
        num_warps=2,
        **pdl_options(q_THW.device),
    )
    return parts.out_THC


def attend_latents_reference(
    q_THW: torch.Tensor, cache_NSW: torch.Tensor, chunks: DecodeChunks, latent: int, scale: float
) -> torch.Tensor:
    """Meaning of `attend_latents_triton` in float32, query by query."""
    out_THC = torch.zeros(*q_THW.shape[:2], latent, device=q_THW.device)
    page_size, chunk = cache_NSW.shape[1], chunks.chunk_X4.tolist()
    for t, (begin, end) in enumerate(itertools.pairwise(chunks.first_T1.tolist())):
        pages = [
            chunks.pages_G[at : at + -(-(stop - start) // page_size)].long()
            for _, start, stop, at in chunk[begin:end]
        ]
        rows = [
            cache_NSW[pages_n].flatten(0, 1)[: stop - start]
            for pages_n, (_, start, stop, _) in zip(pages, chunk[begin:end], strict=True)
        ]
        if rows:
            latent_SW = row_values(torch.cat(rows), latent, torch.float32).float()
            weight_HS = torch.softmax(q_THW[t].float() @ latent_SW.T * scale, dim=1)
            out_THC[t] = weight_HS @ latent_SW[:, :latent]
    return out_THC.to(q_THW.dtype)


@triton.jit
def _tile(pages_G, key, start, stop, S: tl.constexpr, KEYS: tl.constexpr):
    """Page and first place of the box of a tile's keys; beyond the chunk it has anything but NaN.

    A part of a tile comes as the end of its box, behind keys of another tile or the zeros that are
    read before a page. So no place is read that no key was written to: it may hold NaN, and
    0 * NaN would reach the output.
    """
    page_index = (key - start) // S
    # From registers: a load in the loop would be pipelined too, and tiles would wait for it.
    g = tl.arange(0, pages_G.shape[0])
    page = tl.sum(tl.where(g == page_index, pages_G, 0), 0)
    return page, tl.minimum(key, stop - KEYS) - key // S * S


@triton.jit
def _as_float16(value):
    """What float16 does not hold becomes its largest value: with inf, 0 * inf would be NaN."""
    value = value.to(tl.float32)
    value = tl.maximum(value, -65504.0, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(value, 65504.0, propagate_nan=tl.PropagateNan.ALL).to(tl.float16)


@triton.jit
def _score(q_latent, q_rope, latent, rope, scale2, key, stop, KEYS: tl.constexpr):
    score = tl.dot(latent, q_latent.T, input_precision="ieee")
    score = tl.dot(rope, q_rope.T, score, input_precision="ieee") * scale2
    is_of_tile = tl.arange(0, KEYS) >= key + KEYS - stop
    return tl.where(is_of_tile[:, None], score, float("-inf"))


@triton.jit
def _fold(score, latent, largest, total, values):
    """A tile into the online softmax, in base 2."""
    now = tl.maximum(largest, tl.max(score, 0))
    decay = tl.exp2(largest - now)
    weight = tl.exp2(score - now[None, :])
    total = total * decay + tl.sum(weight, 0)
    values = values * decay[None, :]
    values = tl.dot(latent.T, weight.to(latent.dtype), values, input_precision="ieee")
    return now, total, values


@triton.jit
def _attend_kernel(
    q,
    latents,
    rope_keys,
    pages,
    chunk,
    first_of,
    part,
    lse,
    out,
    scale2,
    H,
    C: tl.constexpr,
    P: tl.constexpr,
    S: tl.constexpr,
    KEYS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    IS_FP8: tl.constexpr,
    EARLY_LOADS: tl.constexpr,
    PAGES: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr = False,
):
    await_inputs(PDL)
    x = tl.program_id(0)
    t = tl.load(chunk + x * 4)
    start = tl.load(chunk + x * 4 + 1)
    stop = tl.load(chunk + x * 4 + 2)
    if start < stop:
        g = tl.arange(0, PAGES)
        num_pages = tl.cdiv(stop - start, S)
        pages_G = tl.load(pages + tl.load(chunk + x * 4 + 3) + g, mask=g < num_pages, other=0)
        num_chunks = tl.load(first_of + t + 1) - tl.load(first_of + t)
        h, c, p = tl.arange(0, BLOCK_H), tl.arange(0, C), tl.arange(0, P)
        row = q + (t.to(tl.int64) * H + h)[:, None] * (C + P)
        q_latent = tl.load(row + c[None, :], mask=(h < H)[:, None], other=0.0)
        q_rope = tl.load(row + C + p[None, :], mask=(h < H)[:, None], other=0.0)
        if IS_FP8:
            q_latent, q_rope = _as_float16(q_latent), _as_float16(q_rope)
        largest = tl.full((BLOCK_H,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_H,), tl.float32)
        values = tl.zeros((C, BLOCK_H), tl.float32)
        if IS_FP8:
            # Converted a tile ahead. The compiler has the tensor cores read from shared memory only
            # what is loaded, or comes from the turn before as this does; registers do not hold a
            # tile twice, once turned round: 144 of them spilled.
            page, first = _tile(pages_G, start, start, stop, S, KEYS)
            latent = latents.load([page, first, 0]).reshape(KEYS, C).to(tl.float16)
            for key in tl.range(start, stop, KEYS, num_stages=STAGES):
                page, first = _tile(pages_G, key, start, stop, S, KEYS)
                rope = rope_keys.load([page, first, 0]).reshape(KEYS, P)
                score = _score(q_latent, q_rope, latent, rope, scale2, key, stop, KEYS)
                largest, total, values = _fold(score, latent, largest, total, values)
                # Behind the last tile, a box before its page: zeros.
                page, first = _tile(pages_G, key + KEYS, start, stop, S, KEYS)
                latent = latents.load([page, first, 0]).reshape(KEYS, C).to(tl.float16)
        else:
            for key in tl.range(start, stop, KEYS, num_stages=STAGES):
                page, first = _tile(pages_G, key, start, stop, S, KEYS)
                latent = latents.load([page, first, 0]).reshape(KEYS, C)
                rope = rope_keys.load([page, first, 0]).reshape(KEYS, P)
                # The pipeliner issues the next loads behind all that follows from this tile, but
                # for a branch: so what is to come after them is one, always taken.
                if EARLY_LOADS:
                    if t >= 0:
                        score = _score(q_latent, q_rope, latent, rope, scale2, key, stop, KEYS)
                        largest, total, values = _fold(score, latent, largest, total, values)
                else:
                    score = _score(q_latent, q_rope, latent, rope, scale2, key, stop, KEYS)
                    if t >= 0:
                        largest, total, values = _fold(score, latent, largest, total, values)
        result = tl.trans(values / total[None, :])
        is_head = (h < H)[:, None]
        if num_chunks == 1:
            place = (t.to(tl.int64) * H + h)[:, None] * C + c[None, :]
            tl.store(out + place, result.to(out.dtype.element_ty), mask=is_head)
        else:
            place = (x.to(tl.int64) * H + h)[:, None] * C + c[None, :]
            tl.store(part + place, result.to(part.dtype.element_ty), mask=is_head)
            tl.store(lse + x * H + h, largest + tl.log2(total), mask=h < H)


@triton.jit
def joined(  # noqa: ANN201 - not Python
    part, lse, start, stop, c, h, H, largest, total, values, C: tl.constexpr, BLOCK_X: tl.constexpr
):
    """Some chunks into the sum of those before."""
    x = start + tl.arange(0, BLOCK_X)
    mass = tl.load(lse + x * H + h, mask=x < stop, other=float("-inf"))
    place = (x.to(tl.int64) * H + h) * C
    rows = tl.load(part + place[:, None] + c[None, :], mask=(x < stop)[:, None], other=0.0)
    now = tl.maximum(largest, tl.max(mass, 0))
    share = tl.exp2(mass - now)
    decay = tl.exp2(largest - now)
    total = total * decay + tl.sum(share, 0)
    values = values * decay + tl.sum(rows * share[:, None], 0)
    return now, total, values


@triton.jit
def _join_kernel(
    part,
    lse,
    first,
    out,
    H,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    FEW_X: tl.constexpr,
    BLOCK_X: tl.constexpr,
    PDL: tl.constexpr = False,
):
    await_inputs(PDL)
    t, h = tl.program_id(0), tl.program_id(1)
    c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    begin, stop = tl.load(first + t), tl.load(first + t + 1)
    if stop - begin != 1:  # one alone has written its result itself
        largest = float("-inf")
        total = 0.0
        values = tl.zeros((BLOCK_C,), tl.float32)
        # Many requests have few chunks: 31,000 programs of 64 rows took 60 us for four rows each.
        if stop - begin <= FEW_X:
            if stop > begin:
                largest, total, values = joined(
                    part, lse, begin, stop, c, h, H, largest, total, values, C, FEW_X
                )
        else:
            for start in range(begin, stop, BLOCK_X):
                largest, total, values = joined(
                    part, lse, start, stop, c, h, H, largest, total, values, C, BLOCK_X
                )
        values = values / tl.where(total > 0, total, 1.0)
        tl.store(out + (t.to(tl.int64) * H + h) * C + c, values.to(out.dtype.element_ty))
