"""Find the fastest tiles of the grouped products, and how many rows a tile should have.

A sweep of tiles goes by rows, each with tokens that fill such tiles; a sweep of rows goes by
tokens, each number of rows with its best tile.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial

import torch

from ostro.kernels.bench.expert_layers import Batch, Layer, make_layer
from ostro.kernels.bench.measure import Launch
from ostro.kernels.bench.sizes import Sizes
from ostro.kernels.bench.trials import MAX_SHARED_BYTES, Trial, compile_all, quietly, tried
from ostro.kernels.bench.tuned import TILED
from ostro.kernels.gpu.tiles import FP4, Tile, TunedTiles, tile
from ostro.kernels.nvfp4_linear import BLOCK_INPUTS

# Tokens of a batch whose tiles have so many rows.
TOKENS_OF_ROWS = {16: 32, 32: 512, 64: 1024, 128: 8192}
FEW_TOKENS = (1, 4)  # whose tiles are too few for every processor to have several
ROW_BATCHES = (128, 256, 512, 1024, 2048, 4096, 8192)
# Few experts, few rows: as many of each as their strides are multiples of 16.
_TO_COMPILE = Sizes(hidden=512, inner=256, num_experts=16)
_FEW_ROWS = 32
_MAX_SUMS = 160  # float32 sums of a thread, beside which 255 registers still hold the rest
_JOBS_A_KERNEL = 4


def variants(operation: str, dtype: torch.dtype, rows: int, device: torch.device) -> list[Tile]:
    """Tiles worth trying: whose loads fit shared memory."""
    few = rows <= _FEW_ROWS
    choices = itertools.product(
        (64, 128) if few else (64, 128, 256),  # outputs
        (4, 8),  # warps
        (3, 4, 5, 6, 8) if few else (3, 4),  # stages
        (1, 2, 3, 4) if few else (1, 2),  # programs
    )
    num_weights = 2 if operation == "gate_up" else 1
    block_in = tile(operation, dtype, rows, device).block_in
    found = []
    for block_out, num_warps, num_stages, programs in choices:
        step_bytes = _step_bytes(dtype, num_weights * block_out, rows)
        sums = block_out * rows * num_weights / (32 * num_warps)
        is_idle = few and block_out < 16 * num_warps  # a warp of Hopper's takes 16 outputs
        if is_idle or step_bytes * num_stages * programs > MAX_SHARED_BYTES or sums > _MAX_SUMS:
            continue
        found.append(
            Tile(
                block_rows=rows,
                block_out=block_out,
                block_in=block_in,
                num_warps=num_warps,
                num_stages=num_stages,
                programs_per_processor=programs,
            )
        )
    return found


def _step_bytes(dtype: torch.dtype, num_outputs: int, rows: int) -> int:
    """Shared memory of one step's loads."""
    if dtype == FP4:  # a block of 128 inputs, and rows in bf16
        return (BLOCK_INPUTS // 2 + BLOCK_INPUTS // 16) * num_outputs + 2 * BLOCK_INPUTS * rows
    return 128 * (num_outputs + rows)


def sweep_tiles(
    layer: Layer, rows_list: Sequence[int] = tuple(TOKENS_OF_ROWS)
) -> Iterator[list[Trial]]:
    """Every variant of both products, one list for each product and number of rows."""
    device = torch.device(layer.sizes.device)
    compile_all(
        [
            partial(_compile, layer.dtype, operation, rows, part)
            for operation, rows in itertools.product(TILED, rows_list)
            for part in range(_JOBS_A_KERNEL)
        ]
    )
    for rows in rows_list:
        num_tokens = TOKENS_OF_ROWS[rows]
        runs = _Runs(layer, num_tokens, rows)
        for operation in TILED:
            yield [
                tried(
                    operation,
                    layer.dtype,
                    f"B={num_tokens} rows={rows}",
                    asdict(cut),
                    runs.launches(operation, cut),
                )
                for cut in variants(operation, layer.dtype, rows, device)
            ]


def sweep_few(layer: Layer) -> Iterator[list[Trial]]:
    """Every variant of the smallest tiles on very small batches."""
    rows, device = min(TOKENS_OF_ROWS), torch.device(layer.sizes.device)
    for num_tokens in FEW_TOKENS:
        runs = _Runs(layer, num_tokens, rows)
        for operation in TILED:
            yield [
                tried(
                    f"{operation} of few",
                    layer.dtype,
                    f"B={num_tokens}",
                    asdict(cut),
                    runs.launches(operation, cut),
                )
                for cut in variants(operation, layer.dtype, rows, device)
            ]


def sweep_rows(
    layer: Layer, best: TunedTiles, batches: Sequence[int] = ROW_BATCHES
) -> Iterator[list[Trial]]:
    """Rows of a tile for batches of tokens; `best` has the tiles, where it has none the usual."""
    dtype, device = layer.dtype, torch.device(layer.sizes.device)
    for num_tokens in batches:
        by_rows = {rows: _Runs(layer, num_tokens, rows) for rows in TOKENS_OF_ROWS}
        for operation in TILED:
            trials = []
            for rows, runs in by_rows.items():
                key = operation, str(dtype).removeprefix("torch."), rows
                cut = best.get(key) or tile(operation, dtype, rows, device)
                launches = runs.launches(operation, cut)
                name = f"{operation} by rows"
                trials.append(tried(name, dtype, f"B={num_tokens}", asdict(cut), launches))
            yield trials


class _Runs:
    """Both products of batches of one size."""

    def __init__(self, layer: Layer, num_tokens: int, rows: int) -> None:
        self._layer = layer
        self._batches = layer.batches(num_tokens, rows=rows)
        self._hidden = [layer.gate_up(batch) for batch in self._batches]

    def launches(self, operation: str, cut: Tile) -> list[Launch]:
        if operation == "gate_up":
            return [partial(self._layer.gate_up, batch, cut) for batch in self._batches]
        pairs: zip[tuple[Batch, torch.Tensor]] = zip(self._batches, self._hidden, strict=True)
        return [partial(self._layer.down, batch, hidden, cut) for batch, hidden in pairs]


def _compile(dtype: torch.dtype, operation: str, rows: int, part: int) -> None:
    """Some of the variants."""
    layer = make_layer(dtype, _TO_COMPILE)
    (batch, *_) = layer.batches(_TO_COMPILE.num_experts, rows=rows)
    hidden = torch.zeros(len(batch.x_AD), _TO_COMPILE.inner, device=_TO_COMPILE.device)
    hidden, device = hidden.to(layer.row_dtype), torch.device(_TO_COMPILE.device)
    for cut in variants(operation, dtype, rows, device)[part::_JOBS_A_KERNEL]:
        if operation == "gate_up":
            quietly(partial(layer.gate_up, batch, cut))
        else:
            quietly(partial(layer.down, batch, hidden, cut))
