"""Absorbed attention of single new tokens on a GPU: chunks of keys, then a query's chunks joined.

A query's chunks are cut by its own length alone, so its result does not depend on the other
requests, and a batch of any lengths becomes programs of about one size.

Keys are the left factor, scores_SH = K q^T and sum_CH = K^T p: 64 of them fill a tensor core and 32
heads are its other side, so the cache is read once for all heads. Pages come as boxes (TMA).

Shape legend: T queries (one per request), H heads, Q = N + P query width (N nope, P rope),
C latent, W = C + P, X chunks, G pages of all of them, N pages, S page size.
"""

from __future__ import annotations

import array
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from ostro.kernels.gpu.tiles import architecture

# Keys of a chunk, for contexts up to so many keys. Alone on its processor a program takes 1.5 us
# for 64 keys: few requests want short chunks, many want long ones, which have less to join.
_KEYS_OF_CHUNK = ((2_048, 256), (16_384, 512))
MIN_CHUNK_KEYS, MAX_CHUNK_KEYS = 256, 1024
_MAX_TILE_KEYS = 64
_FEW_CHUNKS, _BLOCK_CHUNKS, _BLOCK_LATENT = 8, 64, 64  # of a program that joins
_BLACKWELL = 100
_LOG2_E = 1.4426950408889634


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeCut:
    """How the attention is launched.

    Attributes:
        num_warps: Per program.
        num_stages: Tiles in shared memory or on their way.
        early_loads: Issue the next tile's loads before a tile's scores, not after them.
    """

    num_warps: int
    num_stages: int
    early_loads: bool


def decode_cut(device: torch.device) -> DecodeCut:
    """What was fastest on an H200; on Blackwell the sums of four warps spill."""
    is_hopper = architecture(device) < _BLACKWELL
    return DecodeCut(num_warps=4 if is_hopper else 8, num_stages=2, early_loads=is_hopper)


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

    def to(self, device: torch.device) -> DecodeChunks:
        """The same on a device, by one copy."""
        parts = (self.pages_G, self.chunk_X4.flatten(), self.first_T1)
        moved = torch.cat(parts).to(device).split([len(part) for part in parts])
        return DecodeChunks(moved[0], moved[1].view(-1, 4), moved[2])


def cut_chunks(
    page_tables: Sequence[Sequence[int]],
    context_lengths: Sequence[int],
    page_size: int,
    keys_at_once: int | None = None,
) -> DecodeChunks:
    """Chunks of these contexts, on the CPU.

    Args:
        page_tables: Pages of each query's request; may hold more than the context needs.
        context_lengths: Keys that each query sees.
        page_size: At most a chunk.
        keys_at_once: Keys of a chunk; None means `chunk_keys` of each context.

    Raises:
        ValueError: A program does not hold the pages of so many keys at once.

    Example:
        tables [[7, 5], [9]] of 256 keys a page, lengths [300, 3] give pages [7, 5, 9], chunks
        [[0, 0, 256, 0], [0, 256, 300, 1], [1, 0, 3, 2]] and first [0, 2, 3].
    """
    if keys_at_once is not None and keys_at_once > MAX_CHUNK_KEYS:
        raise ValueError(f"keys_at_once={keys_at_once} is more than {MAX_CHUNK_KEYS}")
    pages = array.array("i")
    sizes = []
    for table, length in zip(page_tables, context_lengths, strict=True):
        pages.extend(table[: -(-length // page_size)])
        sizes.append(keys_at_once or chunk_keys(length))
    length_T = np.array(context_lengths, dtype=np.int32)
    size_T = np.array(sizes, dtype=np.int32)
    num_chunks_T = -(-length_T // size_T)
    first_T1 = _starts(num_chunks_T)
    page_T1 = _starts(-(-length_T // page_size))
    query_X = np.repeat(np.arange(len(length_T), dtype=np.int32), num_chunks_T)
    start_X = (np.arange(first_T1[-1], dtype=np.int32) - first_T1[query_X]) * size_T[query_X]
    stop_X = np.minimum(start_X + size_T[query_X], length_T[query_X])
    chunk_X4 = np.stack((query_X, start_X, stop_X, page_T1[query_X] + start_X // page_size), axis=1)
    return DecodeChunks(
        pages_G=torch.from_numpy(np.array(pages, dtype=np.int32)),
        chunk_X4=torch.from_numpy(chunk_X4),
        first_T1=torch.from_numpy(first_T1),
    )


def _starts(sizes: np.ndarray) -> np.ndarray:
    """Where each of these begins, and where the last one ends."""
    return np.concatenate(([0], np.cumsum(sizes))).astype(np.int32)


def chunk_keys(context_length: int) -> int:
    """Keys of each chunk of a context."""
    for at_most, keys in _KEYS_OF_CHUNK:
        if context_length <= at_most:
            return keys
    return MAX_CHUNK_KEYS


def most_chunks(max_context: int) -> int:
    """Chunks of any context up to this one.

    Example:
        2,048 keys may be 8 chunks, 2,500 keys no more than that.
    """
    ends = [at_most for at_most, _ in _KEYS_OF_CHUNK if at_most < max_context]
    return max(-(-length // chunk_keys(length)) for length in (*ends, max_context))


def serves(nope: int, rope: int, latent: int, page_size: int) -> bool:
    """Whether the kernels take these sizes: powers of two that fill tensor cores."""
    sizes = (nope, rope, latent, page_size)
    is_whole = all(size >= 16 and size & (size - 1) == 0 for size in sizes)
    return is_whole and page_size <= MIN_CHUNK_KEYS


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
    part_XHC = q_THW.new_empty(num_chunks, num_heads, latent, dtype=torch.float32)
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
        FEW_X=_FEW_CHUNKS,
        BLOCK_X=_BLOCK_CHUNKS,
        num_warps=2,
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
        total = tl.zeros((BLOCK_H,), tl.float32)
        values = tl.zeros((C, BLOCK_H), tl.float32)
        for key in tl.range(start, stop, KEYS, num_stages=STAGES):
            latent, rope = _tile(latents, rope_keys, pages_G, key, start, stop, C, P, S, KEYS)
            # The pipeliner issues the next loads behind all that follows from this tile, but for a
            # branch: so what is to come after them is one, always taken.
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
def _joined(
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
):
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
                largest, total, values = _joined(
                    part, lse, begin, stop, c, h, H, largest, total, values, C, FEW_X
                )
        else:
            for start in range(begin, stop, BLOCK_X):
                largest, total, values = _joined(
                    part, lse, start, stop, c, h, H, largest, total, values, C, BLOCK_X
                )
        values = values / tl.where(total > 0, total, 1.0)
        tl.store(out + (t.to(tl.int64) * H + h) * C + c, values.to(out.dtype.element_ty))
