"""Launches of linear layers in Mistral Small 4's sizes, for the compile gate.

FP8 ones of few rows, which are not cuBLAS's; NVFP4 ones whose rows fill tiles of 16 to 128.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from ostro.kernels.fp8_linear import Fp8Rows, Fp8Weight
from ostro.kernels.gpu.fp8_linear import MAX_FEW_ROWS, fp8_linear_triton
from ostro.kernels.gpu.nvfp4_linear import nvfp4_linear_triton
from ostro.kernels.nvfp4_linear import SCALE_WORDS, WORDS, Nvfp4Weight, num_blocks

_OUTPUTS, _INPUTS = 4096, 4096
_ROWS_OF_TILE = {16: 1, 32: 32, 64: 200, 128: 2048}


def _few_rows(num_rows: int, *, is_rounded: bool) -> None:
    scale = torch.empty((), dtype=torch.float32, device="meta")
    values_OI = torch.empty(_OUTPUTS, _INPUTS, dtype=torch.float8_e4m3fn, device="meta")
    weight = Fp8Weight(values_OI=values_OI, scale=scale, input_scale=scale)
    dtype = torch.float8_e4m3fn if is_rounded else torch.bfloat16
    rows_TI = torch.empty(num_rows, _INPUTS, dtype=dtype, device="meta")
    rounded = Fp8Rows(values_TI=rows_TI, dtype=torch.bfloat16)
    fp8_linear_triton(rounded if is_rounded else rows_TI, weight)


def _nvfp4(num_rows: int) -> None:
    shape = num_blocks(_INPUTS), _OUTPUTS
    weight = Nvfp4Weight(
        words_BOW=torch.empty(*shape, WORDS, dtype=torch.int32, device="meta"),
        scales_BOS=torch.empty(*shape, SCALE_WORDS, dtype=torch.int32, device="meta"),
        unit_O=torch.empty(_OUTPUTS, device="meta"),
        num_inputs=_INPUTS,
    )
    rows_TI = torch.empty(num_rows, _INPUTS, dtype=torch.bfloat16, device="meta")
    nvfp4_linear_triton(rows_TI, weight)


LAUNCHES: dict[str, Callable[[], None]] = {
    f"fp8_linear_{num_rows}{'_rounded' * is_rounded}": functools.partial(
        _few_rows, num_rows, is_rounded=is_rounded
    )
    for num_rows in (1, MAX_FEW_ROWS)
    for is_rounded in (False, True)
}
for _tile, _num_rows in _ROWS_OF_TILE.items():
    LAUNCHES[f"nvfp4_linear_{_tile}"] = functools.partial(_nvfp4, _num_rows)
