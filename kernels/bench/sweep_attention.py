"""Find how single-token and chunked attention are launched fastest."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial

import torch

from ostro.kernels.bench.attention_cases import CONTEXTS, Step, even_lengths, steps
from ostro.kernels.bench.measure import poison, relative_error
from ostro.kernels.bench.prefill_cases import random_chunk
from ostro.kernels.bench.sizes import Sizes
from ostro.kernels.bench.trials import MAX_SHARED_BYTES, Trial, compile_all, tried
from ostro.kernels.gpu.mla_decode import DecodeCut, attend_latents_reference
from ostro.kernels.gpu.mla_prefill import PrefillTile
from ostro.kernels.latent_cache import FP8_ROWS

# (new tokens, tokens before them)
PREFILLS = ((128, 8192), (256, 8192), (512, 8192), (1024, 8192), (2048, 8192), (8192, 8192))
_CHUNK_KEYS = (128, 256, 512, 1024)
_MOST_CHUNKS = 512  # of a request: more are not worth their join
_LENGTHS = (1, 63, 64, 65, 128, 129, 1000, 3000)
_TOLERANCE = 1e-2
_NOT_TRIED = "not tried"
_DTYPE = torch.bfloat16
_FEW_KEYS = 192
_WIDTH = 128  # of a head's query, key and value
_MAX_SUMS = 160  # float32 scores and values of a thread; at 192 they spill


def decode_cuts(cache_dtype: torch.dtype) -> list[DecodeCut]:
    """Launches of single-token attention worth trying: no register of theirs spills on Hopper."""
    if cache_dtype == FP8_ROWS:
        return [
            DecodeCut(num_warps=warps, num_stages=stages, early_loads=False)
            for warps, stages in itertools.product((4, 8), (1, 2, 3))
        ]
    usual = DecodeCut(num_warps=4, num_stages=2, early_loads=True)
    return [
        usual,
        replace(usual, early_loads=False),
        replace(usual, num_warps=8),
        replace(usual, num_stages=4),
    ]


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
    """Launches and keys of a chunk, one list for each with its time for every batch and context."""
    cuts = decode_cuts(sizes.cache_dtype)
    compile_all([partial(_compile_decode, sizes, cut) for cut in cuts])
    wrong = {cut: _wrong(sizes, cut) for cut in cuts}
    for keys in _CHUNK_KEYS:
        variants = {
            f"{num_queries} x {context}": steps(
                sizes, even_lengths(num_queries, context, sizes.page_size), keys
            )
            for num_queries, context in contexts
            if context <= _MOST_CHUNKS * keys
        }
        for cut in cuts:
            yield [
                _decode_trial(sizes, cut, keys, size, variants.get(size, []), wrong[cut])
                for size in (f"{num_queries} x {context}" for num_queries, context in contexts)
            ]


def contexts_line(trials: Sequence[Trial]) -> str:
    """One launch at all contexts, in microseconds; "-" where it was not tried or failed.

    Example:
        "attend_latents w4 s2 early  512:   8.1  24.0     -  30.5"
    """
    cut = trials[0].cut
    words = [f"w{cut['num_warps']} s{cut['num_stages']}"]
    words += ["early"] if cut["early_loads"] else []
    times = " ".join("    -" if t.us is None else f"{t.us:5.1f}" for t in trials)
    failures = {trial.failure for trial in trials} - {"", _NOT_TRIED}
    told = "".join(sorted(failures))[:40]
    label = " ".join(words)
    return f"{trials[0].operation} {label:11} {cut['chunk_keys']:4}: {times} {told}".rstrip()


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


def _wrong(sizes: Sizes, cut: DecodeCut) -> str:
    """What is wrong with a launch on contexts of many lengths, "" if nothing is."""
    step = steps(sizes, _LENGTHS, _CHUNK_KEYS[0], most=2)[0]
    scale = step.heads.scale
    expected = attend_latents_reference(
        step.q_BHW.float(), step.cache_NSW, step.chunks, sizes.latent, scale
    )
    poison(expected.numel() * 2, sizes.device)
    try:
        error = relative_error(step.attend(cut), expected)
    except Exception as problem:  # noqa: BLE001 - whatever a compiler raises
        return f"{type(problem).__name__}: {problem}"[:200]
    return "" if error <= _TOLERANCE else f"wrong by {error:.0e}"


def _decode_trial(
    sizes: Sizes,
    cut: DecodeCut,
    keys: int,
    size: str,
    variants: Sequence[Step],
    failure: str,
) -> Trial:
    operation = sizes.of_cache("attend_latents")
    setting = {"chunk_keys": keys, **asdict(cut)}
    if variants and not failure:
        launches = [partial(step.attend, cut) for step in variants]
        return tried(operation, _DTYPE, size, setting, launches)
    return Trial(
        operation=operation,
        dtype=str(_DTYPE).removeprefix("torch."),
        size=size,
        cut=setting,
        us=None,
        failure=failure or _NOT_TRIED,
    )


def _compile_prefill(sizes: Sizes, tile: PrefillTile) -> None:
    random_chunk(sizes, _FEW_KEYS, 0).attend(tile)
