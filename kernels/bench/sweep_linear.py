"""Find the fastest tiles of NVFP4 linear layers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from functools import partial

import torch

from ostro.kernels.bench.linear_cases import NVFP4_BYTES, random_nvfp4_weight
from ostro.kernels.bench.measure import num_variants
from ostro.kernels.bench.sizes import Sizes
from ostro.kernels.bench.sweep import variants
from ostro.kernels.bench.trials import Trial, compile_all, quietly, tried
from ostro.kernels.bench.tuned import LINEAR
from ostro.kernels.gpu.nvfp4_linear import nvfp4_linear_triton
from ostro.kernels.gpu.tiles import FP4

TOKENS_OF_ROWS = {16: 1, 32: 32, 64: 128, 128: 2048}  # of a batch whose tiles have so many rows
_TO_COMPILE = Sizes(num_heads=2, hidden=256)  # multiples of 16, as the large ones
_JOBS_A_KERNEL = 2


def sweep_linear(sizes: Sizes) -> Iterator[list[Trial]]:
    """Every variant of the projection out of the heads, one list for each number of rows."""
    device = torch.device(sizes.device)
    compile_all(
        [partial(_compile, rows, part) for rows in TOKENS_OF_ROWS for part in range(_JOBS_A_KERNEL)]
    )
    num_in, num_out = sizes.num_heads * sizes.value, sizes.hidden
    num_weights = num_variants(num_in * num_out * NVFP4_BYTES)
    weights = [random_nvfp4_weight(sizes, num_in, num_out) for _ in range(num_weights)]
    for rows, num_tokens in TOKENS_OF_ROWS.items():
        x_TI = sizes.randn(num_tokens, num_in)
        yield [
            tried(
                LINEAR,
                FP4,
                f"T={num_tokens} rows={rows}",
                asdict(cut),
                [partial(nvfp4_linear_triton, x_TI, weight, cut) for weight in weights],
            )
            for cut in variants(LINEAR, FP4, rows, device)
        ]


def _compile(rows: int, part: int) -> None:
    """Some of the variants."""
    s = _TO_COMPILE
    num_in = s.num_heads * s.value
    weight, x_TI = random_nvfp4_weight(s, num_in, s.hidden), s.randn(rows, num_in)
    for cut in variants(LINEAR, FP4, rows, torch.device(s.device))[part::_JOBS_A_KERNEL]:
        quietly(partial(nvfp4_linear_triton, x_TI, weight, cut))
