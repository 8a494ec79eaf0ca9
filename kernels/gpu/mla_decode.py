"""Absorbed attention of single new tokens on a GPU: chunks of keys, then a query's chunks joined.

A query's chunks are cut by its own length alone, so its result does not depend on the other
requests, and a batch of any lengths becomes programs of about one size.

Keys are the left factor, scores_SH = K q^T and sum_CH = K^T p: 64 of them fill a tensor core and 32
heads are its other side, so the cache is read once for all heads. Pages come as boxes (TMA).

Shape legend: T queries (one per request), H heads, Q = N + P query width (N nope, P rope),
C latent, W = C + P, X chunks, G pages of all of them, N pages, S page size.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from ostro.kernels.gpu.tiles import architecture

# Keys of a chunk: a longer request has longer ones, so that its join stays short.
MIN_CHUNK_KEYS, MAX_CHUNK_KEYS, _LONG = 512, 1024, 65_536
_MAX_TILE_KEYS = 64
_BLOCK_CHUNKS, _BLOCK_LATENT = 64, 64  # of a program that joins
_BLACKWELL = 100
_LOG2_E = 1.4426950408889634


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeCut:
    """How the attention is launched.

    Attributes:
        num_warps: Per program.
        num_stages: Tiles in shared memory or on their way.
        late_sum: Sum weights over keys after the last step, not in each.
        patience: Powers of two by which scores may pass the reference of the weights before the
            sums are scaled to a new one; 0 takes every new maximum.
        early_loads: Issue the next tile's loads before a tile's scores, not after them.
        narrow_parts: Keep the chunks' results in the queries' dtype, not in float32.
    """

    num_warps: int
    num_stages: int
    late_sum: bool = False
    patience: int = 0
    early_loads: bool = False
    narrow_parts: bool = False


def decode_cut(device: torch.device) -> DecodeCut:
    """The usual one; on Blackwell the sums of four warps spill."""
    return DecodeCut(
        num_warps=4 if architecture(device) < _BLACKWELL else 8,
        num_stages=2,
        late_sum=True,
        early_loads=architecture(device) < _BLACKWELL,
    )


@dataclass(frozen=True, slots=True)
class DecodeChunks:
    """What each program attends: on the device, the same for every layer of a step.

    Attributes:
        pages_G: int32 pages of every chunk, one chunk after the other.
        chunk_X4: int32 (query, first key, end of keys, where its pages begin in `pages_G`) of each
            chunk, queries ascending; padding has no keys.
        first_T1: int32 [T + 1], where each query's chunks begin; padding has none.
    """

    pages_G: torch.Tensor
    chunk_X4: torch.Tensor
    first_T1: torch.Tensor


def cut_chunks(
    page_tables: Sequence[Sequence[int]],
    context_lengths: Sequence[int],
    page_size: int,
    keys_at_once: int | None = None,
) -> tuple[list[int], list[tuple[int, int, int, int]], list[int]]:
    """What `DecodeChunks` holds, as lists.

    Args:
        page_tables: Pages of each query's request; may hold more than the context needs.
        context_lengths: Keys that each query sees.
        page_size: At most a chunk.
        keys_at_once: Keys of a chunk; None means `chunk_keys` of each context.

    Raises:
        ValueError: A program does not hold the pages of so many keys at once.

    Example:
        tables [[7, 5], [9]] of 512 keys a page, lengths [600, 3] give pages [7, 5, 9], chunks
        [(0, 0, 512, 0), (0, 512, 600, 1), (1, 0, 3, 2)] and first [0, 2, 3].
    """
    if keys_at_once is not None and keys_at_once > MAX_CHUNK_KEYS:
        raise ValueError(f"keys_at_once={keys_at_once} is more than {MAX_CHUNK_KEYS}")
    pages: list[int] = []
    chunks: list[tuple[int, int, int, int]] = []
    first = [0]
    for query, (table, length) in enumerate(zip(page_tables, context_lengths, strict=True)):
        size = keys_at_once or chunk_keys(length)
        at = len(pages)
        pages.extend(table[: -(-length // page_size)])
        chunks.extend(
            (query, start, min(start + size, length), at + start // page_size)
            for start in range(0, length, size)
        )
        first.append(len(chunks))
    return pages, chunks, first


def chunk_keys(context_length: int) -> int:
    """Keys of each chunk of a context."""
    return MIN_CHUNK_KEYS if context_length <= _LONG else MAX_CHUNK_KEYS


def serves(q_THQ: torch.Tensor, cache_NSW: torch.Tensor, nope: int, latent: int) -> bool:
    """Whether the kernels take these sizes: powers of two that fill tensor cores."""
    rope = q_THQ.shape[2] - nope
    return all(
        size >= 16 and size & (size - 1) == 0 for size in (nope, rope, latent, cache_NSW.shape[1])
    )


def attend_latents_triton(
    q_THW: torch.Tensor,
    cache_NSW: torch.Tensor,
    chunks: DecodeChunks,
    latent: int,
    scale: float,
    *,
    cut: DecodeCut | None = None,
) -> torch.Tensor:
    """Attend to cached rows: out_THC, zeros for a query without keys.

    Args:
        q_THW: From `latent_queries_triton`.
        cache_NSW: One layer's pages.
        chunks: Of these queries.
        latent: C.
        scale: Softmax scale.
        cut: How to launch; None means `decode_cut`.
    """
    cut = cut or decode_cut(cache_NSW.device)
    num_tokens, num_heads, width = q_THW.shape
    page_size, num_chunks = cache_NSW.shape[1], len(chunks.chunk_X4)
    keys = min(page_size, _MAX_TILE_KEYS)
    block_heads = max(16, triton.next_power_of_2(num_heads))
    kind = q_THW.dtype if cut.narrow_parts else torch.float32
    part_XHC = q_THW.new_empty(num_chunks, num_heads, latent, dtype=kind)
    lse_XH = q_THW.new_empty(num_chunks, num_heads, dtype=torch.float32)
    out_THC = q_THW.new_empty(num_tokens, num_heads, latent)
    _attend_kernel[(num_chunks,)](
        q_THW,
        TensorDescriptor.from_tensor(cache_NSW, [1, keys, latent]),
        TensorDescriptor.from_tensor(cache_NSW, [1, keys, width - latent]),
        chunks.pages_G,
        chunks.chunk_X4,
        chunks.first_T1,
        part_XHC,
        lse_XH,
        out_THC,
        scale * _LOG2_E,
        num_heads,
        C=latent,
        P=width - latent,
        S=page_size,
        KEYS=keys,
        BLOCK_H=block_heads,
        LATE_SUM=cut.late_sum,
        PATIENCE=cut.patience,
        EARLY_LOADS=cut.early_loads,
        PAGES=max(1, MAX_CHUNK_KEYS // page_size),
        STAGES=cut.num_stages,
        num_warps=cut.num_warps,
        num_stages=cut.num_stages,
    )
    block_latent = min(latent, _BLOCK_LATENT)
    _join_kernel[(num_tokens, num_heads, latent // block_latent)](
        part_XHC,
        lse_XH,
        chunks.first_T1,
        out_THC,
        num_heads,
        C=latent,
        BLOCK_C=block_latent,
        BLOCK_X=_BLOCK_CHUNKS,
        num_warps=4,
    )
    return out_THC


def attend_latents_reference(
    q_THW: torch.Tensor, cache_NSW: torch.Tensor, chunks: DecodeChunks, latent: int, scale: float
) -> torch.Tensor:
    """Meaning of `attend_latents_triton` in float32, query by query."""
    out_THC = torch.zeros(*q_THW.shape[:2], latent, device=q_THW.device)
    page_size, chunk = cache_NSW.shape[1], chunks.chunk_X4.tolist()
    for t, (begin, end) in enumerate(itertools.pairwise(chunks.first_T1.tolist())):
        rows = [
            cache_NSW[chunks.pages_G[at : at + -(-(stop - start) // page_size)].long()]
            .flatten(0, 1)[: stop - start]
            .float()
            for _, start, stop, at in chunk[begin:end]
        ]
        if rows:
            latent_SW = torch.cat(rows)
            weight_HS = torch.softmax(q_THW[t].float() @ latent_SW.T * scale, dim=1)
            out_THC[t] = weight_HS @ latent_SW[:, :latent]
    return out_THC.to(q_THW.dtype)


@triton.jit
def _tile(
    latents,
    rope_keys,
    pages_G,
    key,
    start,
    stop,
    C: tl.constexpr,
    P: tl.constexpr,
    S: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Rows of a tile's keys: latents and rope parts; beyond the chunk they are anything but NaN.

    A part of a tile comes as the end of its box, behind keys of another tile or the zeros that are
    read before a page. So no place is read that no key was written to: it may hold NaN, and
    0 * NaN would reach the output.
    """
    page_index = (key - start) // S
    # From registers: a load in the loop would be pipelined too, and tiles would wait for it.
    g = tl.arange(0, pages_G.shape[0])
    page = tl.sum(tl.where(g == page_index, pages_G, 0), 0)
    place = tl.minimum(key, stop - KEYS) - key // S * S
    latent = latents.load([page, place, 0]).reshape(KEYS, C)
    rope = rope_keys.load([page, place, C]).reshape(KEYS, P)
    return latent, rope


