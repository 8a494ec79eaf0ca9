"""Cases of single-token attention: queries into latent space, attention to pages, values out of it.

Pages are shuffled, and what no query may see is NaN. Layers have heads of their own, as their
matrices are colder than a short context.

Shape letters: B queries, H heads, Q = N + P query width (N nope, P rope), V value width, C latent,
L compressed query, W = C + P.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from ostro.kernels.bench.measure import Case, largest_error, num_variants, poison, relative_error
from ostro.kernels.bench.sizes import Sizes
from ostro.kernels.gpu.decode_chunks import DecodeChunks, cut_chunks
from ostro.kernels.gpu.latent_heads import (
    expand_values_triton,
    latent_queries_reference,
    latent_queries_triton,
)
from ostro.kernels.gpu.mla_decode import (
    DecodeCut,
    attend_latents_reference,
    attend_latents_triton,
)
from ostro.kernels.gpu.mla_prologue import mla_prologue_triton
from ostro.kernels.latent_cache import FP8_ROWS, row_values
from ostro.kernels.latent_heads import LatentHeads, expand_values_reference
from ostro.kernels.mla_decode import mla_decode_triton
from ostro.kernels.mla_prologue import PrologueNorms, mla_prologue_reference

# (queries, keys of each)
CONTEXTS = (
    (1, 1 << 10),
    (1, 1 << 15),
    (1, 1 << 18),
    (8, 1 << 15),
    (30, 1 << 15),
    (128, 1 << 10),
    (245, 1 << 12),
)
BATCHES = (1, 30, 245)
_RAGGED, _SHORTEST, _LONGEST = 64, 64, 16_384
_NUM_SPARE_PAGES = 8
_MOST_VARIANTS = 128
_TOLERANCE = 1e-2
_EPS = 1e-6


def random_heads(sizes: Sizes) -> LatentHeads:
    """Of one layer."""
    s = sizes
    return LatentHeads(
        s.randn(s.num_heads, s.nope, s.latent, scale=s.nope**-0.5),
        s.randn(s.num_heads, s.value, s.latent, scale=s.latent**-0.5),
        (s.nope + s.rope) ** -0.5,
    )


def random_turns(sizes: Sizes, num_tokens: int) -> torch.Tensor:
    """Rotations of tokens at random positions."""
    angles_TJ = torch.rand(num_tokens, sizes.rope // 2, device=sizes.device) * 2 * math.pi
    return torch.polar(torch.ones_like(angles_TJ), angles_TJ)


def shuffled_tables(
    sizes: Sizes, lengths: Sequence[int], num_sets: int
) -> tuple[torch.Tensor, list[list[list[int]]]]:
    """A cache, and page tables of several sets of requests of these lengths in it.

    Returns:
        cache_NSW with NaN in every place that is beyond a context, and tables by set and request.
    """
    s = sizes
    counts = [-(-length // s.page_size) for length in lengths] * num_sets
    num_pages = sum(counts) + _NUM_SPARE_PAGES
    cache_NSW = s.randn_cache(num_pages)
    order = torch.randperm(num_pages).tolist()
    ends = list(itertools.accumulate(counts, initial=0))
    tables = [order[start:stop] for start, stop in itertools.pairwise(ends)]
    cache_NSW[torch.tensor(order[ends[-1] :], device=s.device)] = s.not_written()
    for table, length in zip(tables, list(lengths) * num_sets, strict=True):
        cache_NSW[table[-1], (length - 1) % s.page_size + 1 :] = s.not_written()
    size = len(lengths)
    return cache_NSW, [tables[first : first + size] for first in range(0, len(tables), size)]


@dataclass(frozen=True, slots=True)
class Step:
    """Queries of one decode step in one layer."""

    q_BHQ: torch.Tensor
    q_BHW: torch.Tensor
    cache_NSW: torch.Tensor
    chunks: DecodeChunks
    heads: LatentHeads
    turn_BJ: torch.Tensor
    scale_B: torch.Tensor

    def attend(self, cut: DecodeCut | None = None) -> torch.Tensor:
        """Attention of the queries in latent space, and its join."""
        return attend_latents_triton(*self._attended(self.q_BHW), cut=cut)

    def whole(self) -> torch.Tensor:
        """From projected queries to values."""
        return mla_decode_triton(
            self.q_BHQ, self.cache_NSW, self.chunks, self.heads, self.turn_BJ, self.scale_B
        )

    def attend_error(self) -> float:
        """Of `attend`, the same queries taken in float32."""
        expected = attend_latents_reference(*self._attended(self.q_BHW.float()))
        poison(expected.numel() * 2, str(expected.device))
        return relative_error(self.attend(), expected)

    def whole_error(self) -> float:
        """Of `whole`, all of it in float32."""
        q_BHW = latent_queries_reference(
            self.q_BHQ.float(), self.heads.w_uk_HNC, self.turn_BJ, self.scale_B
        )
        latent_BHC = attend_latents_reference(*self._attended(q_BHW))
        expected = expand_values_reference(latent_BHC, self.heads.w_uv_HVC)
        poison(expected.numel() * 2, str(expected.device))
        return relative_error(self.whole(), expected)

    def _attended(
        self, q_BHW: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, DecodeChunks, int, float]:
        latent = self.heads.w_uk_HNC.shape[2]
        return q_BHW, self.cache_NSW, self.chunks, latent, self.heads.scale


def steps(
    sizes: Sizes,
    lengths: Sequence[int],
    keys_at_once: int | None = None,
    most: int = _MOST_VARIANTS,
) -> list[Step]:
    """Several of these context lengths, each with pages and heads of its own."""
    s = sizes
    num_steps = num_variants(sum(lengths) * s.row_bytes(), most)
    cache_NSW, tables = shuffled_tables(s, lengths, num_steps)
    layers = [random_heads(s) for _ in range(min(num_steps, 36))]
    found = []
    for set_, heads in zip(tables, itertools.cycle(layers), strict=False):
        cut = cut_chunks(set_, lengths, s.page_size, keys_at_once)
        chunks = cut.to(torch.device(s.device))
        q_BHQ = s.randn(len(lengths), s.num_heads, s.nope + s.rope)
        turn_BJ = random_turns(s, len(lengths))
        scale_B = torch.full((len(lengths),), 1.1, device=s.device)
        q_BHW = latent_queries_triton(q_BHQ, heads.w_uk_HNC, turn_BJ, scale_B)
        found.append(Step(q_BHQ, q_BHW, cache_NSW, chunks, heads, turn_BJ, scale_B))
    return found


def even_lengths(num_queries: int, context: int, page_size: int) -> list[int]:
    """About `context` keys each, ending in every place of a page."""
    return [context - query % page_size for query in range(num_queries)]


def ragged_lengths() -> list[int]:
    """From short to long, spread evenly by their logarithms."""
    step = math.log(_LONGEST / _SHORTEST) / (_RAGGED - 1)
    return [round(_SHORTEST * math.exp(query * step)) for query in range(_RAGGED)]


def cases(
    sizes: Sizes,
    contexts: Sequence[tuple[int, int]] = CONTEXTS,
    batches: Sequence[int] = BATCHES,
    *,
    with_ragged: bool = True,
) -> Iterator[Case]:
    """Attention by context, and what stands around it by batch; of FP8 rows what touches them."""
    for num_queries, context in contexts:
        lengths = even_lengths(num_queries, context, sizes.page_size)
        yield from _of_contexts(sizes, f"{num_queries} x {context}", lengths)
    if with_ragged:
        yield from _of_contexts(sizes, "64 ragged", ragged_lengths())
    for num_queries in batches:
        if sizes.cache_dtype != FP8_ROWS:
            yield from _of_batch(sizes, num_queries)
        yield _prologue(sizes, num_queries)


def _of_contexts(sizes: Sizes, size: str, lengths: list[int]) -> Iterator[Case]:
    s, variants = sizes, steps(sizes, lengths)
    num_keys, rows = sum(lengths), len(lengths) * s.num_heads
    width = s.latent + s.rope
    cache_bytes = num_keys * s.row_bytes()
    flops = 2.0 * num_keys * s.num_heads * (width + s.latent)
    weights = s.num_heads * s.latent * (s.nope + s.value)
    yield Case(
        operation=s.of_cache("attend_latents"),
        size=size,
        launches=[step.attend for step in variants],
        bytes_moved=cache_bytes + rows * (width + s.latent) * 2,
        flops=flops,
        error=variants[0].attend_error,
        tolerance=_TOLERANCE,
    )
    yield Case(
        operation=s.of_cache("mla_decode"),
        size=size,
        launches=[step.whole for step in variants],
        bytes_moved=cache_bytes + weights * 2 + rows * (s.nope + s.rope + s.value) * 2,
        flops=flops + 2.0 * len(lengths) * weights,
        error=variants[0].whole_error,
        tolerance=2 * _TOLERANCE,
    )


def _of_batch(sizes: Sizes, num_queries: int) -> Iterator[Case]:
    s, size = sizes, f"B={num_queries}"
    rows = num_queries * s.num_heads
    up_bytes, out_bytes = (2 * s.num_heads * s.latent * width for width in (s.nope, s.value))
    layers = [random_heads(s) for _ in range(num_variants(up_bytes))]
    query_BHQ = s.randn(num_queries, s.num_heads, s.nope + s.rope)
    latent_BHC = s.randn(num_queries, s.num_heads, s.latent)
    turn_BJ, scale_B = random_turns(s, num_queries), torch.rand(num_queries, device=s.device)
    turned = (turn_BJ, scale_B)

    def queries_error() -> float:
        w_uk_HNC = layers[0].w_uk_HNC
        expected = latent_queries_reference(query_BHQ.float(), w_uk_HNC, *turned)
        poison(expected.numel() * 2, s.device)
        return relative_error(latent_queries_triton(query_BHQ, w_uk_HNC, *turned), expected)

    def values_error() -> float:
        w_uv_HVC = layers[0].w_uv_HVC
        expected = expand_values_reference(latent_BHC.float(), w_uv_HVC)
        poison(expected.numel() * 2, s.device)
        return relative_error(expand_values_triton(latent_BHC, w_uv_HVC), expected)

    yield Case(
        operation="latent_queries",
        size=size,
        launches=[partial(latent_queries_triton, query_BHQ, h.w_uk_HNC, *turned) for h in layers],
        bytes_moved=up_bytes + rows * (s.nope + 2 * s.rope + s.latent) * 2,
        flops=2.0 * rows * s.nope * s.latent,
        error=queries_error,
        tolerance=_TOLERANCE,
    )
    yield Case(
        operation="expand_values",
        size=size,
        launches=[partial(expand_values_triton, latent_BHC, h.w_uv_HVC) for h in layers],
        bytes_moved=out_bytes + rows * (s.latent + s.value) * 2,
        flops=2.0 * rows * s.value * s.latent,
        error=values_error,
        tolerance=_TOLERANCE,
    )


def _prologue(sizes: Sizes, num_tokens: int) -> Case:
    s, width = sizes, sizes.latent + sizes.rope
    projected = s.randn(num_tokens, s.compressed + width)
    norms = PrologueNorms(s.randn(s.compressed), s.randn(s.latent), _EPS)
    num_pages = -(-num_tokens // s.page_size) + 1
    cache_NSW = s.randn_cache(num_pages)
    slots_T = torch.randperm(num_pages * s.page_size, device=s.device)[:num_tokens]
    arguments = (
        projected[:, : s.compressed],
        projected[:, s.compressed :],
        norms,
        random_turns(s, num_tokens),
        slots_T,
    )

    def error() -> float:
        expected_NSW = cache_NSW.clone()
        expected = mla_prologue_reference(*arguments, expected_NSW)
        poison(expected.numel() * 2, s.device)
        out = mla_prologue_triton(*arguments, cache_NSW)
        rows = [row_values(cache, s.latent, torch.float32) for cache in (cache_NSW, expected_NSW)]
        written = relative_error(*rows)
        return largest_error([relative_error(out, expected), written])

    return Case(
        operation=s.of_cache("mla_prologue"),
        size=f"B={num_tokens}",
        launches=[partial(mla_prologue_triton, *arguments, cache_NSW)],
        bytes_moved=num_tokens * (s.compressed * 4.0 + width * 2 + s.row_bytes()),
        error=error,
        tolerance=_TOLERANCE,
    )
