"""Find how single-token and chunked attention are launched fastest."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial

import torch

from ostro.kernels.bench.attention_cases import CONTEXTS, even_lengths, steps
from ostro.kernels.bench.prefill_cases import random_chunk
from ostro.kernels.bench.sizes import Sizes
from ostro.kernels.bench.trials import MAX_SHARED_BYTES, Trial, compile_all, tried
from ostro.kernels.gpu.mla_decode import DecodeCut
from ostro.kernels.gpu.mla_prefill import PrefillTile

# (new tokens, tokens before them)
PREFILLS = ((128, 8192), (256, 8192), (512, 8192), (1024, 8192), (2048, 8192), (8192, 8192))
_CHUNK_KEYS = (256, 512, 1024)
_DTYPE = torch.bfloat16
_FEW_KEYS = 192
_WIDTH = 128  # of a head's query, key and value
_MAX_SUMS = 160  # float32 scores and values of a thread; at 192 they spill


def decode_cuts() -> list[DecodeCut]:
    """Launches of single-token attention worth trying."""
    choices = itertools.product((4, 8), (2, 3))
    return [DecodeCut(num_warps=warps, num_stages=stages) for warps, stages in choices]


def prefill_tiles() -> list[PrefillTile]:
    """Tiles of chunked attention worth trying: whose loads and sums fit."""
    found = []
    for queries, keys, warps, stages in itertools.product((64, 128), (64, 128), (4, 8), (2, 3)):
        loads = 2 * _WIDTH * (queries + 2 * keys * stages)
        sums = queries * (keys + _WIDTH) / (32 * warps)
        is_idle = queries < 16 * warps  # a warp of Hopper's takes 16 queries
        if not is_idle and loads <= MAX_SHARED_BYTES and sums <= _MAX_SUMS:
            found.append(
                PrefillTile(
                    block_queries=queries, block_keys=keys, num_warps=warps, num_stages=stages
                )
            )
    return found


def sweep_decode(
    sizes: Sizes, contexts: Sequence[tuple[int, int]] = CONTEXTS
) -> Iterator[list[Trial]]:
    """Launches and keys of a chunk, one list for each batch and context."""
    compile_all([partial(_compile_decode, sizes, cut) for cut in decode_cuts()])
    for num_queries, context in contexts:
        lengths = even_lengths(num_queries, context, sizes.page_size)
        trials = []
        for keys in _CHUNK_KEYS:
            variants = steps(sizes, lengths, keys)
            for cut in decode_cuts():
                launches = [partial(step.attend, cut) for step in variants]
                size = f"{num_queries} x {context}"
                setting = {"chunk_keys": keys, **asdict(cut)}
                trials.append(tried("attend_latents", _DTYPE, size, setting, launches))
        yield trials


def sweep_prefill(
    sizes: Sizes, chunks: Sequence[tuple[int, int]] = PREFILLS
) -> Iterator[list[Trial]]:
    """Tiles, one list for each chunk."""
    compile_all([partial(_compile_prefill, sizes, tile) for tile in prefill_tiles()])
    for num_tokens, start in chunks:
        chunk = random_chunk(sizes, num_tokens, start)
        yield [
            tried(
                "attend",
                _DTYPE,
                f"{num_tokens} @ {start}",
                asdict(tile),
                [partial(chunk.attend, tile)],
            )
            for tile in prefill_tiles()
        ]


def _compile_decode(sizes: Sizes, cut: DecodeCut) -> None:
    steps(sizes, [_FEW_KEYS], most=2)[0].attend(cut)


def _compile_prefill(sizes: Sizes, tile: PrefillTile) -> None:
    random_chunk(sizes, _FEW_KEYS, 0).attend(tile)