@triton.jit
def _score(q_latent, q_rope, latent, rope, scale2, key, stop, KEYS: tl.constexpr):
    score = tl.dot(latent, q_latent.T, input_precision="ieee")
    score = tl.dot(rope, q_rope.T, score, input_precision="ieee") * scale2
    is_of_tile = tl.arange(0, KEYS) >= key + KEYS - stop
    return tl.where(is_of_tile[:, None], score, float("-inf"))


@triton.jit
def _fold(score, latent, largest, total, values, LATE_SUM: tl.constexpr, PATIENCE: tl.constexpr):
    """A tile into the online softmax, in base 2."""
    peak = tl.max(score, 0)
    if PATIENCE:
        is_far = peak > largest + PATIENCE
        now = tl.where(is_far, peak, largest)
        decay = tl.exp2(largest - now)
        if tl.max(is_far.to(tl.int32), 0) > 0:
            values = values * decay[None, :]
    else:
        now = tl.maximum(largest, peak)
        decay = tl.exp2(largest - now)
        values = values * decay[None, :]
    weight = tl.exp2(score - now[None, :])
    total = total * decay[None, :] + weight if LATE_SUM else total * decay + tl.sum(weight, 0)
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
    LATE_SUM: tl.constexpr,
    PATIENCE: tl.constexpr,
    EARLY_LOADS: tl.constexpr,
    PAGES: tl.constexpr,
    STAGES: tl.constexpr,
):
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
        largest = tl.full((BLOCK_H,), float("-inf"), tl.float32)
        total = tl.zeros((KEYS, BLOCK_H) if LATE_SUM else (BLOCK_H,), tl.float32)
        values = tl.zeros((C, BLOCK_H), tl.float32)
        for key in tl.range(start, stop, KEYS, num_stages=STAGES):
            latent, rope = _tile(latents, rope_keys, pages_G, key, start, stop, C, P, S, KEYS)
            # The pipeliner issues the next loads behind all that follows from this tile, but for a
            # branch: so what is to come after them is one, always taken.
            if EARLY_LOADS:
                if t >= 0:
                    score = _score(q_latent, q_rope, latent, rope, scale2, key, stop, KEYS)
                    largest, total, values = _fold(
                        score, latent, largest, total, values, LATE_SUM, PATIENCE
                    )
            else:
                score = _score(q_latent, q_rope, latent, rope, scale2, key, stop, KEYS)
                if t >= 0:
                    largest, total, values = _fold(
                        score, latent, largest, total, values, LATE_SUM, PATIENCE
                    )
        total = tl.sum(total, 0) if LATE_SUM else total
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
def _join_kernel(
    part, lse, first, out, H, C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_X: tl.constexpr
):
    t, h = tl.program_id(0), tl.program_id(1)
    c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    begin, stop = tl.load(first + t), tl.load(first + t + 1)
    if stop - begin != 1:
        largest = float("-inf")
        total = 0.0
        values = tl.zeros((BLOCK_C,), tl.float32)
        for start in range(begin, stop, BLOCK_X):
            x = start + tl.arange(0, BLOCK_X)
            mass = tl.load(lse + x * H + h, mask=x < stop, other=float("-inf"))
            place = (x.to(tl.int64) * H + h) * C
            rows = tl.load(part + place[:, None] + c[None, :], mask=(x < stop)[:, None], other=0.0)
            now = tl.maximum(largest, tl.max(mass, 0))
            share = tl.exp2(mass - now)
            decay = tl.exp2(largest - now)
            total = total * decay + tl.sum(share, 0)
            values = values * decay + tl.sum(rows.to(tl.float32) * share[:, None], 0)
            largest = now
        values = values / tl.where(total > 0, total, 1.0)
        tl.store(out + (t.to(tl.int64) * H + h) * C + c, values.to(out.dtype.element_ty))
